"""Forward passes that bring a change of the parameters to the output."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvlab.nn.linearize import differentiable_attention
from curvlab.spectrum.objective import Parameters, Part


def push(part: Part, at: Parameters, vector: Parameters) -> tuple[Float[Tensor, "N C ..."], Float[Tensor, "N C ..."]]:
    """Return the output z at parameters, and J v.

    Memory: a copy of the vector, the two results, and what layers return in between.
    """
    with torch.no_grad(), forward_ad.dual_level(), differentiable_attention(), _LinearInPlace():
        z, change = forward_ad.unpack_dual(
            part.output({name: forward_ad.make_dual(value, vector[name]) for name, value in at.items()})
        )
        return z, torch.zeros_like(z) if change is None else change


class _LinearInPlace(TorchFunctionMode):
    """Lets linear layers add up their two changes in place: torch takes two outputs more, which for logits is much."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not torch.is_autocast_enabled(args[0].device.type if args else "cpu"):
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    flat: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return flat.view(*input.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """`x Wᵀ + b`, with its forward-mode derivative `ẋ Wᵀ + x Ẇᵀ + ḃ`."""

    @staticmethod
    def forward(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"], bias: Tensor | None) -> Float[Tensor, "n o"]:
        return x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_forward(*inputs[:2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        change = None if dx is None else dx @ weight.mT
        if dweight is not None:
            change = x @ dweight.mT if change is None else change.addmm_(x, dweight.mT)
        if dbias is not None:
            change = dbias.expand(len(x), -1).clone() if change is None else change.add_(dbias)
        return change
