"""Normalisations of one sample whose gradients arrive in strided memory."""

from collections.abc import Callable

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import jacobian
from curvlab.testing.oracle import assert_close


class Strided(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.last = norm, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(x).permute(0, 2, 3, 1)).mean((1, 2)))


def strided_gradient() -> Tensor:
    return torch.randn(1, 4, 5, 3, dtype=DOUBLE).movedim(-1, 1)


def test_the_backward_pass_of_torch_itself_is_wrong() -> None:
    """So it is in torch 2.13: once this fails, `contiguous_gradients` can go."""
    torch.manual_seed(0)
    norm, x, g = nn.InstanceNorm2d(3, affine=True).to(DOUBLE), torch.randn(1, 3, 4, 5, dtype=DOUBLE), strided_gradient()
    (found,) = torch.autograd.grad(norm(x), norm.bias, g)
    assert float((found - g.sum((0, 2, 3))).norm()) > 0.01


@pytest.mark.parametrize("make", [lambda: nn.InstanceNorm2d(3, affine=True), lambda: nn.BatchNorm2d(3)])
def test_rows_of_one_sample(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Strided(make()).to(DOUBLE).eval(), torch.randn(1, 3, 4, 5, dtype=DOUBLE)
    rows, step = jacobian(model, x, engine="autograd"), 1e-5
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    columns = []
    for e in torch.eye(len(theta), dtype=DOUBLE) * step:
        ends = []
        for moved in (theta + e, theta - e):
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            ends.append(model(x).detach()[0])
        columns.append((ends[0] - ends[1]) / (2 * step))
    assert_close(rows.dense(), torch.stack(columns, dim=1), 1e-7)
