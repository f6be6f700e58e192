"""Linear maps among which every entry has its own, as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx


class RoutedLinear(torch.autograd.Function):
    """Entry m to `W[index[m]] x[m] + b[index[m]]`, one matrix product a map that is used.

    What the maps of the torch functions that experts are usually written in hide, that entries stay where they are, is known of
    this one.
    """

    @staticmethod
    def forward(
        x: Float[Tensor, "M I"],
        weight: Float[Tensor, "E O I"],
        bias: Float[Tensor, "E O"] | None,
        index: Int[Tensor, " M"],
    ) -> Float[Tensor, "M O"]:
        """Apply the maps."""
        y = _each(x, weight.mT, index)
        return y if bias is None else y + bias[index]

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep what the reverse pass needs."""
        x, weight, bias, index = inputs
        ctx.save_for_backward(x, weight, index)
        ctx.biased = bias is not None  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Bring the gradient at the entries' outputs to inputs, weight and bias."""
        (g,) = gradients
        x, weight, index = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        by_map = list(_by_map(index, len(weight)))
        return (
            _each(g, weight, index) if to_x else None,
            torch.stack([g[own].mT @ x[own] for own in by_map]) if to_weight else None,
            torch.stack([g[own].sum(0) for own in by_map]) if to_bias and ctx.biased else None,
            None,
        )


def _each(x: Float[Tensor, "M I"], maps: Float[Tensor, "E I O"], index: Int[Tensor, " M"]) -> Float[Tensor, "M O"]:
    own = list(_by_map(index, len(maps)))
    back = torch.cat(own).argsort()
    return torch.cat([x[entries] @ matrix for entries, matrix in zip(own, maps, strict=True)])[back]


def _by_map(index: Int[Tensor, " M"], maps: int) -> Iterator[Int[Tensor, " M_e"]]:
    """Yield the entries of every map."""
    counts = torch.bincount(index, minlength=maps).tolist()
    yield from index.argsort(stable=True).split(counts)
