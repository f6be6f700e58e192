"""The interval of dampings: real steps against dense ones, noise that is planted, and how the interval is cut."""

from math import inf, nan
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn

import curvlab
from curvlab.advice import Candidate
from curvlab.advice.damping import FURTHEST, Dampings, Tried, dampings
from curvlab.nn import HalfSquaredError

EXACT = Candidate("natural gradient", {"structure": "full", "kind": "exact", "kl_clip": None})
Pair = tuple[Tensor, Tensor]


def measured(candidate: Candidate, model: nn.Module, loss: nn.Module, batch: Pair, others: list[Pair]) -> Dampings:
    found = dampings(
        candidate, model, loss, batch, others, output=None, graph=False, until=inf, clock=perf_counter
    )  # fmt: skip
    assert found is not None
    return found


def linear() -> tuple[nn.Module, nn.Module, list[Pair]]:
    torch.manual_seed(0)
    w = torch.randn(5, 1).double()
    pairs = [(x, x @ w + torch.randn(12, 1).double()) for x in torch.randn(4, 12, 5).double()]
    return nn.Linear(5, 1, bias=False).double(), HalfSquaredError(), pairs


def test_falls_are_those_of_dense_damped_steps() -> None:
    model, loss, (batch, *others) = linear()
    found = measured(EXACT, model, loss, batch, others)
    x, y = batch
    theta = model.weight.detach()[0]
    F, g = x.T @ x / 12, x.T @ (x @ theta - y[:, 0]) / 12
    assert found.start == pytest.approx(float(0.01 * (g @ F @ g) / (g @ g)))
    assert len(found.tried) == 2 * FURTHEST + 1
    for place, one in enumerate(found.tried):
        assert one.damping == pytest.approx(found.start * 10 ** ((place - FURTHEST) / 2))
        step = torch.linalg.solve(F + one.damping * torch.eye(5).double(), g)
        falls = torch.stack(
            [loss(a @ theta[:, None], b) - loss(a @ (theta - step)[:, None], b) for a, b in (batch, *others)]
        )
        assert one.fall == pytest.approx(float(falls[0]), rel=1e-6, abs=1e-12)
        assert one.others == pytest.approx(float(falls[1:].mean()), rel=1e-6, abs=1e-12)
        assert one.error == pytest.approx(float(falls[1:].std() / 3**0.5), rel=1e-6, abs=1e-12)


def test_a_step_along_noise_holds_at_no_damping() -> None:
    """Labels are drawn by lot, and the network says so: no step lowers the loss of other batches."""
    torch.manual_seed(1)
    model = nn.Linear(30, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    batch, *others = [(torch.randn(8, 30).double(), torch.randint(3, (8,))) for _ in range(9)]
    found = measured(Candidate("natural gradient"), model, nn.CrossEntropyLoss(), batch, others)
    assert max(one.fall for one in found.tried) > 0.1, "the loss of its own batch falls"
    assert found.interval is None
    assert str(found).startswith(
        "No damping was found at which a step lowers the loss of its batch, and that of 8 others"
    )


def tried(damping: int, fall: float, others: float = nan, error: float = nan) -> Tried:
    return Tried(float(damping), float(fall), float(others), float(error))


@pytest.mark.parametrize(
    ("steps", "interval"),
    [
        ([tried(1, -1), tried(2, 3), tried(3, 4), tried(4, 2), tried(5, 1)], (2, 4)),
        ([tried(1, 5, 1.9, 1), tried(2, 5, 2.1, 1), tried(3, 4, 2, 0.1), tried(4, 3, 0.5, 0.1)], (2, 3)),
        ([tried(1, 9, 9, 0.1), tried(2, -1, 8, 0.1), tried(3, 4, 5, 0.1), tried(4, 3, 5, 0.1)], (1, 1)),
        ([tried(1, -1), tried(2, -inf)], None),
        ([tried(1, 1, -1, 0.1)], None),
        ([tried(1, 1, 0.5)], (1, 1)),
    ],
)
def test_the_interval_is_around_the_best_that_holds_and_ends_where_half_of_its_fall_is_left(
    steps: list[Tried], interval: tuple[float, float] | None
) -> None:
    assert Dampings(tuple(steps), 1.0, 2).interval == interval


def test_an_end_of_the_grid_is_said_to_be_open() -> None:
    found = Dampings((tried(1, 3), tried(2, 3), tried(3, -1)), 3.0, 0)
    assert "at dampings from below 1 to 2; training starts at 3, outside." in str(found)
    assert "there is no other to tell noise by" in str(found)


def test_no_further_damping_is_tried_once_time_is_up() -> None:
    model, loss, (batch, *_) = linear()
    found = dampings(EXACT, model, loss, batch, [], output=None, graph=False, until=0.0, clock=perf_counter)
    assert found is not None
    assert [one.damping for one in found.tried] == [found.start]
    assert str(found).startswith(
        f"At the damping {found.start:.2g} that training starts at a step lowers the loss of its batch"
    )
    assert str(found).endswith("There was no time for other dampings.")


def test_steps_and_losses_see_one_mask_of_dropout_and_the_model_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Linear(40, 3))
    batch = torch.randn(16, 5), torch.randint(3, (16,))
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    first, again = (
        measured(Candidate("natural gradient"), model, nn.CrossEntropyLoss(), batch, [batch]) for _ in range(2)
    )
    assert first.tried == again.tried
    assert all(one.others == one.fall for one in first.tried)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_advice_says_all_settings_and_draws_the_dampings() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(5, 3), (torch.randn(64, 5), torch.randint(3, (64,)))
    advice = curvlab.advise(model, nn.CrossEntropyLoss(), (x, y), 0.5, candidates=[Candidate("natural gradient")])
    assert advice.dampings is not None
    assert advice.dampings.batches == 4
    settings = advice.settings
    assert settings["damping"] == advice.dampings.start
    assert {n: v for n, v in settings.items() if n != "damping"} == {
        "structure": "kfac", "kind": "mc", "adapted": True, "lr": 1.0, "momentum": 0.0, "kl_clip": 0.01, "refresh_every": 1,
    }  # fmt: skip
    assert all(f"{name} " in str(advice) for name in settings)
    assert all(len(line) <= 80 for line in str(advice).splitlines())
    axes = advice.plot().axes
    assert [at.get_xlabel() for at in axes] == ["seconds of training", "damping of one step"]


def test_settings_of_other_optimisers_are_theirs() -> None:
    model, (x, y) = nn.Linear(5, 3), (torch.randn(64, 5), torch.randint(3, (64,)))
    for candidate, settings in (
        (Candidate("Adam", {"lr": 0.1}), {"lr": 0.1, "betas": (0.9, 0.999)}),
        (Candidate("SGD", {"lr": 0.1, "momentum": 0.5}), {"lr": 0.1, "momentum": 0.5}),
    ):
        advice = curvlab.advise(model, nn.CrossEntropyLoss(), (x, y), 0.1, candidates=[candidate])
        assert advice.settings == settings
        assert advice.dampings is None
