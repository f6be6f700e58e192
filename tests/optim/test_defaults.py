"""`NaturalGradient(model, loss)` and `Preconditioner(model, loss)` train as they are, whatever a loss is multiplied by."""

import logging
import os
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from math import log

import pytest
import torch
from optimiser_cases import data, flat, network, take
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.nn import HalfSquaredError, Scaled
from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner
from curvlab.problems import resolve

needs_images = pytest.mark.skipif(
    not os.environ.get("CURVLAB_DATA"), reason="CURVLAB_DATA does not name a folder with the images"
)


def zero_head(classes: int) -> nn.Module:
    """A network whose output layer starts at 0, of pixels between 0 and 255."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, classes))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


def digits() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    problem = resolve("digits-mlp", seed=3).to(dtype=torch.float32)
    return problem.model, problem.loss, *problem.train


def regression() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Targets of size 1000, one a sample."""
    _, _, x, _ = digits()
    torch.manual_seed(0)
    x = x.flatten(1)
    w = torch.randn(x.shape[1], 1)
    return nn.Sequential(nn.Linear(len(w), 64), nn.Tanh(), nn.Linear(64, 1)), nn.MSELoss(), x, 1000 * (x @ w / 4).sin()


def residual() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    problem = resolve("digits-residual", seed=3).to(dtype=torch.float32)
    return problem.model, problem.loss, *problem.train


def raw_images() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    images, labels = resolve("fashion-lenet").to(dtype=torch.float32).train
    return zero_head(10), nn.CrossEntropyLoss(), 255 * (images - images.min()) / (images.max() - images.min()), labels


def lenet() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    problem = resolve("fashion-lenet", seed=3).to(dtype=torch.float32)
    return problem.model, problem.loss, *problem.train


CASES = [
    pytest.param(digits, 60, 0.05, id="digits"),
    pytest.param(regression, 60, 0.2, id="large-targets"),
    pytest.param(residual, 25, 0.3, id="batch-normalisation"),
    pytest.param(raw_images, 60, 0.4, id="raw-pixels", marks=needs_images),
    pytest.param(lenet, 40, 0.4, id="lenet", marks=needs_images),
]
"""What is trained, steps, and the share of the loss before that may be left."""


def batches(x: Tensor, y: Tensor, steps: int, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(1 + steps * size // len(x))])
    return [(x[part], y[part]) for part in order.split(size)[:steps]]


def left(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, train: Callable[[], None]) -> float:
    """Return the share of the loss, on 1000 samples, that training leaves."""

    def value() -> float:
        model.eval()
        with torch.no_grad():
            found = float(loss(model(x[:1000]), y[:1000]))
        model.train()
        return found

    before = value()
    train()
    return value() / before


@pytest.mark.parametrize(("make", "steps", "bound"), CASES)
def test_natural_gradient_trains_without_a_further_argument(
    make: Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]], steps: int, bound: float
) -> None:
    model, loss, x, y = make()
    optimizer = NaturalGradient(model, loss)

    def train() -> None:
        for images, labels in batches(x, y, steps):
            take(optimizer, images, labels)

    assert left(model, loss, x, y, train) < bound


@pytest.mark.parametrize(("make", "steps", "bound"), [CASES[0], CASES[2], CASES[4]])
def test_a_preconditioner_trains_without_a_further_argument(
    make: Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]], steps: int, bound: float
) -> None:
    model, loss, x, y = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    natural = Preconditioner(model, loss)

    def train() -> None:
        for images, labels in batches(x, y, steps):
            sgd.zero_grad()
            with natural.collect():
                loss(model(images), labels).backward()
            natural.precondition()
            sgd.step()

    assert left(model, loss, x, y, train) < 2 * bound


PROBLEMS = {
    "digits-mlp": 0.1,
    "digits-residual": 0.3,
    "karate-gcn": 0.1,
    "cora-gcn": 0.5,
    "fashion-mlp": 0.25,
    "fashion-lenet": 0.3,
    "cifar10-5k-cnn": 0.7,
    "cifar10-5k-residual": 0.8,
    "characters": 0.8,
}
"""Training problems, and the share of the training loss before that 100 steps may leave."""


