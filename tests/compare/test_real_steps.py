"""Real steps of a comparison, against steps taken by hand."""

import numpy as np
import pytest
import torch
from comparison_cases import LOSSES, X, small_model
from torch import nn

import curvlab
from curvlab.compare.batches import two_batches
from curvlab.compare.landscape import Landscape
from curvlab.compare.trials import RealStep, Trial, largest, repeated
from curvlab.fisher import KFAC, make
from curvlab.nn import HalfSquaredError
from curvlab.problems.images import load_images
from curvlab.problems.vision import standardised
from curvlab.rows.passes import Pass
from curvlab.tools.errors import DataUnavailable


@pytest.mark.parametrize("key", ["full", "kfac"])
def test_real_steps_are_those_that_one_takes_by_hand(key: str) -> None:
    loss, y = LOSSES["cross-entropy"]
    model, rho = small_model(12), 1e-2
    second_batch = (X[:8] + 0.1, y[:8])
    found = curvlab.compare(model, loss, [(X[:8], y[:8]), second_batch], key, rho, seconds=None)
    S = curvlab.sqrt_fisher(model, loss, X[:8], y[:8])
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(X[:8]), y[:8]), list(model.parameters()))])
    d = torch.linalg.solve(make(key).update(S).to_dense() + rho * torch.eye(S.P, dtype=g.dtype), g)
    here = nn.utils.parameters_to_vector(model.parameters()).detach()

    def losses(rate: float) -> tuple[float, float]:
        nn.utils.vector_to_parameters(here - rate * d, model.parameters())
        with torch.no_grad():
            return float(loss(model(X[:8]), y[:8])), float(loss(model(second_batch[0]), y[:8]))

    start, second = losses(0.0)
    for row in found.steps.to_dict("records"):
        eta = row["learning_rate"]
        after, other = losses(eta)
        assert row["fall"] == pytest.approx(start - after, rel=1e-6, abs=1e-12)
        assert row["second_fall"] == pytest.approx(second - other, rel=1e-6, abs=1e-12)
        quadratic = eta * g @ d - eta**2 / 2 * (S.dense() @ d).square().sum()
        assert row["predicted_fall"] == pytest.approx(float(quadratic), rel=1e-6, abs=1e-12)
    row = found.table.iloc[0]
    rates = found.steps["learning_rate"]
    assert rates.max() == pytest.approx(2 * row["eta_linear"])
    assert (rates.iloc[:-1].to_numpy() / rates.iloc[1:].to_numpy() == 2).all()
    one = found.steps.set_index("learning_rate").loc[row["eta"]]
    assert row["fall"] == one["second_fall"]
    assert row["ratio"] == pytest.approx(one["fall"] / one["predicted_fall"])


def test_the_largest_rates_are_those_up_to_which_the_loss_falls() -> None:
    """A rate at which the loss falls by chance, beyond one at which it rises, does not count."""
    losses = [(8.0, 0.5, 3.0), (4.0, 2.0, 3.0), (2.0, float("nan"), 0.5), (1.0, 0.8, 0.7), (0.5, 0.9, 0.8)]
    found = Trial(1.0, 1.0, tuple(RealStep(rate, batch, second, 0.1) for rate, batch, second in losses))
    assert found.eta_batch == 1.0
    assert found.eta_second == 2.0
    assert found.best(8.0).rate == 2.0
    assert found.best(1.0).rate == 1.0
    assert found.best(0.1) is None
    assert largest(lambda rate: rate < 3, [8.0, 4.0, 2.0, 1.0]) == 2.0
    assert largest(lambda rate: False, [8.0, 4.0]) == 0.0


