"""Bags of embeddings with derivatives of every order.

torch sums, averages or maximises the rows of a table by a fused function, which has a first reverse-mode derivative only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.nn.replacing import Replacing


def differentiable_bags(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a forward pass of the model records bags that have all derivatives."""
    has_bags = any(isinstance(module, nn.EmbeddingBag) for module in model.modules())
    return Replacing({F.embedding_bag: _bags}) if has_bags else nullcontext()


def _bags(
    input: Tensor,  # noqa: A002
    weight: Float[Tensor, "K D"],
    offsets: Tensor | None = None,
    max_norm: float | None = None,  # noqa: ARG001
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Float[Tensor, "B D"]:
    """Combine rows of a table as `F.embedding_bag` does; an empty bag is 0. What only acts on gradients has no part."""
    index = input.reshape(-1)
    if offsets is None:
        offsets, include_last_offset = torch.arange(0, len(index), input.shape[1], device=index.device), False
    bag = (
        torch.searchsorted(offsets, torch.arange(len(index), device=index.device, dtype=offsets.dtype), right=True) - 1
    )
    B = len(offsets) - include_last_offset
    kept = torch.ones_like(index, dtype=torch.bool) if padding_idx is None else index != padding_idx % len(weight)
    kept = kept & (bag < B)
    # What is left out goes to a bag of its own.
    bag = torch.where(kept, bag, B)
    rows = weight[index]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    number = torch.zeros(B + 1, 1, dtype=weight.dtype, device=weight.device).index_add(
        0, bag, torch.ones_like(rows[:, :1])
    )
    if mode == "max":
        return torch.where(number > 0, _largest(rows, bag, B), 0)[:B]
    total = torch.zeros(B + 1, weight.shape[1], dtype=weight.dtype, device=weight.device).index_add(0, bag, rows)
    return (total / number.clamp_min(1) if mode == "mean" else total)[:B]


def _largest(rows: Float[Tensor, "T D"], bag: Int[Tensor, " T"], B: int) -> Float[Tensor, "C D"]:
    """Return the largest entry of every bag, `C = B + 1`; the rows of a bag need not be neighbours."""
    order = bag.argsort(stable=True)
    sizes = torch.bincount(bag, minlength=B + 1)
    place = torch.arange(len(bag), device=bag.device) - (sizes.cumsum(0) - sizes)[bag[order]]
    table = torch.full(
        (B + 1, max(1, int(sizes.max())), rows.shape[1]), -torch.inf, dtype=rows.dtype, device=rows.device
    )
    return table.index_put((bag[order], place), rows[order]).max(dim=1).values