@pytest.mark.study
@needs_images
@pytest.mark.parametrize("before", [None, "sgd"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_training_problem_trains_without_a_further_argument(name: str, before: str | None) -> None:
    problem = resolve(name, seed=5).to(dtype=torch.float32)
    model, loss, (x, y) = problem.model, problem.loss, problem.train
    graph = name.endswith("gcn")
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    natural = Preconditioner(model, loss, graph=graph) if before else NaturalGradient(model, loss, graph=graph)

    def train() -> None:
        for inputs, targets in [(x, y)] * 100 if graph else batches(x, y, 100, 32 if name == "characters" else 128):
            if isinstance(natural, NaturalGradient):
                take(natural, inputs, targets)
                continue
            plain.zero_grad()
            with natural.collect():
                loss(model(inputs), targets).backward()
            natural.precondition()
            plain.step()

    assert left(model, loss, x, y, train) < PROBLEMS[name]


@pytest.mark.parametrize("target", ["classes", "values"])
def test_a_sum_and_a_multiple_take_the_same_steps_as_a_mean(target: str) -> None:
    """Damping and trust region follow the factor between them."""
    x, y = data()
    losses = nn.CrossEntropyLoss if target == "classes" else HalfSquaredError
    y = y if target == "classes" else torch.randn(len(x), 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    models = [network() for _ in range(3)]
    for model, loss in zip(models, (losses(), losses(reduction="sum"), Scaled(losses(), 7.0)), strict=True):
        optimizer = NaturalGradient(model, loss)
        for _ in range(12):
            take(optimizer, x, y)
    mean, *others = map(flat, models)
    assert not torch.allclose(mean, flat(network()))
    for other in others:
        torch.testing.assert_close(other, mean, rtol=1e-6, atol=1e-8)


def test_the_trust_region_is_in_units_of_squares_and_of_cross_entropies_below_a_nat() -> None:
    (x, labels), values = data(), 10 * torch.randn(12, 3, dtype=DOUBLE)
    for loss, y in ((nn.MSELoss(), values), (nn.CrossEntropyLoss(), labels)):
        model = network()
        optimizer = NaturalGradient(model, loss, damping=1e-6, kl_clip=1e-4)
        for _ in range(60 if y is labels else 2):
            before = loss(model(x), y).item()
            take(optimizer, x, y)
        seen = optimizer.log()
        assert seen["loss"] == pytest.approx(before, rel=1e-6)
        assert seen["clip"] < 1
        assert seen["kl"] == pytest.approx(1e-4 * (before if y is values else min(1.0, before)), rel=1e-5)
    assert before < 1


def test_the_log_is_what_the_step_did() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    optimizer = NaturalGradient(model, loss, structure="full", kind="exact", damping=LevenbergMarquardt(0.1, every=1))
    assert optimizer.log() == {}
    start, before = flat(model), loss(model(x), y).item()
    take(optimizer, x, y)
    seen = optimizer.log()
    gradient = torch.autograd.grad(before_loss := loss(model_at(model, start)(x), y), list(model_at.parameters))  # type: ignore[attr-defined]
    assert before_loss.item() == pytest.approx(before)
    assert seen["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in gradient]).norm()), rel=1e-6)
    assert seen["step_norm"] == pytest.approx(float((flat(model) - start).norm()), rel=1e-6)
    assert seen["decrease"] == pytest.approx(before - loss(model(x), y).item(), rel=1e-6)
    assert seen["damping"] == 0.1
    assert (seen["step"], seen["skipped"], seen["refreshed"], seen["lr"]) == (0, 0, 1, 1.0)
    assert seen["kl"] == pytest.approx(0.01 * min(1.0, before)) or seen["clip"] == 1
    assert seen["promised_decrease"] > 0
    assert seen["refresh_seconds"] > 0


def model_at(model: nn.Module, parameters: Tensor) -> nn.Module:
    """Return a copy at other parameters, which are remembered."""
    other = deepcopy(model)
    torch.nn.utils.vector_to_parameters(parameters, other.parameters())
    model_at.parameters = list(other.parameters())  # type: ignore[attr-defined]
    return other


def test_the_damping_follows_one_mask_of_dropout() -> None:
    """With a mask of its own, each evaluation would differ by more than the step changes, and the damping would rise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    optimizer = NaturalGradient(model, nn.CrossEntropyLoss(), damping=LevenbergMarquardt(0.1, every=1), kl_clip=1e-6)
    x, y = data()
    for _ in range(10):
        take(optimizer, x, y)
        seen = optimizer.log()
        assert seen["decrease"] == pytest.approx(seen["promised_decrease"], rel=0.05)
    state = torch.get_rng_state()
    assert optimizer.preconditioner.batch_loss is None
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_go_on_where_they_were() -> None:
    """Evaluations of the loss draw none that the training loop would draw."""
    ends = []
    for every in (1, 100):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
        optimizer = NaturalGradient(model, nn.CrossEntropyLoss(), damping=LevenbergMarquardt(0.1, every=every))
        for _ in range(3):
            take(optimizer, *data())
        ends.append(torch.rand(3))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize(("factor", "steps"), [(1e9, 3), (30.0, 40)])
def test_a_loss_that_explodes_stops_the_run(factor: float, steps: int) -> None:
    """At once, or later."""
    model, loss, (x, y) = linear_of_two_layers(), HalfSquaredError(), data()
    y = torch.randn(12, 3, dtype=DOUBLE)
    optimizer = NaturalGradient(model, loss, lr=factor, structure="diagonal", damping=1e-3, kl_clip=None)

    def train() -> None:
        for _ in range(steps):
            take(optimizer, x, y)

    with pytest.raises(
        FloatingPointError, match=r"exploded to .* in the first steps.*lower the learning rate or kl_clip"
    ):
        train()
    assert bool(flat(model).isfinite().all())


def linear_of_two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()


def test_what_has_been_heard_of_the_loss_is_restored() -> None:
    model, (x, y) = network(), data()
    optimizer = NaturalGradient(model, nn.CrossEntropyLoss())
    for _ in range(4):
        take(optimizer, x, y)
    other = NaturalGradient(deepcopy(model), nn.CrossEntropyLoss())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert other.preconditioner.heard.usual == optimizer.preconditioner.heard.usual > 0
    assert other.damping == optimizer.damping > 0


class Doubled(nn.Module):
    """Returns two outputs, of which a loop takes the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.inner(x)
        return z / 2, z / 2


def test_damping_stays_where_the_loss_has_no_quadratic_model(caplog: pytest.LogCaptureFixture) -> None:
    """Unless it was asked for; then that is an error."""
    x, y = data()

    def run(optimizer: NaturalGradient) -> list[float]:
        found = []
        for _ in range(12):
            optimizer.zero_grad()
            with optimizer.collect():
                value = optimizer.preconditioner.loss(sum(optimizer.preconditioner.model(x)), y)
                value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    with caplog.at_level(logging.INFO, "curvlab"):
        losses = run(NaturalGradient(Doubled(), nn.CrossEntropyLoss()))
    assert losses[-1] < 0.5 * losses[0] < log(3)
    assert sum("The damping stays" in message for message in caplog.messages) == 1
    with pytest.raises(Exception, match="something else than what the model returned"):
        run(NaturalGradient(Doubled(), nn.CrossEntropyLoss(), damping=LevenbergMarquardt()))


def test_the_loss_falls_in_every_step_of_a_whole_batch() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    optimizer = NaturalGradient(model, loss, kind="exact")
    seen = []
    for _ in range(30):
        seen.append(loss(model(x), y).item())
        take(optimizer, x, y)
    assert all(after < before for before, after in pairwise(seen))
