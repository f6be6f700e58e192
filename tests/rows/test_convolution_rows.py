"""Convolutions and transposed convolutions of any geometry, and layers whose weights are parametrised."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_cases import Recurrent, SelfAttention
from oracle import DOUBLE, chain
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from curvlab.rows import jacobian
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close, dense_jacobian

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups, kernel, stride, dilation = draw(st.integers(1, 2)), each(1, 3), each(1, 2), each(1, 2)
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "padding": tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return (TRANSPOSED if transposed else PLAIN)[axes](*channels, kernel, **options), (channels[0], *each(1, 4))


@settings(max_examples=25)
@given(convolutions())
def test_any_geometry(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    model, x = chain(layer, nn.Tanh(), nn.Flatten()).double(), torch.randn(2, *shape, dtype=DOUBLE)
    try:
        features = model(x).shape[1]
    except RuntimeError:  # the kernel is larger than the padded input, or the output is empty
        features = 0
    assume(0 < features <= 100)
    reference = dense_jacobian(model, x)
    for engine in ("autograd", "backpack"):
        rows = jacobian(model, x, engine=engine)
        assert isinstance(rows.layers[0], KroneckerRows)
        assert_close(rows.dense(), reference)
        v = torch.randn(rows.P, dtype=DOUBLE)
        assert_close(rows.matvec(v), reference @ v, 1e-9)
        c = torch.randn(rows.R, dtype=DOUBLE)
        assert_close(rows.space.flatten(rows.rmatvec(c)), c @ reference, 1e-9)


@pytest.mark.parametrize(
    ("build", "weight", "inputs"),
    [
        (lambda: Recurrent(nn.LSTM, batch_first=True), "net.weight_hh_l0", torch.randn(2, 3, 3, dtype=DOUBLE)),
        (lambda: SelfAttention(batch_first=True), "attend.in_proj_weight", torch.randint(6, (2, 3))),
        (lambda: chain(nn.ConvTranspose1d(2, 3, 2), nn.Flatten()), "0.weight", torch.randn(2, 2, 3, dtype=DOUBLE)),
    ],
    ids=["lstm", "attention", "transposed"],
)
def test_parametrised_weights_inside_other_layers(build: Any, weight: str, inputs: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = build()
    owner, _, local = weight.rpartition(".")
    weight_norm(model.get_submodule(owner), local)
    model = model.double()
    assert_close(jacobian(model, inputs).dense(), dense_jacobian(model, inputs))
