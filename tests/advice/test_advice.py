"""Advice: what races, how rounds go, and that nothing of the user's changes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.advice import Advice, Candidate
from curvlab.advice.advising import as_seconds
from curvlab.advice.race import Entrant, race
from curvlab.optim import NaturalGradient
from curvlab.problems import resolve

CANDIDATES = [
    Candidate("natural gradient"),
    Candidate("Adam", {"lr": 3e-3}),
    Candidate("SGD", {"lr": 1e-1, "momentum": 0.9}),
    Candidate("SGD", {"lr": 1e6}),
]


def problem() -> tuple[nn.Module, nn.Module, DataLoader[Any]]:
    digits = resolve("digits-mlp").to(dtype=torch.float32)
    return digits.model, digits.loss, DataLoader(TensorDataset(*digits.train), batch_size=128, shuffle=True)


@pytest.fixture(scope="module")
def advice() -> Advice:
    return curvlab.advise(*problem(), budget="4s", candidates=CANDIDATES)


def test_an_optimiser_that_trains_is_advised(advice: Advice) -> None:
    """A learning rate of 10⁶ is not."""
    assert advice.candidate in CANDIDATES[:3]
    assert advice.falls
    assert advice.winner.best < 0.5 * advice.before
    table = advice.table
    assert table["method"].iloc[0] == advice.candidate.method
    assert len(table) == len(CANDIDATES)
    assert table["rounds"].max() == 2
    said = " ".join(str(advice).split())
    assert said.startswith(f"Take {advice.candidate}")
    assert "the last 1 of 12 batches" in said or "the last 1 of 11 batches" in said
    assert advice.plot().axes[0].get_xlabel() == "seconds of training"


def test_the_optimiser_is_made_for_a_model_and_trains_it(advice: Advice) -> None:
    model, loss, loader = problem()
    optimizer = advice.optimizer(model)
    x, y = next(iter(loader))
    before = loss(model(x), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        if isinstance(optimizer, NaturalGradient):
            with optimizer.collect():
                advice.loss(model(x), y).backward()
        else:
            loss(model(x), y).backward()
        optimizer.step()
    assert loss(model(x), y).item() < 0.7 * before


def test_the_optimiser_trains_as_the_winner_did() -> None:
    """Damping, too, starts where it started: where it has arrived is right for other weights, and for curvature of many batches."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3).double(), (torch.randn(64, 5).double(), torch.randint(3, (64,)))
    advice = curvlab.advise(model, nn.CrossEntropyLoss(), (x, y), 0.5, candidates=[CANDIDATES[0]])
    optimizer = advice.optimizer(model)
    assert isinstance(optimizer, NaturalGradient)
    for _ in range(advice.winner.steps):
        optimizer.zero_grad()
        with optimizer.collect():
            advice.loss(model(x[:56]), y[:56]).backward()
        optimizer.step()
    assert advice.winner.steps > 5
    for mine, raced in zip(model.parameters(), advice.winner.model.parameters(), strict=True):
        torch.testing.assert_close(mine, raced)


def test_model_gradients_modes_random_numbers_and_the_order_of_data_stay() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[0].weight.grad = torch.ones(8, 4)
    model[2].eval()
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(3, (40,))), batch_size=8, shuffle=True)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = [torch.rand(2), next(iter(loader))[0]]
    torch.manual_seed(5)
    curvlab.advise(model, nn.CrossEntropyLoss(), loader, 0.5, candidates=CANDIDATES[:2])
    found = [torch.rand(2), next(iter(loader))[0]]
    assert all(map(torch.equal, found, expected))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones(8, 4))
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_what_natural_gradient_cannot_train_another_method_does() -> None:
    """L1Loss has no Fisher matrix; the advice says so."""
    model, (x, y) = nn.Linear(3, 1), torch.randn(2, 64, 3).unbind()
    advice = curvlab.advise(model, nn.L1Loss(), (x, y[:, :1]), 0.5, candidates=CANDIDATES[:3])
    assert advice.candidate.method != "natural gradient"
    said = " ".join(str(advice).split())
    assert "natural gradient (as it is) could not start: L1Loss" in said
    assert "the last 8 of 64 samples" in said


