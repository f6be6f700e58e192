"""Rows from a user's own forward and backward pass against those of a sweep of curvlab's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import LAYERS
from oracle import ARCHITECTURES, DOUBLE, LOSSES, Architecture, LossCase, loss_case
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import StateError, UnsupportedModel
from curvlab.rows import sqrt_fisher
from curvlab.rows.collect import Collector
from curvlab.rows.guard import Checks
from curvlab.rows.owners import owners_of
from curvlab.rows.passes import Pass
from curvlab.rows.samples import Nodes
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs, unpack

PLAIN = [a for a in ARCHITECTURES if a.output is None and a.name != "one-output"]


def draw(kind: str, seed: int = 0, draws: int = 1) -> Pass:
    mc = kind == "mc"
    return Pass(kind, draws if mc else 1, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def collect(
    model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor, how: Pass | None, factor: float = 1.0
) -> Collector:
    args, kwargs = unpack(inputs)
    model.zero_grad()
    with Collector(model, loss, owners_of(model), how) as found:
        (factor * loss(model(*args, **kwargs), targets)).backward()
    return found


def gradient(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def check(case: Architecture, losses: LossCase, kind: str, reduction: str) -> None:
    model, inputs = case.make(4, 0)
    loss, targets = losses.make(outputs(model, inputs), reduction)
    found = collect(model, loss, inputs, targets, draw(kind), 3.0)
    generator = torch.Generator().manual_seed(0) if kind == "mc" else None
    rows = found.rows
    assert rows is not None
    S, g = rows.dense(), rows.space.flatten(gradient(model))
    expected = sqrt_fisher(model, loss, inputs, targets, kind, generator=generator)  # type: ignore[arg-type]
    assert_close(S, expected.dense())
    for what in ("kind", "count", "terms", "reduction", "per"):
        assert getattr(rows, what) == getattr(expected, what)
        assert_close(rows.sample_weights, expected.sample_weights)
    if found.coefficients is not None:
        assert_close(found.coefficients @ S, g, 1e-9)
    summed: dict[str, Tensor] = {}
    for mine in rows.layers:
        layer = found.per_sample_gradient(mine.layout.names[0])
        if layer is not None:
            assert layer.shares_inputs(mine)
            summed |= layer.layout.split(layer.total())
            product = mine.dense() @ layer.total()
            assert_close(mine.times_total(layer), product, 1e-9)
            c = torch.randn(mine.count, dtype=DOUBLE)
            assert_close(layer.minus(mine, c).total(), layer.total() - mine.dense().T @ c, 1e-9)
    for name, value in summed.items():
        assert_close(value, gradient(model)[name], 1e-9)


@pytest.mark.parametrize("kind", ["exact", "ggn", "empirical", "mc"])
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_rows_of_every_architecture(case: Architecture, kind: str) -> None:
    check(case, loss_case("half"), kind, "mean")


@pytest.mark.parametrize("case", [a for a in LAYERS if a.output is None], ids=lambda case: case.name)
def test_rows_of_every_layer(case: Architecture) -> None:
    check(case, loss_case("half"), "exact", "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
@pytest.mark.parametrize("losses", LOSSES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["mlp", "conv2d-grid"])
def test_rows_of_every_loss(name: str, losses: LossCase, kind: str, reduction: str) -> None:
    check(next(a for a in ARCHITECTURES if a.name == name), losses, kind, reduction)


def test_coefficients_are_there_wherever_the_kind_determines_them() -> None:
    model, inputs = network(), torch.randn(5, 4, dtype=DOUBLE)
    targets = torch.randint(3, (5,))
    for kind, known in [("exact", True), ("empirical", True), ("mc", False)]:
        found = collect(model, nn.CrossEntropyLoss(), inputs, targets, draw(kind))
        assert (found.coefficients is not None) == known


def test_positions_of_a_sample_share_a_sampled_row() -> None:
    """Its second moment is the Fisher matrix: draws of different positions are independent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2)).double()
    inputs, targets = torch.randn(2, 2, 5, dtype=DOUBLE), torch.randint(2, (2, 3))
    loss = nn.CrossEntropyLoss()
    z = outputs(model, inputs)
    F_exact = dense_ggn(dense_jacobian(model, inputs), loss, z, targets)
    found = collect(model, loss, inputs, targets, draw("mc", draws=20_000))
    assert found.rows is not None
    assert found.rows.shape == (20_000, 2)
    S = found.rows.dense()
    error = (S.T @ S - F_exact).norm() / F_exact.norm()
    assert error < 5 / 20_000**0.5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def test_the_model_and_the_loss_are_left_as_they_were() -> None:
    model, loss, inputs = network(), nn.CrossEntropyLoss(), torch.randn(5, 4, dtype=DOUBLE)
    targets = torch.randint(3, (5,))
    expected = torch.autograd.grad(loss(model(inputs), targets), list(model.parameters()))
    collect(model, loss, inputs, targets, draw("exact"))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert_close(p.grad, g)
    for module in [*model.modules(), loss]:
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    with pytest.raises(ZeroDivisionError), Collector(model, loss, owners_of(model), None):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks for module in [*model.modules(), loss])


