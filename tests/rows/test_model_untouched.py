"""The user's model and inputs are left as they were found, whatever happens inside."""

from collections.abc import Callable
from typing import Any

import backpack
import pytest
import torch
from backpack.context import CTX
from layer_cases import layer_case
from oracle import ARCHITECTURES, CLASSES, Architecture, architecture, mlp, vectors
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import linearize
from curvlab.rows import jacobian, sqrt_fisher
from curvlab.testing.oracle import assert_close, dense_jacobian

NAMES = ("self-attention", "encoder", "lstm", "cells", "shared-table", "weight-norm", "language-model")
MODELS = [*ARCHITECTURES, *(layer_case(name) for name in NAMES)]
CASES = [pytest.param(a, engine, id=f"{a.name}-{engine}") for a in MODELS for engine in a.engines]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def photograph(model: nn.Module) -> Callable[[], None]:
    """Return a function that asserts that nothing about the model has changed."""
    attributes = {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    registered = {
        name: {k: {i: id(e) for i, e in v.items()} for k, v in vars(m).items() if isinstance(v, dict)}
        for name, m in model.named_modules()
    }
    parameters = dict(model.named_parameters())
    flags = {n: (id(p), p.requires_grad, p._version, p.data_ptr(), sorted(vars(p))) for n, p in parameters.items()}
    grads = {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in parameters.items()}
    values = {name: value.clone() for name, value in tensors(model).items()}
    modes = {name: m.training for name, m in model.named_modules()}

    def unchanged() -> None:
        assert {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()} == attributes
        assert registered == {
            name: {k: {i: id(e) for i, e in v.items()} for k, v in vars(m).items() if isinstance(v, dict)}
            for name, m in model.named_modules()
        }
        now = dict(model.named_parameters())
        assert flags == {n: (id(p), p.requires_grad, p._version, p.data_ptr(), sorted(vars(p))) for n, p in now.items()}
        for n, p in now.items():
            kept = grads[n]
            assert (p.grad is None) == (kept is None)
            assert kept is None or (id(p.grad) == kept[0] and torch.equal(p.grad, kept[1]))
        assert all(torch.equal(value, values[name]) for name, value in tensors(model).items())
        assert modes == {name: m.training for name, m in model.named_modules()}

    return unchanged


@pytest.mark.parametrize(("case", "engine"), CASES)
def test_untouched(case: Architecture, engine: Any) -> None:
    model, inputs = case.make(N=2)
    for k, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(k)) if k % 2 else None
    handles = len(CTX.hook_handles)
    unchanged = photograph(model)
    jacobian(model, inputs, output=case.output, engine=engine)
    unchanged()
    assert_close(jacobian(model, inputs, output=case.output).dense(), dense_jacobian(model, inputs, case.pick))
    unchanged()
    assert len(CTX.hook_handles) == handles
    assert CTX.active_exts == ()


@pytest.mark.parametrize("engine", ["backpack", "autograd"])
def test_untouched_after_an_error(engine: Any) -> None:
    model, x = architecture("batchnorm2d").make(N=2)
    unchanged = photograph(model)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        jacobian(model, x, engine=engine)
    unchanged()
    with pytest.raises(RuntimeError, match="running_mean should contain 5"):
        jacobian(model, torch.zeros(2, 5, 6, 6, dtype=x.dtype), engine=engine)
    unchanged()
    for kind in ("exact", "empirical"):
        with pytest.raises(ValueError, match="targets of the output's shape"):
            sqrt_fisher(model, nn.MSELoss(), x.nan_to_num(), torch.zeros(2), kind, engine=engine)  # type: ignore[arg-type]
        unchanged()
    assert CTX.active_exts == ()
    assert_close(jacobian(model, x.nan_to_num()).dense(), dense_jacobian(model, x.nan_to_num()))


def test_untouched_after_a_refusal() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.cache = self.layer(self.scale * x)
            return self.cache.flip(0)

    model = Mixing()
    unchanged = photograph(model)
    with pytest.raises(UnsupportedModel, match="samples interact"):
        jacobian(model, torch.randn(3, 4))
    unchanged()


