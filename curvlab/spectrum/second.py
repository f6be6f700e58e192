"""Linear layers whose weights take second derivatives straight into a vector.

The change of a gradient `δᵀx` is `δ̇ᵀx + δᵀẋ`. Made as tensors, these two, their sum and the gradient itself are four times the
weight, which for that of outputs to a vocabulary is much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvlab.spectrum.pull import Flat


class ChangesInPlace(TorchFunctionMode):
    """Within it, linear layers with leaves as weights add the changes of their gradients to a vector, and bring none to the leaves.

    Args:
        flat: the vector.
        leaves: by parameter, with tangents.
    """

    def __init__(self, flat: Flat, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.flat = flat
        self.names = {id(leaf): name for name, leaf in leaves.items() if leaf.ndim == 2}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not torch.is_autocast_enabled(args[0].device.type if args else "cpu"):
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        name = self.names.get(id(weight))
        if name is None:
            return F.linear(input, weight, bias)
        flat: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, name, self.flat)  # type: ignore[no-untyped-call]
        y = flat.view(*input.shape[:-1], -1)
        return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], name: str, flat: Flat) -> Float[Tensor, "n o"]:  # noqa: ARG004
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        x, weight, ctx.name, ctx.flat = inputs
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
