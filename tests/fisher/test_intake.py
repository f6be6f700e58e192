"""Fits that take the rows of one layer after the other, as the reverse pass reaches them."""

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from oracle import ARCHITECTURES, DOUBLE, Architecture, architecture, loss_case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from curvlab.errors import UnsupportedModel
from curvlab.fisher import EKFAC, KFAC, STRUCTURES, Diagonal, fitting, make
from curvlab.fisher.intake import Intake
from curvlab.rows import autograd, sqrt_fisher
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules import convolution, linear, rule
from curvlab.rows.products import chunks
from curvlab.testing.oracle import assert_close, outputs
from curvlab.tools.live_memory import Live

KEYS = ("kfac", "ekfac", "diagonal", "partial-traces")
PICKED = [a for a in ARCHITECTURES if a.output is None]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("case", PICKED, ids=lambda case: case.name)
def test_a_fit_is_the_update_with_all_rows(case: Architecture) -> None:
    """Over reused, tied, bare, normalising and recurrent layers; an EKFAC goes over the data twice."""
    model, x = case.make(4)
    loss, y = loss_case("half").make(outputs(model, x), "mean")
    for key in KEYS:
        for kind in ("mc", "empirical"):
            how: Any = {"kind": kind, "rows": "sample", "generator": generator() if kind == "mc" else None}
            fitted = STRUCTURES[key].fit(model, loss, (x, y), **how)
            again: Any = how | {"generator": generator() if kind == "mc" else None}
            expected = make(key).update(sqrt_fisher(model, loss, x, y, **again))
            assert_close(fitted.to_dense(), expected.to_dense(), 1e-9)
            assert dict(fitted.shapes.space.shapes) == dict(expected.shapes.space.shapes)
            assert [b.name for b in fitted._blocks] == [b.name for b in expected._blocks]
            assert (fitted.count, fitted.shapes.per) == (expected.count, "sample")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_add_up_to_the_whole(key: str, reduction: str) -> None:
    model, x = architecture("mlp").make(6)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    parts = [(x[n], y[n]) for n in (slice(0, 1), slice(1, 4), slice(4, 6))]
    how: Any = {"kind": "empirical", "rows": "sample"}
    assert_close(
        STRUCTURES[key].fit(model, loss, parts, **how).to_dense(),
        STRUCTURES[key].fit(model, loss, (x, y), **how).to_dense(),
        1e-9,
    )