def test_attributes_and_buffers_that_the_forward_pass_sets() -> None:
    class Remembering(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("calls", torch.zeros(()))
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.scale * x
            self.calls = self.calls + 1
            self.extra = True
            return self.layer(self.last)

    model = Remembering()
    unchanged = photograph(model)
    jacobian(model, torch.randn(3, 4))
    unchanged()
    assert model.last is None
    assert not hasattr(model, "extra")


@pytest.mark.parametrize("engine", ["backpack", "autograd"])
def test_inputs_keep_their_gradients_and_flags(engine: Any) -> None:
    model, x = architecture("mlp").make(N=3)
    root = x.clone().requires_grad_()
    derived = root * 1
    for inputs in (root, derived):
        rows = jacobian(model, inputs, engine=engine)
        assert_close(rows.dense(), dense_jacobian(model, x))
        assert root.grad is None
        assert inputs.requires_grad
    assert root._version == 0


def test_models_that_differentiate_with_respect_to_their_input() -> None:
    """A force field: the output is itself a derivative, so the input must be able to require gradients."""

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            energy = torch.tanh(self.layer(x)).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model, x = Force().double(), vectors(4)(3).requires_grad_()
    parameters = list(model.parameters())
    expected = [torch.autograd.grad(z, parameters, retain_graph=True) for z in model(x).T.flatten()]
    assert_close(jacobian(model, x).dense(), torch.stack([torch.cat([g.flatten() for g in row]) for row in expected]))
    assert x.grad is None


def test_works_under_torch_func_afterwards() -> None:
    model, x = architecture("conv2d").make(N=2)
    jacobian(model, x, engine="backpack")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    J = torch.func.vmap(
        torch.func.jacrev(lambda p, one: torch.func.functional_call(model, p, (one[None],))[0]), (None, 0)
    )
    assert J(parameters, x)["0.weight"].shape == (2, CLASSES, 4, 2, 3, 3)


def test_a_model_that_the_user_extended_with_backpack() -> None:
    model, x = architecture("mlp").make(N=3)
    reference = dense_jacobian(model, x)
    extended = backpack.extend(model)
    unchanged = photograph(extended)
    rows = jacobian(extended, x)
    unchanged()
    assert_close(rows.dense(), reference)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(backpack.extensions.BatchGrad()):
        loss(extended(x), torch.tensor([0, 1, 2])).backward()
    assert extended[0].weight.grad_batch.shape == (3, 5, 4)


def test_inside_the_users_own_backpack_context() -> None:
    model, x = architecture("mlp").make(N=3)
    with backpack.backpack(backpack.extensions.BatchGrad()):
        rows = jacobian(model, x, engine="backpack")
    assert_close(rows.dense(), dense_jacobian(model, x))
    assert not hasattr(model[0].weight, "grad_batch")


def test_linearised_models_are_untouched() -> None:
    model, x = architecture("residual").make(N=2)
    linear = linearize(model)
    unchanged, base_unchanged = photograph(linear), photograph(linear.base)
    jacobian(linear, x)
    unchanged()
    base_unchanged()


def test_models_are_not_kept_alive() -> None:
    import gc
    import weakref

    for engine in ("backpack", "autograd"):
        model = mlp().double()
        gone = weakref.ref(model)
        rows = jacobian(model, vectors(4)(2), engine=engine)  # type: ignore[arg-type]
        del model
        gc.collect()
        assert gone() is None
        assert rows.P == 43


@pytest.mark.parametrize("name", ["encoder", "lstm-all", "cross-attention"])
def test_decomposed_layers_are_put_back(name: str) -> None:
    """Also after an error, with torch's fast path as it was, and the model still works under `torch.func`."""
    model, inputs = layer_case(name).make(N=2)
    unchanged, before = photograph(model), model(inputs)
    assert torch.backends.mha.get_fastpath_enabled()
    rows = jacobian(model, inputs)
    with pytest.raises(ValueError, match="needs targets of the output's shape"):
        sqrt_fisher(model, nn.MSELoss(), inputs, torch.zeros(2, 1))
    unchanged()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(model(inputs), before)
    assert not any("forward" in vars(module) for module in model.modules())
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    values = {name: p.detach() for name, p in model.named_parameters()}
    _, pull = torch.func.vjp(lambda p: torch.func.functional_call(model, p, (inputs,)), values)
    cotangent = torch.linspace(-1, 1, before.numel(), dtype=before.dtype).view(before.shape)
    product = sum(float((g * v[name]).sum()) for name, g in pull(cotangent)[0].items())
    assert abs(float(rows.matvec(v) @ cotangent.T.flatten()) - product) < 1e-9 * (1 + abs(product))


class Counting(nn.Module):
    """Counts its calls in a buffer, in place, and averages what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x - self.mean)
        self.calls += 1
        self.mean.lerp_(x.mean(0), 0.5)
        return z


def test_buffers_that_the_forward_pass_changes_in_place() -> None:
    model, x = Counting(), torch.randn(4, 3)
    rows = jacobian(model, x)
    assert float(model.calls) == 0
    assert not bool(model.mean.any())
    assert_close(rows.dense(), dense_jacobian(model.layer, x))


@pytest.mark.parametrize("engine", ["backpack", "autograd"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_inference_mode(engine: Any, kind: Any) -> None:
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    expected = sqrt_fisher(model, loss, x, y, kind, engine=engine)
    with torch.inference_mode():
        same = (x.clone(), y.clone())
        inside = sqrt_fisher(model, loss, *same, kind, engine=engine)
        assert torch.equal(inside.gram(), expected.gram())
    assert torch.equal(sqrt_fisher(model, loss, *same, kind, engine=engine).gram(), expected.gram())


def test_a_layer_under_two_names_beside_a_bare_parameter() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, CLASSES)
            self.body = nn.Sequential(self.fc, nn.Tanh())
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.scale * x)

    model, x = Aliased().double(), vectors(4)(3)
    expected = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).T.flatten()]
    reference = torch.stack([torch.cat([g.flatten() for g in row]) for row in expected])
    unchanged = photograph(model)
    assert_close(jacobian(model, x).dense(), reference)
    assert_close(jacobian(linearize(model), x).dense(), reference)
    unchanged()
    assert isinstance(model.fc.weight, nn.Parameter)


def test_lists_and_dictionaries_that_the_forward_pass_fills() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(3))
            self.seen: list[Tensor] = []
            self.by_name: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x * self.scale)
            self.by_name["last"] = self.seen[-1]
            return self.layer(self.seen[-1])

    model, x = Logging(), torch.randn(4, 3)
    seen, by_name = model.seen, model.by_name
    jacobian(model, x)
    assert model.seen is seen
    assert model.by_name is by_name
    assert (seen, by_name) == ([], {})
