"""Calling a model with other tensors in place of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from curvlab.nn.functional import called_with
from curvlab.testing.oracle import assert_close


class Aliased(nn.Module):
    """A layer, a parameter and a buffer, each under two names, and another parameter beside them."""

    offset: Tensor

    def __init__(self, first: str = "fc", second: str = "body") -> None:
        super().__init__()
        layer = nn.Linear(3, 3)
        modules: dict[str, nn.Module] = {"fc": layer, "body": nn.Sequential(layer, nn.Tanh())}
        for name in (first, second):
            self.add_module(name, modules[name])
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 3))
        self.tied = nn.Linear(3, 3)
        self.tied.weight = layer.weight
        self.register_buffer("offset", torch.linspace(-1, 1, 3))
        self.register_buffer("again", self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.body(self.scale * x + self.offset))


def by_hand(values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The aliased model, written down."""
    named = {name.replace("body.0.", "fc."): value for name, value in values.items()}
    hidden = torch.tanh(F.linear(named["scale"] * x + named["offset"], named["fc.weight"], named["fc.bias"]))
    return F.linear(hidden, named["fc.weight"], named["tied.bias"])


def parametrised() -> nn.Module:
    first, last = parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 3))
    return nn.Sequential(first, nn.Tanh(), last).double().eval()


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "alias-first": lambda: Aliased().double(),
    "alias-last": lambda: Aliased("body", "fc").double(),
    "parametrised": parametrised,
    "old-weight-norm": old_weight_norm,
    "batch-norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval(),
    "recurrent": lambda: nn.LSTM(3, 3, batch_first=True).double(),
}


def own_state(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value.detach().clone() for name, value in named if value.is_floating_point()}


def objects(model: nn.Module) -> list[Any]:
    """Every entry of every dictionary of every module, by identity and in order."""
    found: list[Any] = []
    for module in model.modules():
        for holder in (vars(module), module._parameters, module._buffers, module._modules):
            found += [(key, id(value)) for key, value in holder.items()]
    return found


def first(z: Any) -> Tensor:
    return z[0] if isinstance(z, tuple) else z


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gets_back_the_very_same_objects(name: str, x: Tensor) -> None:
    model = MODELS[name]()
    expected = first(model(x)).detach()
    before, versions = objects(model), [t._version for t in (*model.parameters(), *model.buffers())]
    state = own_state(model)

    def output(values: dict[str, Tensor]) -> Tensor:
        return first(called_with(model, values, (x,)))

    assert_close(output(state), expected)
    assert objects(model) == before
    state = {name: value for name, value in state.items() if "running" not in name}
    _, change = jvp(output, (state,), (state,))
    z, pull = vjp(output, state)
    pulled = vmap(pull)(torch.randn(2, *z.shape, dtype=z.dtype))[0]
    assert objects(model) == before
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert bool(change.any())
    assert all(bool(g.isfinite().all()) for g in pulled.values())


@pytest.mark.parametrize("order", [("fc", "body"), ("body", "fc")])
def test_every_name_of_a_tensor_follows(order: tuple[str, str], x: Tensor) -> None:
    model = Aliased(*order).double()
    state = {name: value + 0.1 for name, value in own_state(model).items()}
    assert_close(called_with(model, state, (x,)), by_hand(state, x))
    found = jacrev(lambda values: called_with(model, values, (), {"x": x}))(state)
    for name, expected in jacrev(by_hand)(state, x).items():
        assert_close(found[name], expected)


def test_a_tensor_may_be_called_by_any_of_its_names(x: Tensor) -> None:
    model = Aliased().double()
    other = torch.eye(3, dtype=torch.float64)
    expected = called_with(model, {"fc.weight": other}, (x,))
    for name in ("body.0.weight", "tied.weight"):
        assert torch.equal(called_with(model, {name: other}, (x,)), expected)
    assert torch.equal(called_with(model, {"fc.weight": other, "tied.weight": other}, (x,)), expected)
    with pytest.raises(ValueError, match=r"two tensors for 'tied.weight', .* under several names: give one"):
        called_with(model, {"fc.weight": other, "tied.weight": 2 * other}, (x,))


@pytest.mark.parametrize("error", [RuntimeError, KeyError, KeyboardInterrupt])
def test_whatever_happens_inside(error: type[BaseException], x: Tensor) -> None:
    class Failing(Aliased):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.scale * x
            del self._parameters["scale"]
            raise error

    model = Failing()
    before = objects(model)
    with pytest.raises(error):
        called_with(model, own_state(model), (x,))
    assert objects(model) == before
    with pytest.raises(ValueError, match="Failing has no parameter or buffer 'elsewhere'"):
        called_with(model, {"scale": torch.zeros(3), "elsewhere": torch.zeros(3)}, (x,))
    assert objects(model) == before


def test_calls_inside_calls(x: Tensor) -> None:
    """A model that calls itself at other parameters, as one that differentiates itself does."""

    class Doubling(Aliased):
        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Doubling()

        def forward(self, x: Tensor) -> Tensor:
            return called_with(self.inner, {"scale": 2 * self.inner.scale}, (x,)) + self.inner(x)

    model = Outer()
    before = objects(model)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close(called_with(model, {"inner.scale": scale}, (x,)), 3 * scale * x)
    assert_close(jacrev(lambda s: called_with(model, {"inner.scale": s}, (x,)).sum(0))(scale), torch.diag(3 * x.sum(0)))
    assert objects(model) == before


def test_parametrisations_are_computed_from_what_was_put_in(x: Tensor) -> None:
    model = parametrised()
    state = own_state(model)
    for name in state:
        state[name] = torch.randn_like(state[name]) if "original" in name else state[name]
    other = parametrised()
    other.load_state_dict({**other.state_dict(), **state}, strict=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(called_with(model, state, (x,)).detach(), other(x).detach())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
