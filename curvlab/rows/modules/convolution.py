"""Convolutions and transposed convolutions: linear maps of unfolded inputs.

The input of a convolution at output position s are the entries `stride·s + dilation·k` of the padded input, k over the
kernel. A transposed convolution is that of stride 1 with a flipped kernel on the input with `stride − 1` zeros between
its entries, padded by `dilation·(kernel − 1) − padding`.

Source: Grosse & Martens 2016, section 3; Dumoulin & Visin 2016, section 4 (transposed convolutions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule, augmented


def _convolution(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = module._reversed_padding_repeated_twice

    def patches(samples: slice) -> Tensor:
        x = inputs[0][samples]
        padded = F.pad(x, padding, mode=mode) if any(padding) else x
        return _patches(padded, module.kernel_size, module.stride, module.dilation)

    return _on_patches(use, patches, g)


def _transposed_convolution(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    kernel, dilation = module.kernel_size, module.dilation

    def patches(samples: slice) -> Tensor:
        stuffed, outputs = _stuffed(inputs[0][samples], module.stride), g.shape[3:]
        padding: list[int] = []
        for size, out, k, d, p in zip(stuffed.shape[2:], outputs, kernel, dilation, module.padding, strict=True):
            before = d * (k - 1) - p
            padding = [before, out + d * (k - 1) - before - size, *padding]
        seen = _patches(F.pad(stuffed, padding), kernel, (1,) * len(kernel), dilation)
        return seen.flip(tuple(range(-len(kernel), 0)))

    return _on_patches(use, patches, g)


def _stuffed(x: Float[Tensor, "N C ..."], stride: Sequence[int]) -> Float[Tensor, "N C ..."]:
    """Put `stride − 1` zeros between the entries along every axis."""
    sizes = [s * (size - 1) + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return stuffed


def _patches(
    x: Float[Tensor, "N C ..."], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Float[Tensor, "N C ..."]:
    """Return a view `[N, C, *positions, *kernel]` of what a kernel sees at every position."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _on_patches(use: LayerUse, patches: Callable[[slice], Tensor], g: Float[Tensor, "V N C2 ..."]) -> LayerRows:
    (V, N), groups, axes = g.shape[:2], use.module.groups, g.ndim - 3
    assert isinstance(groups, int)

    def unfolded(samples: slice) -> Tensor:
        features = patches(samples).movedim(1, 1 + axes).unflatten(1 + axes, (groups, -1))
        return augmented(features, use.names, axes=1 + axes).flatten(1, axes)

    rows = g.reshape(V, N, groups, g.shape[2] // groups, -1).permute(0, 1, 4, 2, 3)
    return KroneckerRows.deferred(use.name, use.layout, unfolded, rows)


def _axes(module: Any) -> int:
    return 2 + len(module.kernel_size)


CONVOLUTION = Rule(lambda m: m.out_channels, _convolution, axes=_axes)
TRANSPOSED_CONVOLUTION = Rule(
    lambda m: m.out_channels, _transposed_convolution, input_first=lambda m: m.groups, axes=_axes
)
