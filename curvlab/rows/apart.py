"""Which functions are known to keep samples apart, and along which axis of their inputs the samples then lie.

Every entry of the table says, for the backward node of a function and the axis of its output on which the samples lie, on
which axis of each input they do: `SHARED` for an input without samples, such as a weight. A function that is not in the
table, or that acts along the samples' axis, raises `Mixes`.

    tanh, a + b, a * b …    the same axis, counted from the last one; SHARED where the input is broadcast
    a @ W                   the rows of a; W is SHARED
    sum, mean, softmax …    the same axis, if it is not the one that is reduced
    view                    the axis with as many entries before it, if the samples stay its outermost part
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch.autograd.graph import Node

SHARED = -1
"""The axis of samples of a tensor that has none."""

COUPLING = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
"""Functions through which samples interact in training mode."""

Shape = tuple[int, ...]
Follow = Callable[[Any, int, Shape, Sequence[Shape | None]], Sequence[int]]
"""`(node, axis, shape of the output, shapes of the inputs)` to the axes of the inputs."""


class Mixes(Exception):
    """A function may let samples interact, or move them to places that depend on numbers."""


def follow(node: Node, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Return the axes of the samples of a function's inputs, given that of its output.

    Raises:
        Mixes: if that is not known.
    """
    rule = _RULES.get(_bare(node.name()))
    if rule is None:
        raise Mixes
    return rule(node, axis, out, inputs)


def _bare(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")


def _aligned(_: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function that acts on every element, with its inputs broadcast."""
    return [SHARED if shape is None else _broadcast(axis, out, shape) for shape in inputs]


def _broadcast(axis: int, out: Shape, shape: Shape) -> int:
    own = axis - (len(out) - len(shape))
    if own < 0 or shape[own] != out[axis]:
        return SHARED
    return own


def _first_only(_: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function of its first input within a sample, the first axis; the others are parameters."""
    if axis != 0 or inputs[0] is None:
        return _demand(axis == 0, [SHARED] * len(inputs))
    return _demand(inputs[0][0] == out[0], [0] + [SHARED] * (len(inputs) - 1))


def _demand(holds: bool, axes: Sequence[int]) -> Sequence[int]:
    if not holds:
        raise Mixes
    return axes


def _normalised(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a normalisation of the last axes."""
    taken = len(node._saved_normalized_shape)
    return _demand(axis < len(out) - taken, [axis] + [SHARED] * (len(inputs) - 1))


def _batch_normalised(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:  # noqa: ARG001
    return _demand(not node._saved_training and axis != 1, [axis] + [SHARED] * (len(inputs) - 1))


def _product(_: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow `a @ b`, perhaps added to something; a batch of products has an axis more."""
    *added, _, _ = inputs
    batched = len(out) == 3
    if axis == len(out) - 2:
        pair = [axis, SHARED]
    elif batched and axis == 0:
        pair = [0, 0]
    else:
        pair = [SHARED, axis]
    return [*(SHARED if shape is None else _broadcast(axis, out, shape) for shape in added), *pair]


def _attention(_: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow attention over the axis before the last."""
    axes = [SHARED if shape is None else _broadcast(axis, out, shape) for shape in inputs]
    return _demand(axis < len(out) - 2, axes)


def _viewed(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:  # noqa: ARG001
    (shape,) = inputs
    assert shape is not None
    before, found = prod(out[:axis]), 1
    for own, length in enumerate(shape):
        # The outermost part of an axis is the same in both; `enter` sees to it that all samples are in it.
        if found == before and length != 1:
            return [own]
        found *= length
    raise Mixes


def _transposed(node: Any, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    one, other = (node._saved_dim0, node._saved_dim1) if hasattr(node, "_saved_dim0") else (0, 1)
    one, other = _axis(one, len(out)), _axis(other, len(out))
    return [other if axis == one else one if axis == other else axis]


def _permuted(node: Any, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    return [_axis(node._saved_dims[axis], len(out))]


def _axis(saved: int, axes: int) -> int:
    """Read an axis that may count from the last, kept as an unsigned number."""
    if saved >= 2**63:
        saved -= 2**64
    return saved % axes if axes else 0


def _along(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function along another axis, which keeps it: softmax, cumsum, slices, concatenation."""
    own = _axis(node._saved_dim, len(out))
    return _demand(own != axis, [SHARED if shape is None else axis for shape in inputs])


def _reduced(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function that reduces other axes: sums, means, extrema, a choice along an axis."""
    (shape,) = inputs
    assert shape is not None
    saved = getattr(node, "_saved_dim", None)
    if saved is None:
        raise Mixes
    axes = {_axis(one, len(shape)) for one in (saved if isinstance(saved, tuple) else (saved,))}
    if not axes or len(shape) == len(out):
        return _demand(bool(axes) and axis not in axes, [axis])
    return [[own for own in range(len(shape)) if own not in axes][axis]]


def _unsqueezed(node: Any, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    own = _axis(node._saved_dim, len(out))
    return _demand(own != axis, [axis - (axis > own)])


def _stacked(node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    own = _axis(node._saved_dim, len(out))
    return _demand(own != axis, [SHARED if shape is None else axis - (axis > own) for shape in inputs])


def _no_samples(_: Any, __: int, ___: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a lookup, whose only differentiable input is the table."""
    return [SHARED] * len(inputs)


_ELEMENTWISE = """
    Abs Add Addcmul Alias Celu Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expand Expm1 Gelu Hardsigmoid Hardswish
    Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid MaskedFill Maximum Minimum Mish Mul NativeDropout Neg Pow PreluKernel
    Reciprocal Relu Rsqrt Rsub Selu Sigmoid Silu Sin Softplus Sqrt Sub Tanh Threshold ToCopy Where
"""
_WINDOWED = """
    Convolution MkldnnConvolution CudnnConvolution NativeGroupNorm MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D MkldnnMaxPool2D
"""

_RULES: Mapping[str, Follow] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _aligned),
    **dict.fromkeys(_WINDOWED.split(), _first_only),
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm"), _normalised),
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm"), _batch_normalised),
    **dict.fromkeys(("Mm", "Addmm", "Bmm", "Baddbmm"), _product),
    **dict.fromkeys(
        (
            "ScaledDotProductFlashAttentionForCpu",
            "ScaledDotProductFlashAttention",
            "ScaledDotProductEfficientAttention",
        ),
        _attention,
    ),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias"), _viewed),
    **dict.fromkeys(("T", "Transpose"), _transposed),
    "Permute": _permuted,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Cumsum", "Slice", "Split", "SplitWithSizes", "Cat"), _along),
    **dict.fromkeys(("Sum", "Mean", "Amax", "Amin", "Logsumexp", "Select", "Unbind", "Squeeze"), _reduced),
    "Unsqueeze": _unsqueezed,
    "Stack": _stacked,
    **dict.fromkeys(("Embedding", "EmbeddingBag"), _no_samples),
}
