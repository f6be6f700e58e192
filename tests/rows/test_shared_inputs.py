"""Inputs that all samples share: a grid, a table of positions, a time."""

from typing import Any

import pytest
import torch
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn

from curvlab import jacobian, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.optim import Preconditioner
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close, dense_jacobian

SAMPLES = 4


class OnGrid(nn.Module):
    """A bare parameter, and a layer on a grid that has no sample axis, maybe a time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.place = nn.Parameter(torch.randn(3)), nn.Linear(2, 3)
        self.last = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor, grid: Tensor, time: Tensor | float = 1.0) -> Tensor:
        h = (x * self.scale * time)[:, None] + self.place(grid)
        return self.last(torch.tanh(h).mean(1))


def made(points: int) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    x, grid = torch.randn(SAMPLES, 3, dtype=DOUBLE), torch.randn(points, 2, dtype=DOUBLE)
    return OnGrid().to(DOUBLE), (x, grid, torch.tensor(0.7, dtype=DOUBLE))


@pytest.mark.parametrize("points", [SAMPLES - 1, SAMPLES, SAMPLES + 1])
def test_rows_of_samples_that_share_inputs(points: int) -> None:
    model, args = made(points)
    rows = jacobian(model, args)
    assert_close(rows.dense(), dense_jacobian(model, args))
    assert {layer.name: type(layer) for layer in rows.layers}["place"] is KroneckerRows
    named = dict(zip(("x", "grid", "time"), args, strict=True))
    assert_close(jacobian(model, named).dense(), rows.dense())


@pytest.mark.parametrize("points", [SAMPLES - 1, SAMPLES])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_preconditioners_of_samples_that_share_inputs(points: int, kind: Any) -> None:
    model, args = made(points)
    loss, targets = nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0])
    preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=0.1, kl_clip=None)
    with preconditioner.collect():
        loss(model(*args), targets).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    preconditioner.precondition()
    S = sqrt_fisher(model, loss, args, targets, kind).dense()
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient)
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-8)


def test_models_that_torch_func_cannot_vectorise_share_inputs() -> None:
    class Branching(OnGrid):
        def forward(self, x: Tensor, grid: Tensor, time: Tensor | float = 1.0) -> Tensor:
            assert bool(x.isfinite().all())
            return super().forward(x, grid, time)

    model, args = made(SAMPLES)
    branching = Branching().to(DOUBLE)
    branching.load_state_dict(model.state_dict())
    assert_close(jacobian(branching, args).dense(), dense_jacobian(model, args))


def test_samples_that_interact_are_still_refused() -> None:
    class Mixed(OnGrid):
        def forward(self, x: Tensor, grid: Tensor, time: Tensor | float = 1.0) -> Tensor:
            return super().forward(x, grid, time) - super().forward(x, grid, time).mean(0)

    with pytest.raises(UnsupportedModel, match=r"gradient of scale.*samples interact"):
        jacobian(Mixed().to(DOUBLE), made(SAMPLES)[1])
