"""Linear layers and tables whose changes are added up in place.

The change of `x Wᵀ` is `ẋWᵀ + xẆᵀ`, that of the gradient `δᵀx` is `δ̇ᵀx + δᵀẋ`. torch makes each of the two, their sum and, for the
second, the gradient itself: tensors as large as the outputs and as the weight, which for logits of a vocabulary is much. The change
of a table's gradient is that of the rows that were looked up; torch makes it, and the gradient, as large as the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvlab.spectrum.pull import Flat


class ChangesInPlace(TorchFunctionMode):
    """Within it, linear layers add up their changes in place.

    Args:
        flat: if given, changes of the gradients at weights and tables that are its leaves, which have tangents, are added to it; no
            gradient reaches these leaves.
    """

    def __init__(self, flat: Flat | None = None) -> None:
        super().__init__()
        self.flat = flat
        leaves: Mapping[str, Tensor] = {} if flat is None else flat.leaves
        self.names = {id(leaf): name for name, leaf in leaves.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not torch.is_autocast_enabled(args[0].device.type if args else "cpu"):
            return self._linear(*args, **(kwargs or {}))
        if func is F.embedding:
            return self._embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        name = self.names.get(id(weight))
        if self.flat is not None and name is None:
            return F.linear(input, weight, bias)
        rows: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, self.flat, name)  # type: ignore[no-untyped-call]
        if bias is not None:
            rows = rows.add_(bias)
        return rows.view(*input.shape[:-1], -1)

    def _embedding(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:  # noqa: A002
        name = self.names.get(id(weight))
        plain = options["padding_idx"] is None and options["max_norm"] is None
        if name is None or not plain or options["scale_grad_by_freq"] or options["sparse"]:
            return F.embedding(input, weight, **options)
        found: Tensor = _Lookup.apply(input, weight, self.flat, name)  # type: ignore[no-untyped-call]
        return found


KEPT = (
    "AddBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
)
"""Reverse passes of functions that look at nothing, and whose results are seen by none below."""


def is_own(z: Tensor) -> bool:
    """Whether a tensor is what a linear layer above returned, in whatever shape, so that no reverse pass looks at it."""
    node = z.grad_fn
    while node is not None and type(node).__name__ in KEPT:
        node = node.next_functions[0][0]
    return type(node).__name__ == f"{_Linear.__name__}Backward"


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        index: Int[Tensor, "*n"],
        table: Float[Tensor, "N d"],
        flat: Flat,  # noqa: ARG004
        name: str,  # noqa: ARG004
    ) -> Float[Tensor, "*n d"]:
        return F.embedding(index, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        index, _, ctx.flat, ctx.name = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, _: None, change: Tensor, *__: None) -> Tensor:
        return F.embedding(ctx.saved_tensors[0], change)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> tuple[None, None, None, None]:
        change = None if slope is None else forward_ad.unpack_dual(slope).tangent
        if change is not None:
            (index,) = ctx.saved_tensors
            with torch.no_grad():
                ctx.flat.part(ctx.name).index_add_(0, index.flatten(), change.reshape(index.numel(), -1))
        return None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Float[Tensor, "n i"],
        weight: Float[Tensor, "o i"],
        flat: Flat | None,  # noqa: ARG004
        name: str | None,  # noqa: ARG004
    ) -> Float[Tensor, "n o"]:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        x, weight, ctx.flat, ctx.name = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, *_: None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        change = None if dx is None else dx @ weight.mT
        if dweight is not None:
            change = x @ dweight.mT if change is None else change.addmm_(x, dweight.mT)
        return change

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if slope is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        place = ctx.flat.part(ctx.name)
        g, dg = forward_ad.unpack_dual(slope)
        a, da = forward_ad.unpack_dual(x)
        with torch.no_grad():
            if dg is not None:
                place.addmm_(dg.mT, a)
            if da is not None:
                place.addmm_(g.mT, da)
        return slope @ weight if ctx.needs_input_grad[0] else None, None, None, None