class Deep(nn.Module):
    def __init__(self, layers: int, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


EXACT = ("block-diagonal", "unit-wise", "component-wise")


@pytest.mark.parametrize("key", EXACT)
@pytest.mark.parametrize("name", ["mlp", "tied", "bare"])
def test_exact_blocks_on_the_parameter_side_are_fitted_layer_by_layer(key: str, name: str) -> None:
    model, x = architecture(name).make(4)
    loss, y = loss_case("half").make(outputs(model, x), "mean")
    how: Any = {"kind": "empirical", "rows": "sample"}
    expected = make(key, side="parameters").update(sqrt_fisher(model, loss, x, y, **how))
    for data in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        fitted = STRUCTURES[key].fit(model, loss, data, **how, side="parameters")
        assert fitted.by_layer
        assert_close(fitted.to_dense(), expected.to_dense(), 1e-9)
    assert not make(key).by_layer, "rows are kept"


def bring_back(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Bring back so many rows of a sample at a time."""
    monkeypatch.setattr(autograd.Forward, "groups", lambda self: list(chunks(len(self.cotangents), 1, at_once)))


OPTIONS: dict[str, dict[str, Any]] = {key: {"side": "parameters"} for key in EXACT}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("at_once", [1, 2], ids=["one row at a time", "two rows at a time"])
@pytest.mark.parametrize("name", ["reused", "tied", "layernorm", "residual"])
def test_many_rows_are_brought_back_some_after_the_others(
    name: str, at_once: int, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of the rows adds to the same batch: weights of samples and inputs count once."""
    model, x = architecture(name).make(4)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    expected = {
        key: make(key, **OPTIONS.get(key, {})).update(sqrt_fisher(model, loss, x, y)) for key in (*KEYS, *EXACT)
    }
    parts: list[int] = []
    stream = autograd.Forward.stream

    def watched(self: autograd.Forward, rows: slice, *args: Any, **kwargs: Any) -> None:
        parts.append(rows.stop - rows.start)
        stream(self, rows, *args, **kwargs)

    monkeypatch.setattr(autograd.Forward, "stream", watched)
    bring_back(monkeypatch, at_once)
    for key, whole in expected.items():
        for data in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
            fitted = STRUCTURES[key].fit(model, loss, data, kind="exact", engine="autograd", **OPTIONS.get(key, {}))
            assert_close(fitted.to_dense(), whole.to_dense(), 1e-9)
    assert set(parts) == {at_once, 1}, "of three rows a sample"


def test_inputs_are_unfolded_once_for_all_rows_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of outputs take the inputs of no further part, which a convolution would unfold anew."""
    model, x = architecture("conv2d").make(4)
    loss, y = loss_case("ce-weights").make(outputs(model, x), "mean")
    unfolded: list[Tensor] = []
    augmented = rule.augmented

    def counted(a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        unfolded.append(a)
        return augmented(a, *args, **kwargs)

    for module in (convolution, linear):
        monkeypatch.setattr(module, "augmented", counted)
    bring_back(monkeypatch, 1)
    KFAC.fit(model, loss, (x, y), kind="exact", engine="autograd")
    assert len(unfolded) == sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def test_rows_of_which_only_the_sum_counts_come_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = architecture("mlp").make(4)
    loss, y = loss_case("ce-weights").make(outputs(model, x), "mean")
    bring_back(monkeypatch, 1)
    how: Any = {"kind": "exact", "engine": "autograd", "sharing": "gradient"}
    expected = KFAC(sharing="gradient").update(sqrt_fisher(model, loss, x, y))
    assert_close(KFAC.fit(model, loss, (x, y), **how).to_dense(), expected.to_dense(), 1e-9)


@pytest.mark.parametrize(
    "structure", [KFAC, EKFAC, Diagonal, *(partial(make, key, side="parameters") for key in EXACT)]
)
def test_no_more_than_one_layer_has_rows_at_a_time(structure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the rows of a layer are taken, those of the layers before are gone, and the last one reached comes first."""
    model = Deep(6).to(DOUBLE)
    x, y = torch.randn(4, 3, dtype=DOUBLE), torch.randint(3, (4,))
    alive: list[weakref.ref[Tensor]] = []
    order: list[str] = []
    take = Intake.take

    def watched(self: Intake, layer: LayerRows) -> None:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        take(self, layer)
        alive.append(weakref.ref(layer.factors[-1]))
        order.append(layer.name)

    monkeypatch.setattr(Intake, "take", watched)
    # Few rows of an only batch would be kept for a second pass.
    monkeypatch.setattr(fitting, "CHUNK_ELEMENTS", 0)
    made = structure()
    type(made).fit(model, nn.CrossEntropyLoss(), (x, y), kind="mc", generator=generator(), **made.options)
    names = [f"layers.{k}" for k in reversed(range(6))]
    assert order == names * made.passes


@pytest.mark.parametrize("key", KEYS)
def test_a_fit_takes_the_memory_of_a_training_step_the_state_and_one_layer(key: str) -> None:
    """However deep the model, but for the eigenvectors of an EKFAC; rows would take the memory of each layer's activations."""

    def beyond(layers: int) -> float:
        model, loss, width = Deep(layers, 32).to(DOUBLE), nn.CrossEntropyLoss(), 32
        x, y = torch.randn(512, width, dtype=DOUBLE), torch.randint(width, (512,))
        how: Any = {"kind": "mc", "generator": generator()}
        STRUCTURES[key].fit(model, loss, (x, y), **how)  # the first pass of a kind is compared with another one
        with Live() as step:
            loss(model(x), y).backward()
        with Live() as fit:
            state = STRUCTURES[key].fit(model, loss, [(x, y)] * 2, **how).state_dict()["blocks"]
        held = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
        return (fit.peak - step.peak - held) / x.nbytes

    assert (beyond(12) - beyond(4)) / 8 < 0.2, "a layer, in units of its activations"


def test_graph_and_hooks_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep(2).to(DOUBLE)
    x, y = torch.randn(4, 3, dtype=DOUBLE), torch.randint(3, (4,))
    seen: list[weakref.ref[Tensor]] = []
    stream = autograd.Forward.stream

    def watched(self: autograd.Forward, *args: Any, **kwargs: Any) -> None:
        seen.append(weakref.ref(self.z))
        stream(self, *args, **kwargs)

    monkeypatch.setattr(autograd.Forward, "stream", watched)
    gc.disable()
    try:
        KFAC.fit(model, nn.CrossEntropyLoss(), (x, y), kind="empirical", rows="sample")
        assert len(seen) == 1, "compared as they are taken"
        assert all(ref() is None for ref in seen), "reference counts alone free the graph"
    finally:
        gc.enable()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Elsewhere(nn.Module):
    """A layer whose weight is used outside of it, so that its rows do not follow from its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(torch.tanh(self.first(x)), self.first.weight))


@pytest.mark.parametrize("key", KEYS)
def test_layers_without_factored_rows_are_taken_with_the_others(key: str) -> None:
    model = Elsewhere().to(DOUBLE)
    x, y = torch.randn(4, 3, dtype=DOUBLE), torch.randint(2, (4,))
    loss = nn.CrossEntropyLoss()
    fitted = STRUCTURES[key].fit(model, loss, (x, y), kind="mc", generator=generator())
    expected = make(key).update(sqrt_fisher(model, loss, x, y, "mc", generator=generator()))
    assert_close(fitted.to_dense(), expected.to_dense(), 1e-9)


class Swap(torch.autograd.Function):
    """Exchanges the first two axes, which its name does not tell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.transpose(0, 1).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # noqa: ARG004
        return g.transpose(0, 1).clone()


class Disguised(nn.Module):
    """A layer that sees the positions in front, as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(Swap.apply(self.first(Swap.apply(x)))).sum(1))


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("key", KEYS)
def test_rows_that_turn_out_wrong_are_formed_otherwise_with_the_same_draws(key: str, batches: int) -> None:
    """In a first batch, what was taken is given up; in a later one, it is found out before anything is taken."""
    model, loss = Disguised().to(DOUBLE), nn.CrossEntropyLoss()
    x, y = torch.randn(7, 3, 2, dtype=DOUBLE), torch.randint(2, (7,))
    parts = [(x[3:], y[3:]), (x[:3], y[:3])][2 - batches :]  # of four samples, nothing about the layer is mistaken
    fitted = STRUCTURES[key].fit(model, loss, parts, kind="empirical", rows="sample")
    samples = [(x[n : n + 1], y[n : n + 1]) for x, y in parts for n in range(len(x))]
    gradients = [torch.autograd.grad(loss(model(x), y), list(model.parameters())) for x, y in samples]
    G = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
    expected, first = G.T @ G / len(G), slice(0, 9)
    if key == "diagonal":
        assert_close(fitted.to_dense(), expected.diagonal().diag(), 1e-9)
    else:
        assert_close(fitted.to_dense()[first, first], expected[first, first], 1e-9)


def test_a_derivative_that_is_not_finite_names_the_layer() -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).abs().sqrt())

    model = Rooted().to(DOUBLE)
    x, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=DOUBLE), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="The derivative at layer 'first' is not finite, first at sample 1"):
        KFAC.fit(model, nn.CrossEntropyLoss(), (x, y), kind="empirical", rows="sample")


def test_a_model_that_draws_noise_of_its_own_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) + torch.randn(len(x), 3, dtype=x.dtype)))

    x, y = torch.randn(4, 3, dtype=DOUBLE), torch.randint(2, (4,))
    with pytest.raises(UnsupportedModel, match="the model is random"):
        KFAC.fit(Noisy().to(DOUBLE), nn.CrossEntropyLoss(), (x, y), kind="mc", generator=generator())