def test_inplace_activations_and_evaluations_in_between_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    loss, inputs, targets = nn.CrossEntropyLoss(), torch.randn(5, 4, dtype=DOUBLE), torch.randint(3, (5,))
    with Collector(model, loss, owners_of(model), draw("empirical")) as found:
        with torch.no_grad():
            loss(model(torch.randn(9, 4, dtype=DOUBLE)), torch.randint(3, (9,)))
        loss(model(inputs), targets).backward()
    assert found.rows is not None
    assert_close(found.rows.dense(), sqrt_fisher(model, loss, inputs, targets, "empirical").dense())


def test_autocast_gives_rows_in_the_type_of_the_parameters() -> None:
    model = network().float()
    loss, inputs, targets = nn.CrossEntropyLoss(), torch.randn(64, 4), torch.randint(3, (64,))
    with Collector(model, loss, owners_of(model), draw("empirical")) as found:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model(inputs), targets)
        (1024 * value).backward()
    expected = sqrt_fisher(model, loss, inputs, targets, "empirical").dense()
    assert found.rows is not None
    assert found.rows.dtype == torch.float32
    assert float((found.rows.dense() - expected).norm() / expected.norm()) < 2e-2


def test_batch_normalisation_in_training_uses_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    loss, inputs, targets = nn.CrossEntropyLoss(), torch.randn(9, 4, dtype=DOUBLE), torch.randint(3, (9,))
    with Collector(model, loss, owners_of(model, fixed=False), draw("empirical"), coupled=["1"]) as found:
        loss(model(inputs), targets).backward()
    assert found.rows is not None
    assert found.coefficients is not None
    flatten = found.rows.space.flatten
    assert_close(flatten(found.rows.rmatvec(found.coefficients)), flatten(gradient(model)))


def no_loss(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def no_backward(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    loss(model(x), y)


def two_forwards(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    loss(model(x) + model(x), y).backward()


def two_losses(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    z = model(x)
    (loss(z, y) + loss(z, y)).backward()


def no_model(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    loss(torch.randn(5, 3), y)


def another_term(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    z = model(x)
    (loss(z, y) + z.square().sum()).backward()


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (no_loss, StateError, "call the CrossEntropyLoss that was given"),
        (no_backward, StateError, r"call backward\(\) within"),
        (two_forwards, StateError, "ran twice in one collecting context"),
        (two_losses, StateError, "called twice"),
        (no_model, StateError, "before the model"),
        (another_term, ValueError, "not a multiple of that of the loss"),
    ],
)
def test_what_goes_wrong_is_named(run: Callable[..., None], error: type[Exception], message: str) -> None:
    model, loss = network(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 4, dtype=DOUBLE), torch.randint(3, (5,))
    with pytest.raises(error, match=message), Collector(model, loss, owners_of(model), draw("empirical")):
        run(model, loss, x, y)


class Interacting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z - z.mean(0)


def test_rows_that_do_not_add_up_are_refused() -> None:
    model, loss, inputs = Interacting().double(), nn.CrossEntropyLoss(), torch.randn(5, 4, dtype=DOUBLE)
    with pytest.raises(UnsupportedModel, match=r"do not reproduce the gradient of layer\.weight"):
        collect(model, loss, inputs, torch.randint(3, (5,)), draw("exact"))


def test_targets_of_another_shape_than_the_loss_takes_are_refused() -> None:
    model, loss = network(), nn.MSELoss()
    with pytest.raises(ValueError, match="needs targets of the output's shape"):
        collect(model, loss, torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 1, dtype=DOUBLE), draw("exact"))


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_nodes_of_a_graph(kind: str) -> None:
    from torch_geometric.nn import GCN

    torch.manual_seed(0)
    model, loss = GCN(4, 6, 2, 3).double(), nn.CrossEntropyLoss()
    x, edges, nodes = torch.randn(8, 4, dtype=DOUBLE), torch.randint(8, (2, 20)), torch.tensor([1, 4, 6])
    targets = torch.randint(3, (3,))
    with Collector(model, loss, owners_of(model), draw(kind, draws=5), samples=Nodes(None)) as found:
        loss(model(x, edges)[nodes], targets).backward()
    rows = found.rows
    assert rows is not None
    assert rows.shape == ({"exact": 9, "empirical": 3, "mc": 5}[kind], 1)
    if kind == "mc":
        return
    expected = sqrt_fisher(model, loss, (x, edges), targets, kind, nodes=nodes)  # type: ignore[arg-type]
    assert_close(rows.dense(), expected.dense(), 1e-9)
    assert found.coefficients is not None
    assert_close(found.coefficients @ rows.dense(), rows.space.flatten(gradient(model)), 1e-9)


def test_numbers_do_not_depend_on_whether_a_pass_is_checked() -> None:
    model, inputs = PLAIN[0].make(4, 0)
    loss, targets = loss_case("ce").make(outputs(model, inputs), "mean")
    args, kwargs = unpack(inputs)
    found, checks = [], Checks()
    for _ in range(2):
        with Collector(model, loss, owners_of(model), draw("empirical"), checks=checks) as collector:
            loss(model(*args, **kwargs), targets).backward()
        assert collector.rows is not None
        found.append(collector.rows.dense())
    assert torch.equal(*found)


def test_an_empty_batch_is_named() -> None:
    model, loss = nn.Linear(3, 2), nn.MSELoss(reduction="sum")
    with (
        pytest.raises(ValueError, match="hold zero samples"),
        Collector(model, loss, owners_of(model), draw("exact")),
    ):
        loss(model(torch.randn(0, 3)), torch.randn(0, 2)).backward()
