"""The preconditioner's direction against the structure's own solve, whichever route it takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from preconditioner_cases import RHO, data, network, now, options, reference, run
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC, STRUCTURES, make
from curvlab.fisher.block import Block
from curvlab.fisher.kronecker import KroneckerBlock
from curvlab.fisher.row_block import RowBlock
from curvlab.optim import Preconditioner
from curvlab.rows.loss import Kind
from curvlab.testing.oracle import assert_close


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("key", STRUCTURES)
def test_the_direction_is_the_solve_of_a_structure_fitted_to_the_batch(key: str, kind: str) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, make(key, **options(key)), kind=kind, damping=RHO, kl_clip=None, seed=3)  # type: ignore[arg-type]
    gradient = run(pre, x, y)
    pre.precondition()
    generator = torch.Generator().manual_seed(3) if kind == "mc" else None
    rows = sqrt_fisher(model, loss, x, y, kind, generator=generator)  # type: ignore[arg-type]
    fitted = make(key, **options(key)).update(rows)
    assert_close(now(pre), reference(fitted, gradient), 1e-8)


def spy(monkeypatch: pytest.MonkeyPatch, kind: type[Block]) -> list[str]:
    """Record which blocks solve with per-sample gradients."""
    solved: list[str] = []
    original = kind.solve_sum

    def solve_sum(self: Any, *arguments: Any) -> dict[str, Tensor]:
        solved.append(self.name)
        result: dict[str, Tensor] = original(self, *arguments)
        return result

    monkeypatch.setattr(kind, "solve_sum", solve_sum)
    return solved


@pytest.mark.parametrize("batch", [2, 200])
def test_kfac_multiplies_factors_or_gradients_whichever_is_less_work(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = spy(monkeypatch, KroneckerBlock)
    structure = KFAC(factored_damping=True)
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), structure, damping=RHO, kl_clip=None)
    gradient = run(pre, *data(batch))
    pre.precondition()
    assert solved == (["0", "2", "4"] if batch == 2 else [])
    assert_close(now(pre), reference(structure, gradient), 1e-10)


@pytest.mark.parametrize("key", ["full", "block-diagonal"])
def test_rows_that_share_their_inputs_with_the_gradient_solve_without_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = spy(monkeypatch, RowBlock)
    structure = make(key, side="rows")
    pre = Preconditioner(network(), nn.CrossEntropyLoss(), structure, kind="mc", damping=RHO, kl_clip=None)
    gradient = run(pre, *data())
    pre.precondition()
    assert len(solved) == len(structure._blocks)
    assert_close(now(pre), reference(structure, gradient), 1e-10)


def test_the_loss_may_be_called_by_keywords() -> None:
    pre, expected = (
        Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO, kl_clip=None) for _ in range(2)
    )
    x, y = data()
    with pre.collect():
        pre.loss(target=y, input=pre.model(x)).backward()
    run(expected, x, y)
    pre.precondition()
    expected.precondition()
    assert torch.equal(now(pre), now(expected))


@pytest.mark.parametrize("given", ["plain", "compiled"])
def test_a_compiled_model_is_seen_through(given: str) -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    x, y = data()
    compiled(x)
    pre = Preconditioner(
        model if given == "plain" else compiled, nn.CrossEntropyLoss(), kind="exact", damping=RHO, kl_clip=None
    )  # type: ignore[arg-type]
    expected = Preconditioner(network(), nn.CrossEntropyLoss(), kind="exact", damping=RHO, kl_clip=None)
    with pre.collect():
        pre.loss(compiled(x), y).backward()
    run(expected, x, y)
    pre.precondition()
    expected.precondition()
    assert_close(now(pre), now(expected), 1e-12)


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [(torch.optim.SGD, 0.3), (torch.optim.Adam, 0.02), (torch.optim.AdamW, 0.02), (torch.optim.RMSprop, 0.02)],
)
def test_it_composes_with_any_optimiser(optimizer: Callable[..., torch.optim.Optimizer], lr: float) -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data(30)
    pre = Preconditioner(model, loss, KFAC(factored_damping=True), damping=RHO, kl_clip=None)
    stepper = optimizer(model.parameters(), lr=lr)
    before = float(loss(model(x), y).detach())
    for _ in range(15):
        run(pre, x, y)
        pre.precondition()
        stepper.step()
    assert float(loss(model(x), y).detach()) < 0.9 * before


def test_modules_and_parameters_can_keep_their_plain_gradient() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), data()
    pre = Preconditioner(model, loss, "kfac", kind="exact", damping=RHO, plain=("2", "4.bias"), kl_clip=None)
    assert set(pre.parameters) == {"0.weight", "0.bias", "4.weight"}
    run(pre, x, y)
    untouched = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pre.precondition()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, untouched[name]) == (name in ("2.weight", "2.bias", "4.bias"))
    with pytest.raises(ValueError, match=r"'4\.bia'.*4\.bias"):
        Preconditioner(model, loss, plain=("4.bia",), kl_clip=None)
    with pytest.raises(UnsupportedModel, match="nothing to precondition"):
        Preconditioner(model, loss, plain=("0", "2", "4"), kl_clip=None)


def test_frozen_parameters_have_no_part() -> None:
    model, (x, y) = network(), data()
    model[0].weight.requires_grad_(False)
    pre = Preconditioner(model, nn.CrossEntropyLoss(), "kfac", kind="exact", damping=RHO, kl_clip=None)
    gradient = run(pre, x, y)
    pre.precondition()
    assert "0.weight" not in gradient
    assert model[0].weight.grad is None
    assert_close(now(pre), reference(pre.structure, gradient), 1e-9)


@pytest.mark.parametrize("key", STRUCTURES)
@pytest.mark.parametrize("kind", ["mc", "empirical", "exact"])
def test_a_batch_of_one(key: str, kind: str) -> None:
    pre = Preconditioner(
        network(), nn.CrossEntropyLoss(), make(key, **options(key)), kind=kind, damping=RHO, kl_clip=None
    )  # type: ignore[arg-type]
    gradient = run(pre, *data(1))
    pre.precondition()
    assert_close(now(pre), reference(pre.structure, gradient), 1e-7)


def test_hyper_parameters_may_follow_the_step() -> None:
    pre = Preconditioner(
        network(), nn.CrossEntropyLoss(), "kfac", kind="exact", damping=lambda t: RHO * (t + 1), kl_clip=None
    )
    for step in range(3):
        gradient = run(pre, *data())
        pre.precondition()
        assert_close(now(pre), reference(pre.structure, gradient, RHO * (step + 1)), 1e-9)
    falling = Preconditioner(network(), nn.CrossEntropyLoss(), damping=lambda t: 1.0 - t, kl_clip=None)
    for _ in range(2):
        run(falling, *data())
        falling.precondition()
    run(falling, *data())
    with pytest.raises(ValueError, match=r"damping is a number.*got -1\.0 at step 2"):
        falling.precondition()


class Cast(nn.Module):
    """Layers in types of their own."""

    def __init__(self, types: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.layers, self.types = network(), types
        for layer, dtype in zip(self.layers[::2], types, strict=True):
            layer.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer, dtype in zip(self.layers[::2], self.types, strict=True):
            x = layer(x.to(dtype)).tanh()
        return x


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("types", [(HALF,) * 3, (HALF, SINGLE, HALF), (SINGLE, DOUBLE, SINGLE)], ids=str)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("key", STRUCTURES)
def test_curvature_of_half_and_mixed_precision_is_in_float32_or_wider(
    key: str, kind: Kind, types: tuple[torch.dtype, ...]
) -> None:
    model, exact = Cast(types), Cast((DOUBLE,) * 3)
    exact.load_state_dict(model.state_dict())
    loss, (x, y) = nn.CrossEntropyLoss(), data(12)
    x = x.bfloat16().double()
    found = []
    for one in (model, exact):
        pre = Preconditioner(one, loss, make(key, **options(key)), kind=kind, damping=0.5, kl_clip=None)
        for _ in range(2):
            run(pre, x, y)
            pre.precondition()
        found.append(now(pre).double())
        assert pre.structure.dtype == max((SINGLE, *types), key=lambda t: t.itemsize) or one is exact
    assert [p.grad.dtype for p in model.layers[::2].parameters() if p.grad is not None] == [
        t for t in types for _ in "wb"
    ]
    eps = max(torch.finfo(dtype).eps for dtype in types)
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 8 * eps


@pytest.mark.parametrize("key", ["kfac", "full", "diagonal"])
def test_nodes_of_a_graph_are_one_sample(key: str) -> None:
    from torch_geometric.nn import GCN

    torch.manual_seed(0)
    model, loss = GCN(4, 6, 2, 3).double(), nn.CrossEntropyLoss()
    x, edges, nodes = torch.randn(8, 4, dtype=DOUBLE), torch.randint(8, (2, 20)), torch.tensor([1, 4, 6])
    targets = torch.randint(3, (3,))
    pre = Preconditioner(model, loss, key, kind="exact", damping=RHO, graph=True, kl_clip=None)
    with pre.collect():
        loss(model(x, edges)[nodes], targets).backward()
    gradient = {name: p.grad.clone() for name, p in pre.parameters.items() if p.grad is not None}
    pre.precondition()
    fitted = make(key).update(sqrt_fisher(model, loss, (x, edges), targets, nodes=nodes))
    assert_close(now(pre), reference(fitted, gradient), 1e-8)
