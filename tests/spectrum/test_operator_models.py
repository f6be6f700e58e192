"""Hessian and GGN of models whose parameters have several names, or whose layers torch differentiates wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE, assert_close, trainable, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from curvlab.errors import UnsupportedModel
from curvlab.spectrum import GGN, Hessian


def finite_difference_hessian(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, step: float = 1e-5) -> Tensor:
    """Differences of the gradient, central, parameter by parameter."""
    own = list(model.parameters())

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), own)])

    columns = []
    for entry in (p.data.view(-1)[i : i + 1] for p in own for i in range(p.numel())):
        entry += step
        above = gradient()
        entry -= 2 * step
        below = gradient()
        entry += step
        columns.append((above - below) / (2 * step))
    return torch.stack(columns, dim=1)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.body = nn.Sequential(self.fc, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_under_two_names(kind: type[Hessian | GGN], batched: bool) -> None:
    model, loss = Aliased().double(), nn.MSELoss()
    x, y = vectors(3)(5), vectors(2)(5)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    plain[0].load_state_dict(model.fc.state_dict())
    parameters = dict(model.named_parameters())
    dense = kind(model, loss, (x, y), batched=batched).to_dense()
    assert_close(dense, kind(plain, loss, (x, y)).to_dense())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model.fc._parameters["weight"] is parameters["fc.weight"]
    assert list(trainable(model)) == ["fc.weight", "fc.bias"]


def old(layer: nn.Module, dim: int | None) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return weight_norm(layer, dim=dim)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old])
def test_weight_normed_layers(norm: Callable[..., nn.Module], dim: int | None, batched: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(3, 4), dim=dim), nn.Tanh(), norm(nn.Linear(4, 2), dim=0)).double()
    loss, x, y = nn.MSELoss(), vectors(3)(6), vectors(2)(6)
    expected = finite_difference_hessian(model, loss, x, y)
    assert_close(Hessian(model, loss, (x, y), batched=batched).to_dense(), expected, 1e-7)
    own = list(model.parameters())
    rows = [torch.autograd.grad(z, own, retain_graph=True) for z in model(x).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert_close(GGN(model, loss, (x, y), batched=batched).to_dense(), J.T @ J * (2 / y.numel()))


def test_torchs_own_second_derivative_of_the_fused_weight_norm_is_wrong() -> None:
    """So it is in torch 2.13."""
    v = torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=DOUBLE)
    g = torch.tensor([[1.5], [0.7]], dtype=DOUBLE)

    def value(flat: Tensor) -> Tensor:
        return torch._weight_norm(flat.view_as(v), g, 0).sin().sum()

    found = torch.autograd.functional.hessian(value, v.flatten())
    expected = torch.autograd.functional.hessian(
        lambda flat: (g * flat.view_as(v) / flat.view_as(v).square().sum(1, keepdim=True).sqrt()).sin().sum(),
        v.flatten(),
    )
    assert not torch.allclose(found, expected), (
        "torch differentiates its fused weight norm twice and right: remove curvlab/nn/weight_norm.py and this test."
    )


class _Bent(torch.autograd.Function):
    """x³/3, with a second derivative of another function: unsymmetric, or merely wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Slope.apply(g, x)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return g * x**2

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return c * x**2, c.roll(1, -1) * g * x * Bent.factor


class Bent(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Bent.apply(self.first(x)))


def test_a_hessian_that_is_not_symmetric_is_refused() -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match=r"Hessian are not symmetric.*Use GGN"):
        Hessian(Bent().double(), nn.MSELoss(), (x, y))


def test_a_hessian_that_is_not_the_slope_of_the_gradient_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h * torch.sigmoid(3 * h).detach())

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    Hessian(Stopped().double(), nn.MSELoss(), (x, y))
    assert "not the change of the gradient" in caplog.text
    caplog.clear()
    for activation in (nn.ReLU(), nn.Tanh(), nn.GELU()):
        model = nn.Sequential(nn.Linear(3, 30), activation, nn.Linear(30, 30), activation, nn.Linear(30, 2)).double()
        Hessian(model, nn.MSELoss(), (x, y))
    assert "not the change" not in caplog.text
