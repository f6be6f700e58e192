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
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch.nn.modules._functions import BackwardHookFunction

from curvlab.nn.routed import RoutedLinear

SHARED = -1
"""The axis of samples of a tensor that has none."""

COUPLING = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")
"""Functions through which samples interact in training mode."""

Shape = tuple[int, ...]
Saved = Sequence[Any]
Follow = Callable[[Saved, int, Shape, Sequence[Shape | None]], Sequence[int]]
"""`(saved attributes, axis, shape of the output, shapes of the inputs)` to the axes of the inputs; raises `Mixes`."""


class Mixes(Exception):
    """A function may let samples interact, or move them to places that depend on numbers."""


@dataclass(frozen=True)
class Function:
    """What is known of a function.

    Attributes:
        rule: says where the samples are in its inputs.
        saved: attributes of its node that the rule reads.
        implied: whether the shapes of its outputs follow from `saved` and those of its inputs, if all inputs have gradients.
        name: of its nodes' type; empty if nothing is known of that.
    """

    rule: Follow
    saved: tuple[str, ...] = ()
    implied: bool = False
    name: str = ""

    def read(self, node: Any) -> list[Any]:
        """Return the attributes, None for those that a node of this function does not have."""
        return [getattr(node, name, None) for name in self.saved]

    def follow(self, node: Any, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
        """Return the axes of the samples of the inputs, given that of the output.

        Raises:
            Mixes: if that is not known.
        """
        saved = self.read(node)
        if None in saved:
            raise Mixes
        return self.rule(saved, axis, out, inputs)


def _mixing(*_: Any) -> Sequence[int]:
    raise Mixes


UNKNOWN = Function(_mixing)
"""A function that is not in the table."""


class _ByType(dict[type, Function]):
    def __missing__(self, kind: type) -> Function:
        if kind is BackwardHookFunction._backward_cls or _is_of_shards(kind):
            return HOOKED
        # A function of one's own may have the name of a known one.
        if issubclass(kind, torch._C._FunctionBase):
            return UNKNOWN
        known = _FUNCTIONS.get(kind.__name__.rstrip("0123456789").removesuffix("Backward"))
        self[kind] = UNKNOWN if known is None else replace(known, name=kind.__name__)
        return self[kind]


def _is_of_shards(kind: type) -> bool:
    """Whether a function is the identity by which `fully_shard` learns that a module's reverse pass is done."""
    forward = getattr(kind, "_forward_cls", None)
    return getattr(forward, "__name__", "") == "RegisterPostBackwardFunction" and getattr(
        forward, "__module__", ""
    ).startswith("torch.distributed.fsdp.")


def _hooked(_: Saved, axis: int, __: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    return [axis] if len(inputs) == 1 else _mixing()


HOOKED = Function(_hooked)
"""The identity by which torch calls what waits for the gradients of a module, with one input or output."""


FUNCTIONS = _ByType()
"""Functions by the types of their nodes."""


def _aligned(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function that acts on every element, with its inputs broadcast."""
    return [SHARED if shape is None else _broadcast(axis, out, shape) for shape in inputs]


def _broadcast(axis: int, out: Shape, shape: Shape) -> int:
    own = axis - (len(out) - len(shape))
    if own < 0 or shape[own] != out[axis]:
        return SHARED
    return own


def _first_only(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function of its first input within a sample, the first axis; the others are parameters."""
    if axis != 0 or inputs[0] is None:
        return _demand(axis == 0, [SHARED] * len(inputs))
    return _demand(inputs[0][0] == out[0], [0] + [SHARED] * (len(inputs) - 1))


def _demand(holds: bool, axes: Sequence[int]) -> Sequence[int]:
    if not holds:
        raise Mixes
    return axes


def _normalised(saved: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a normalisation of the last axes."""
    return _demand(axis < len(out) - len(saved[0]), [axis] + [SHARED] * (len(inputs) - 1))


def _batch_normalised(saved: Saved, axis: int, _: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    return _demand(not saved[0] and axis != 1, [axis] + [SHARED] * (len(inputs) - 1))


def _product(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow `a @ b`, perhaps added to something; a batch of products has an axis more."""
    added, batched = inputs[:-2], len(out) == 3
    if axis == len(out) - 2:
        pair = [axis, SHARED]
    elif batched and axis == 0:
        pair = [0, 0]
    else:
        pair = [SHARED, axis]
    return [*(SHARED if shape is None else _broadcast(axis, out, shape) for shape in added), *pair]


def _attention(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow attention over the axis before the last."""
    axes = [SHARED if shape is None else _broadcast(axis, out, shape) for shape in inputs]
    return _demand(axis < len(out) - 2, axes)


def _viewed(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    (shape,) = inputs
    assert shape is not None
    before, found = prod(out[:axis]), 1
    for own, length in enumerate(shape):
        # The outermost part of an axis is the same in both; that all samples are in it is seen there.
        if found == before and length != 1:
            return [own]
        found *= length
    raise Mixes


def _turned(_: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow the transpose of a matrix."""
    return _transposed((0, 1), axis, out, inputs)


def _transposed(saved: Saved, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    one, other = (_axis(dim, len(out)) for dim in saved)
    return [other if axis == one else one if axis == other else axis]


def _permuted(saved: Saved, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    return [_axis(saved[0][axis], len(out))]


def _axis(saved: int, axes: int) -> int:
    """Read an axis that may count from the last, kept as an unsigned number."""
    if saved >= 2**63:
        saved -= 2**64
    return saved % axes if axes else 0


def _along(saved: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function along another axis, which keeps it: softmax, cumsum, slices, concatenation."""
    own = _axis(saved[0], len(out))
    return _demand(own != axis, [SHARED if shape is None else axis for shape in inputs])


def _reduced(saved: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a function that reduces other axes: sums, means, extrema, a choice along an axis."""
    (shape,), (dim,) = inputs, saved
    assert shape is not None
    axes = {_axis(one, len(shape)) for one in (dim if isinstance(dim, tuple) else (dim,))}
    if not axes or len(shape) == len(out):
        return _demand(bool(axes) and axis not in axes, [axis])
    return [[own for own in range(len(shape)) if own not in axes][axis]]


def _unsqueezed(saved: Saved, axis: int, out: Shape, _: Sequence[Shape | None]) -> Sequence[int]:
    own = _axis(saved[0], len(out))
    return _demand(own != axis, [axis - (axis > own)])


def _stacked(saved: Saved, axis: int, out: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    own = _axis(saved[0], len(out))
    return _demand(own != axis, [SHARED if shape is None else axis - (axis > own) for shape in inputs])


def _no_samples(_: Saved, __: int, ___: Shape, inputs: Sequence[Shape | None]) -> Sequence[int]:
    """Follow a lookup, whose only differentiable input is the table."""
    return [SHARED] * len(inputs)


_ELEMENTWISE = """
    Abs Add Addcmul Alias Celu Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expm1 Gelu Hardsigmoid Hardswish
    Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid Maximum Minimum Mish Mul NativeDropout Neg Pow PreluKernel
    Reciprocal Relu Rsqrt Rsub Selu Sigmoid Silu Sin Softplus Sqrt Sub Tanh Threshold ToCopy
"""
_WINDOWED = """
    Convolution MkldnnConvolution CudnnConvolution NativeGroupNorm MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D MkldnnMaxPool2D
"""
_ATTENTION = """
    ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention
"""


def _each(names: str, function: Function) -> dict[str, Function]:
    return dict.fromkeys(names.split(), function)


_FUNCTIONS: Mapping[str, Function] = {
    **_each(_ELEMENTWISE, Function(_aligned, implied=True)),
    **_each("Expand MaskedFill Where", Function(_aligned)),
    **_each(_WINDOWED, Function(_first_only)),
    **_each("NativeLayerNorm FusedRmsNorm", Function(_normalised, ("_saved_normalized_shape",), implied=True)),
    **_each("NativeBatchNorm CudnnBatchNorm", Function(_batch_normalised, ("_saved_training",), implied=True)),
    **_each("Mm Addmm Bmm Baddbmm", Function(_product, implied=True)),
    **_each(_ATTENTION, Function(_attention)),
    **_each("View UnsafeView ReshapeAlias", Function(_viewed)),
    "T": Function(_turned, implied=True),
    "Transpose": Function(_transposed, ("_saved_dim0", "_saved_dim1"), implied=True),
    "Permute": Function(_permuted, ("_saved_dims",), implied=True),
    **_each("Softmax SafeSoftmax LogSoftmax Cumsum", Function(_along, ("_saved_dim",), implied=True)),
    **_each("Split UnsafeSplit", Function(_along, ("_saved_dim", "_saved_split_size"), implied=True)),
    "SplitWithSizes": Function(_along, ("_saved_dim", "_saved_split_sizes"), implied=True),
    **_each("Cat Slice Topk", Function(_along, ("_saved_dim",))),
    **_each("Sum Mean Amax Amin Logsumexp Select Unbind Squeeze", Function(_reduced, ("_saved_dim",))),
    "Unsqueeze": Function(_unsqueezed, ("_saved_dim",), implied=True),
    "Stack": Function(_stacked, ("_saved_dim",)),
    **_each("Embedding EmbeddingBag", Function(_no_samples)),
}

FUNCTIONS[RoutedLinear._backward_cls] = Function(_first_only, name="RoutedLinearBackward")
