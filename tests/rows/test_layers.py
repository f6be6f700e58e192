"""Layers × engines: rows of J against `torch.func.jacrev` on the model as a whole."""

import copy
import logging
from typing import Any

import pytest
import torch
from layer_cases import LAYERS
from oracle import ARCHITECTURES, CLASSES, Architecture, Cube, architecture, chain, head, mlp, vectors
from torch import Tensor, nn

import curvlab.rows
from curvlab.rows import backpack
from curvlab.rows.backpack import _PARAMETERLESS, _PARAMETRISED
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.rows.modules import COMPOSITES, RULES, supported_layers
from curvlab.rows.passes import ModelInputs
from curvlab.rows.samples import Samples
from curvlab.rows.tied import TiedRows
from curvlab.testing.oracle import assert_close, dense_jacobian, trainable

EVERY = [*ARCHITECTURES, *LAYERS]
CASES = [pytest.param(a, engine, id=f"{a.name}-{engine}") for a in EVERY for engine in a.engines]
CHAINS = [pytest.param(a, id=a.name) for a in EVERY if a.chain]
ALL = [pytest.param(a, id=a.name) for a in ARCHITECTURES]


@pytest.mark.parametrize(("case", "engine"), CASES)
def test_jacobian_equals_torch_func(case: Architecture, engine: str) -> None:
    model, inputs = case.make()
    rows = curvlab.rows.jacobian(model, inputs, output=case.output, engine=engine)
    reference = dense_jacobian(model, inputs, case.pick)
    assert reference.shape == (rows.R, rows.P)
    assert list(rows.space.shapes) == list(trainable(model))
    assert_close(rows.dense(), reference)
    assert_close(rows.gram(), reference @ reference.T)
    assert sorted(name for layer in rows.layers for name in layer.layout.names) == sorted(trainable(model))
    assert not any(factor.requires_grad for layer in rows.layers for factor in layer.factors)


@pytest.mark.parametrize("case", CHAINS)
def test_engines_agree_factor_by_factor(case: Architecture) -> None:
    model, inputs = case.make(N=3, seed=1)
    one, two = (curvlab.rows.jacobian(model, inputs, engine=engine) for engine in case.engines)
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        assert (ours.name, ours.layout, type(ours)) == (theirs.name, theirs.layout, type(theirs))
        for a, b in zip(ours.factors, theirs.factors, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sequential(nn.Tanh(), nn.Identity(), nn.Flatten())])
def test_cotangents_survive_the_activations_behind_which_they_start(last: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), last).double()
    inputs, cotangents = vectors(5)(6), torch.randn(2, 6, 3, dtype=torch.float64)
    before = cotangents.clone()
    found = backpack.sweep(model, ModelInputs(((inputs,), {}), Samples()), lambda _: cotangents)
    assert_close(cotangents, before, 0)
    J = dense_jacobian(model, inputs).view(3, 6, -1)
    named = {name: x for layer in found.layers for name, x in layer.layout.split(layer.dense()).items()}
    rows = torch.cat([named[name].flatten(1) for name in trainable(model)], dim=1)
    assert_close(rows.view(2, 6, -1), torch.einsum("vnc,cnp->vnp", cotangents, J))


@pytest.mark.parametrize("case", ALL)
def test_auto_takes_backpack_where_it_applies_and_says_so_once(
    case: Architecture, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = case.make(N=2)
    with caplog.at_level(logging.INFO, logger="curvlab"):
        rows = curvlab.rows.jacobian(model, inputs, output=case.output)
        curvlab.rows.jacobian(model, inputs, output=case.output)
    (record,) = (record for record in caplog.records if record.levelno == logging.INFO)
    assert ("BackPACK engine" if case.chain else "autograd engine") in record.message
    assert_close(rows.dense(), dense_jacobian(model, inputs, case.pick))


def test_auto_leaves_one_row_a_sample_to_autograd(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), vectors(5)(6).float(), torch.arange(6) % 3
    with caplog.at_level(logging.INFO, logger="curvlab"):
        for kind, draws in (("mc", 1), ("empirical", 1), ("mc", 2), ("exact", 1)):
            drawn = torch.Generator().manual_seed(0) if kind == "mc" else None
            curvlab.rows.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, kind, draws=draws, generator=drawn)
    plain, chain = caplog.records
    assert "autograd engine: one row a sample" in plain.message
    assert "BackPACK engine" in chain.message


def test_every_rule_and_every_chain_rule_is_covered() -> None:
    built = {type(module) for case in EVERY for module in case.make(N=1)[0].modules()}
    assert {*RULES, *COMPOSITES} <= built
    chains = {type(module) for case in EVERY if case.chain for module in case.make(N=1)[0].modules()}
    assert {*_PARAMETRISED, *_PARAMETERLESS} <= chains | {nn.MaxPool1d}
    assert supported_layers() == [kind.__name__ for kind in (*RULES, *COMPOSITES)]