class Clock:
    """Time that passes by calls: 1 s a step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


class Slope(nn.Module):
    """A loss that is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.tensor(100.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.height.expand(len(x))


class Height(nn.Module):
    def forward(self, z: Tensor, _: Tensor) -> Tensor:
        return z.mean()


def runners(*rates: float) -> list[Entrant]:
    return [Entrant.of(Candidate("SGD", {"lr": lr}), Slope(), Height(), None, graph=False) for lr in rates]


def test_half_drop_out_after_every_round_and_the_rest_have_equal_times() -> None:
    entrants = runners(0.1, 0.4, 0.2, 0.3, 0.05, 0.6, 0.7, 0.5)
    batch = (torch.zeros(1), torch.zeros(1))
    best = race(entrants, [batch], [batch], 600.0, clock=Clock())
    assert [entrant.candidate.settings["lr"] for entrant in best[:2]] == [0.7, 0.6]
    assert [len(entrant.looks) for entrant in best] == [3, 3, 2, 2, 1, 1, 1, 1]
    assert sorted(len(entrant.looks) for entrant in entrants) == [1, 1, 1, 1, 2, 2, 3, 3]
    for rounds in (1, 2, 3):
        steps = [entrant.steps for entrant in entrants if len(entrant.looks) == rounds]
        assert max(steps) - min(steps) <= 0.15 * max(steps)
    longest, shortest = (max(e.steps for e in entrants if len(e.looks) == rounds) for rounds in (3, 1))
    assert longest == pytest.approx(7 * shortest, rel=0.25), "one part of eight, one of four, one of two"


class Cliff(Height):
    """A height that is not a number below some level."""

    def forward(self, z: Tensor, _: Tensor) -> Tensor:
        return torch.where(z > 60, z, torch.nan).mean()


def test_one_that_dropped_out_takes_the_place_of_a_leader_that_fails() -> None:
    entrants = [
        Entrant.of(Candidate("SGD", {"lr": lr}), Slope(), Cliff(), None, graph=False) for lr in (0.8, 0.9, 0.1, 0.05)
    ]
    batch = (torch.zeros(1), torch.zeros(1))
    best = race(entrants, [batch], [batch], 200.0, clock=Clock())
    assert [entrant.candidate.settings["lr"] for entrant in best] == [0.1, 0.05]
    assert all("not finite" in (entrant.trouble or "") for entrant in entrants[:2])


def test_a_run_that_is_not_finite_is_out_and_named() -> None:
    entrants = runners(0.1, float("inf"))
    batch = (torch.zeros(1), torch.zeros(1))
    best = race(entrants, [batch], [batch], 20.0, clock=Clock())
    assert [entrant.candidate.settings["lr"] for entrant in best] == [0.1]
    assert entrants[1].trouble == "its loss was not finite in step 2"


def test_the_lowest_loss_counts_as_one_may_stop_there() -> None:
    """A run that overfits does not lose what it had."""
    climbs = Candidate("SGD", {"lr": 1.0, "maximize": True})
    entrant = Entrant.of(climbs, Slope(), Height(), None, graph=False)
    batch = (torch.zeros(1), torch.zeros(1))
    first = entrant.look([batch])
    entrant.run([batch], 5.0, Clock())
    assert entrant.look([batch]) > first
    assert entrant.best == first


@pytest.mark.parametrize(
    ("budget", "seconds"), [("30s", 30.0), ("5min", 300.0), (" 0.5 h", 1800.0), (2, 2.0), ("90", 90.0)]
)
def test_budgets(budget: str | float, seconds: float) -> None:
    assert as_seconds(budget) == seconds


@pytest.mark.parametrize("budget", ["5 minutes", "", "-3s", 0, -1.0, float("nan"), float("inf"), "1.2.3s"])
def test_what_is_no_budget_is_named(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"budget is a number of seconds above 0, or a text such as"):
        as_seconds(budget)


@pytest.mark.usefixtures("unchecked_types")
def test_what_cannot_be_raced_is_named() -> None:
    model, loss, loader = problem()
    with pytest.raises(ValueError, match="The data hold no batch"):
        curvlab.advise(model, loss, [], 1.0)
    with pytest.raises(ValueError, match=r"data is a pair \(inputs, targets\).*got a Tensor"):
        curvlab.advise(model, loss, torch.ones(3), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates is empty"):
        curvlab.advise(model, loss, loader, 1.0, candidates=[])
    with pytest.raises(ValueError, match=r"No candidate trains the Sequential.*not finite"):
        curvlab.advise(model, loss, loader, 0.5, candidates=[CANDIDATES[3], Candidate("SGD", {"lr": float("inf")})][1:])


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ((torch.randn(4, 2), torch.randn(4, 1)) for _ in range(3))


def test_what_can_be_passed_once_only_will_do() -> None:
    assert curvlab.advise(nn.Linear(2, 1), nn.MSELoss(), batches(), 0.3, candidates=CANDIDATES[1:2]).before > 0
