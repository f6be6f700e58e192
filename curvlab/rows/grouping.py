"""Entries that are grouped into samples, such as the nodes of separate graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grouping:
    """The sample of each of L entries; the entries of a sample become its positions, in order.

    Attributes:
        sample: of every entry.
        samples: their number N.
    """

    sample: Int[Tensor, " L"]
    samples: int

    @cached_property
    def lengths(self) -> Int[Tensor, " N"]:
        """Number of positions of every sample."""
        return torch.bincount(self.sample, minlength=self.samples)

    @cached_property
    def _slot(self) -> Int[Tensor, " L"]:
        """Position of every entry in its sample."""
        order = self.sample.argsort(stable=True)
        first = self.lengths.cumsum(0) - self.lengths
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device) - first[self.sample[order]]
        return slot

    def spread(self, entries: Tensor, axis: int) -> Tensor:
        """Turn the axis L into `[N, T]`, T ≥ 1 the largest length; positions that a sample lacks are zero."""
        if self.samples == 1 and len(self.sample):
            return entries.unsqueeze(axis)
        longest = max(1, int(self.lengths.max()))
        shape = (*entries.shape[:axis], self.samples, longest, *entries.shape[axis + 1 :])
        spread = entries.new_zeros(shape)
        spread[(slice(None),) * axis + (self.sample, self._slot)] = entries
        return spread

    def add(self, entries: Tensor, axis: int) -> Tensor:
        """Add up the entries of every sample: the axis L becomes N."""
        if self.samples == 1:
            return entries.sum(axis, keepdim=True)
        shape = (*entries.shape[:axis], self.samples, *entries.shape[axis + 1 :])
        return entries.new_zeros(shape).index_add_(axis, self.sample, entries)