def test_max_pool_1d() -> None:
    model = chain(nn.Conv1d(2, 3, 2), nn.MaxPool1d(2, stride=1), *head(9)).double()
    x = vectors(2, 5)(3)
    assert_close(curvlab.rows.jacobian(model, x, engine="backpack").dense(), dense_jacobian(model, x))


KINDS_OF_ROWS = {
    "leading-axes": (KroneckerRows, KroneckerRows, KroneckerRows),
    "conv2d-groups": (KroneckerRows, KroneckerRows, KroneckerRows),
    "batchnorm1d": (KroneckerRows, DenseRows, KroneckerRows),
    "layernorm": (KroneckerRows, DenseRows, KroneckerRows),
    "embedding": (EmbeddingRows, KroneckerRows),
    "reused": (KroneckerRows, KroneckerRows, KroneckerRows),
    "transposed2d": (KroneckerRows, KroneckerRows, KroneckerRows),
    "groupnorm": (DenseRows, KroneckerRows, DenseRows, KroneckerRows),
    "bilinear": (KroneckerRows, KroneckerRows),
    "bag": (EmbeddingRows, KroneckerRows),
    "self-attention": (EmbeddingRows, KroneckerRows, KroneckerRows, KroneckerRows),
    "cross-attention-sizes": (*(3 * [KroneckerRows]), DenseRows, KroneckerRows, KroneckerRows),
    "encoder": (EmbeddingRows, *(2 * [*(4 * [KroneckerRows]), DenseRows, DenseRows]), KroneckerRows),
    "lstm-all": (*(12 * [KroneckerRows]), KroneckerRows),
    "tied": (TiedRows, KroneckerRows, KroneckerRows, KroneckerRows),
    "shared-table": (DenseRows, EmbeddingRows, KroneckerRows),
    "tied-bias": (KroneckerRows, KroneckerRows, KroneckerRows, KroneckerRows, KroneckerRows),
    "bare": (DenseRows, DenseRows, KroneckerRows),
    "oddities": (KroneckerRows, KroneckerRows, KroneckerRows, DenseRows),
}


@pytest.mark.parametrize("name", KINDS_OF_ROWS)
def test_layers_stay_factored_where_they_can(name: str) -> None:
    model, inputs = next(case for case in EVERY if case.name == name).make(N=2)
    assert tuple(type(layer) for layer in curvlab.rows.jacobian(model, inputs).layers) == KINDS_OF_ROWS[name]


def test_layout_of_units() -> None:
    def layouts(name: str) -> list[tuple[int, int, tuple[str, ...]]]:
        model, inputs = architecture(name).make(N=2)
        found = [layer.layout for layer in curvlab.rows.jacobian(model, inputs).layers]
        return [(layout.units, layout.width, layout.names) for layout in found]

    assert layouts("mlp") == [(5, 5, ("0.weight", "0.bias")), (3, 6, ("2.weight", "2.bias"))]
    assert layouts("frozen-weight")[0] == (5, 1, ("0.bias",))
    assert layouts("conv2d-groups")[0] == (4, 10, ("0.weight", "0.bias"))
    assert layouts("layernorm")[1] == (5, 2, ("1.weight", "1.bias"))
    assert layouts("batchnorm2d")[0] == (2, 2, ("0.weight", "0.bias"))
    assert layouts("embedding")[0] == (7, 3, ("0.weight",))
    assert layouts("bare")[0] == (1, 6, ("temperature", "shift"))
    assert layouts("reused")[1] == (5, 6, ("again.weight", "again.bias"))
    assert layouts("tied")[0] == (3, 4, ("embedding.weight",))
    assert layouts("tied")[2] == (4, 1, ("two.bias",))


@pytest.mark.parametrize("engine", ["backpack", "autograd"])
def test_one_sample_float32_and_no_grad(engine: str) -> None:
    model, x = architecture("batchnorm2d").make(N=1)
    with torch.no_grad():
        rows = curvlab.rows.jacobian(model, x, engine=engine)
    assert rows.shape == (CLASSES, 1)
    assert_close(rows.dense(), dense_jacobian(model, x))
    single = curvlab.rows.jacobian(model.float(), x.float(), engine=engine)
    assert single.dtype == torch.float32
    assert_close(single.dense().double(), rows.dense(), 1e-5)


def test_dense_rows_under_no_grad() -> None:
    model, x = architecture("bare").make()
    with torch.no_grad():
        rows = curvlab.rows.jacobian(model, x)
    assert_close(rows.dense(), dense_jacobian(model, x))