def test_a_row_of_steps_ends_with_the_first_loss_above_its_beginning() -> None:
    """Gradient descent on a quadratic: stable below 2/λ, and with momentum 0.9 on (1 + β) times that."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    batch = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    landscape = Landscape(model, HalfSquaredError(), Pass())
    batches = two_batches([batch], landscape.loss, splits=True, wants_second=True)
    assert batches.second is None

    def gradient(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return landscape.slope(weights, batch).gradient

    first = gradient(landscape.here)
    for rate, momentum, entries in ((1.9, 0.0, 9), (2.1, 0.0, 2), (0.5, 0.9, 9), (2.1, 0.9, 2)):
        losses = repeated(landscape, batches, first, gradient, rate, 8, momentum)
        assert len(losses) == entries
        w, v, expected = 1.0, 0.0, [0.5]
        for _ in range(entries - 1):
            v = momentum * v + w
            w -= rate * v
            expected.append(w**2 / 2)
        assert losses == pytest.approx(expected)


def _convolutional(side: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 10),
    )  # fmt: skip


def _by_hand(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], damping: float, rate: float) -> list[float]:
    """Losses of steps in a row with exact K-FAC, fitted anew before each."""
    loss, (x, y) = nn.CrossEntropyLoss(), data
    losses = []
    for step in range(5):
        value = loss(model(x), y)
        losses.append(float(value.detach()))
        if step == 4 or not np.isfinite(losses[-1]):
            return losses
        names = [name for name, _ in model.named_parameters()]
        gradient = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
        kfac = KFAC().update(curvlab.sqrt_fisher(model, loss, x, y))
        with torch.no_grad():
            for name, d in kfac.solve(gradient, damping).items():
                model.get_parameter(name).sub_(rate * d)
    return losses


@pytest.mark.parametrize(
    ("images", "N", "damping", "share"), [("digits", 64, 3e-3, 0.9), ("fashion-mnist", 128, 6e-3, 0.5)]
)
def test_the_rate_of_the_linearised_model_diverges_in_four_steps_and_the_one_that_is_advised_does_not(
    images: str, N: int, damping: float, share: float
) -> None:
    """A share of the linear rate, whose first step does lower the loss, ends far above the beginning."""
    try:
        source = load_images(images)
    except DataUnavailable as error:
        pytest.skip(str(error))
    x = torch.from_numpy(standardised(source.train_images[:256], source.train_images[:256])).float()
    y = torch.from_numpy(source.train_labels[:256].copy()).long()
    data = [(x[:N], y[:N]), (x[N : 2 * N], y[N : 2 * N])]
    row = curvlab.compare(
        _convolutional(x.shape[-1]), nn.CrossEntropyLoss(), data, "kfac", damping, seconds=None
    ).best()
    linear = _by_hand(_convolutional(x.shape[-1]), data[0], damping, share * row["eta_linear"])
    assert linear[1] < linear[0]
    assert not linear[-1] < 2 * linear[0]
    for rate in (row["eta_repeated"], row["eta"]):
        advised = _by_hand(_convolutional(x.shape[-1]), data[0], damping, rate)
        assert advised[-1] < advised[0]
        assert max(advised) == advised[0]
    assert row["fall"] > 0


def test_rates_that_hold_for_steps_in_a_row_are_those_found_by_hand() -> None:
    """Four steps with the diagonal fitted anew, and ten with it left as it is, without momentum and with 0.9."""
    loss, y = LOSSES["cross-entropy"]
    torch.manual_seed(0)
    model, rho = nn.Linear(10, 3).double(), 1e-2
    row = curvlab.compare(model, loss, [(X, y), (X + 0.1, y)], "diagonal", rho, seconds=None).table.iloc[0]
    here = nn.utils.parameters_to_vector(model.parameters()).detach()

    def holds(rate: float, steps: int, beta: float = 0.0, *, refit: bool = False) -> bool:
        theta, v, diagonal, losses = here, torch.zeros_like(here), None, []
        for _ in range(steps + 1):
            nn.utils.vector_to_parameters(theta, model.parameters())
            value = loss(model(X), y)
            losses.append(float(value.detach()))
            g = torch.cat([p.flatten() for p in torch.autograd.grad(value, list(model.parameters()))])
            if diagonal is None or refit:
                diagonal = curvlab.sqrt_fisher(model, loss, X, y).dense().square().sum(0)
            v = beta * v + g / (diagonal + rho)
            theta = theta - rate * v
        return max(losses) == losses[0] and losses[-1] < losses[0]

    def first(top: float, *arguments: float, refit: bool = False) -> float:
        return next(top / 2**k for k in range(8) if holds(top / 2**k, *arguments, refit=refit))

    assert row["eta_repeated"] == first(row["eta_batch"], 4, refit=True)
    plain = first(row["eta_batch"], 10)
    assert row["momentum"] == first(2 * plain, 10, 0.9) / plain
