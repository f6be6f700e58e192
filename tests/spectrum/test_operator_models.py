"""Hessian and GGN of models whose parameters have several names, or whose layers torch differentiates wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.spectrum import GGN, Hessian
from curvlab.testing.oracle import assert_close, trainable


def finite_difference_hessian(model: nn.Module, loss: nn.Module, x: Any, y: Tensor, step: float = 1e-5) -> Tensor:
    """Differences of the gradient, central, parameter by parameter."""
    own, args = list(model.parameters()), x if isinstance(x, tuple) else (x,)

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(*args), y), own)])

    columns = []
    for entry in (p.data.view(-1)[i : i + 1] for p in own for i in range(p.numel())):
        entry += step
        above = gradient()
        entry -= 2 * step
        below = gradient()
        entry += step
        columns.append((above - below) / (2 * step))
    return torch.stack(columns, dim=1)


def squared_error_ggn(model: nn.Module, z: Tensor) -> Tensor:
    """`2 JᵀJ/n` of an `MSELoss` over n outputs, their gradients taken one by one."""
    own = list(model.parameters())
    rows = [torch.autograd.grad(output, own, retain_graph=True) for output in z.flatten()]
    J = torch.stack([torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in row]) for row in rows])
    return J.T @ J * (2 / z.numel())


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
    assert_close(GGN(model, loss, (x, y), batched=batched).to_dense(), squared_error_ggn(model, model(x)))


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


class Bagged(nn.Module):
    """A bag of embeddings, of rows `[N, 3]` or, with offsets, of the same indices in one axis, the second bag empty."""

    def __init__(self, *, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag, self.last, self.weighted = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, 2), weighted

    def forward(self, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        share = torch.linspace(0.5, 2, index.numel(), dtype=DOUBLE).view_as(index) if self.weighted else None
        return self.last(torch.tanh(self.bag(index, offsets, share)))


BAGS = [
    {"mode": "sum"},
    {"mode": "sum", "weighted": True, "padding_idx": 2},
    {"mode": "mean", "padding_idx": -1, "sparse": True},
    {"mode": "max", "padding_idx": 1},
    {"mode": "max"},
]


@pytest.mark.parametrize("offsets", [None, (0, 3, 3, 4), (0, 3, 3, 4, 13)])
@pytest.mark.parametrize("options", BAGS)
def test_bags_of_embeddings_have_all_derivatives(options: dict[str, Any], offsets: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    ends = offsets is not None and offsets[-1] == 13
    model, index = Bagged(**options, include_last_offset=ends).double(), torch.randint(7, (5, 3))
    args = (index,) if offsets is None else (index.flatten()[:13], torch.tensor(offsets))
    loss, z = nn.MSELoss(), model(*args)
    y = torch.randn_like(z)
    assert_close(called_with(model, {}, args).detach(), z.detach(), 1e-14)
    expected = squared_error_ggn(model, z)
    for batched in (True, False):
        assert_close(GGN(model, loss, (args, y), batched=batched).to_dense(), expected)
    product = Hessian(model, loss, (args, y)).to_dense()
    model.bag.sparse = False
    assert_close(product, finite_difference_hessian(model, loss, args, y), 1e-7)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_tables_whose_gradients_are_no_derivative_are_refused(kind: Any, table: Any, option: dict[str, Any]) -> None:
    model = nn.Sequential(table(7, 4, **option), nn.Flatten(), nn.LazyLinear(2)).double()
    index = torch.randint(7, (5, 3))
    y = model(index).detach()
    with pytest.raises(UnsupportedModel, match=rf"{table.__name__} '0' uses {next(iter(option))}.*Build it without"):
        kind(model, nn.MSELoss(), (index, y))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_functions_that_can_be_differentiated_once_only_are_named(kind: Any, batched: bool) -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 2)

        def forward(self, index: Tensor) -> Tensor:
            return self.last(nn.functional.embedding_bag(index, self.table))

    with pytest.raises(
        UnsupportedModel, match=r"once only.*embedding_bag_backward.*Write that function in plain torch"
    ):
        kind(Once().double(), nn.MSELoss(), (torch.randint(7, (5, 3)), vectors(2)(5)), batched=batched).to_dense()


class _Cube(torch.autograd.Function):
    """x³/3, with its own derivative and a second one that is given: `second(c, g, x)` in place of `2 c g x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, second: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.second = second
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _Slope.apply(g, x, ctx.second), None


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, second: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.second = second
        return g * x**2

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor, None]:
        g, x = ctx.saved_tensors
        return c * x**2, ctx.second(c, g, x), None


class Cubed(nn.Module):
    """Two layers with a cube between them, whose second derivative is given."""

    def __init__(self, second: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.second = nn.Linear(3, 4), nn.Linear(4, 2), second

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Cube.apply(self.first(x), self.second))


def test_a_hessian_that_is_not_symmetric_is_refused() -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match=r"Hessian are not symmetric.*Use GGN"):
        Hessian(Cubed(lambda c, g, x: 2 * c.roll(1, -1) * g * x).double(), nn.MSELoss(), (x, y))


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


def test_a_symmetric_hessian_that_is_certainly_wrong_is_refused() -> None:
    """Three times the second derivative."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = Cubed(lambda c, g, x: 6 * c * g * x).double()
        x, y = torch.randn(5, 3, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
        with pytest.raises(UnsupportedModel, match=r"away from the change of the gradient.*differences agree.*Use GGN"):
            Hessian(model, nn.MSELoss(), (x, y))
        assert_close(GGN(model, nn.MSELoss(), (x, y)).to_dense(), squared_error_ggn(model, model(x)))


def without_bias(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 9, bias=False), activation, nn.Linear(9, 9, bias=False), activation, nn.Linear(9, 2)
    )


def from_zero(activation: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 9), activation, nn.Linear(9, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def pooled(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 30), activation, nn.MaxPool1d(3), nn.Linear(10, 2))


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.5), nn.Hardtanh(), nn.ReLU6(), nn.Hardswish(), Absolute()]
)
@pytest.mark.parametrize("build", [without_bias, from_zero, pooled])
def test_hessians_of_networks_with_kinks_are_not_refused(
    build: Callable[..., nn.Module], activation: nn.Module
) -> None:
    """Also where the kink is at the parameters themselves: inputs, weights and biases of zero."""
    loss = nn.MSELoss()
    for seed in range(4):
        torch.manual_seed(seed)
        model, x, y = build(activation).double(), torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)
        x[: 2 * (seed % 2)] = 0
        Hessian(model, loss, (x, y))
        Hessian(model, loss, (x, model(x).detach()))