def test_user_hooks_are_part_of_the_model() -> None:
    model = mlp().double()
    model[0].register_forward_hook(lambda *call: 2 * call[-1])
    model[2].register_forward_pre_hook(lambda *call: (call[1][0] + 1,))
    x = vectors(4)(3)
    assert_close(curvlab.rows.jacobian(model, x).dense(), dense_jacobian(model, x))
    with pytest.raises(curvlab.errors.UnsupportedModel, match="Linear '0' has hooks"):
        curvlab.rows.jacobian(model, x, engine="backpack")


@pytest.mark.parametrize("name", ["mlp", "bare"])
def test_hooks_on_parameters_change_gradients_and_no_rows(name: str) -> None:
    model, x = architecture(name).make()
    expected, seen = dense_jacobian(model, x), []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    for _ in range(2):
        assert_close(curvlab.rows.jacobian(model, x).dense(), expected)
    assert_close(curvlab.rows.jacobian(model, x, nodes=torch.arange(len(model(x)))).dense(), expected)
    assert not seen
    model(x).sum().backward()
    assert len(seen) == len(list(model.parameters()))


def test_forward_replaced_on_the_instance() -> None:
    model = mlp().double()
    model[0].forward = lambda x: torch.nn.functional.linear(3 * x, model[0].weight, model[0].bias)
    x = vectors(4)(3)
    rows = curvlab.rows.jacobian(model, x)
    assert isinstance(rows.layers[0], DenseRows)
    assert_close(rows.dense(), dense_jacobian(model, x))


def test_subclass_with_its_own_forward_gets_dense_rows() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    class Plain(nn.Linear):
        pass

    model = chain(Scaled(4, 5), nn.Tanh(), Plain(5, CLASSES)).double()
    x = vectors(4)(3)
    rows = curvlab.rows.jacobian(model, x)
    assert [type(layer) for layer in rows.layers] == [DenseRows, KroneckerRows]
    assert_close(rows.dense(), dense_jacobian(model, x))


def test_custom_autograd_function() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Cube.apply(self.first(x)))

    model, x = Model().double(), vectors(4)(3)
    rows = curvlab.rows.jacobian(model, x)
    reference = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).T.flatten()]
    assert_close(rows.dense(), torch.stack([torch.cat([g.flatten() for g in row]) for row in reference]))


class InNumPy(torch.autograd.Function):
    """Sines whose reverse pass torch cannot vectorise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.from_numpy(gradient.numpy() * ctx.saved_tensors[0].detach().cos().numpy())


class Sines(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return InNumPy.apply(x)


@pytest.mark.parametrize("middle", ["group-norm on channels-last data", "reverse pass in NumPy"])
def test_one_row_after_the_other(middle: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer = Sines() if "NumPy" in middle else nn.GroupNorm(2, 4)
    model = chain(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, CLASSES)).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    with caplog.at_level(logging.INFO, "curvlab"):
        rows = curvlab.rows.jacobian(model.to(memory_format=torch.channels_last), x, engine="autograd")
    assert "One row after the other" in caplog.text
    reference = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).T.flatten()]
    assert_close(rows.dense(), torch.stack([torch.cat([g.flatten() for g in row]) for row in reference]))


def test_deprecated_weight_norm() -> None:
    layer = nn.Linear(4, 5).double()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    model = chain(layer, nn.Tanh(), nn.Linear(5, CLASSES)).double()
    x = vectors(4)(2)
    attribute = layer.weight
    rows = curvlab.rows.jacobian(model, x)
    assert layer.weight is attribute
    reference = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).T.flatten()]
    assert_close(rows.dense(), torch.stack([torch.cat([g.flatten() for g in row]) for row in reference]))


def test_model_without_a_path_to_its_parameters() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach()

    rows = curvlab.rows.jacobian(Detached(), torch.randn(2, 4))
    assert rows.R == 2 * CLASSES
    assert not rows.dense().any()


def test_sparse_embedding() -> None:
    model = chain(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, CLASSES)).double()
    index = torch.tensor([[0, 3], [3, 3], [1, 4]])
    dense = chain(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, CLASSES)).double()
    dense.load_state_dict(model.state_dict())
    for engine in ("autograd", "backpack"):
        rows = curvlab.rows.jacobian(model, index, engine=engine)
        assert_close(rows.dense(), dense_jacobian(dense, index))


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", ["mlp", "mlp-nested", "conv2d", "conv1d", "bilinear", "embedding"])
def test_rows_do_not_alias_the_inputs(name: str, engine: Any) -> None:
    """A loader may put the next batch into the same memory."""
    model, x = next(case for case in EVERY if case.name == name).make(N=2)
    rows = curvlab.rows.jacobian(model, x, engine=engine)
    untouched = curvlab.rows.jacobian(model, copy.deepcopy(x), engine=engine).dense()
    for tensor in x if isinstance(x, tuple) else (x,):
        tensor.zero_()
    assert torch.equal(rows.dense(), untouched)
