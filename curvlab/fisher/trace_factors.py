"""Factors that are not averages themselves: averages over their own traces, and identities, of which there is nothing to keep."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.basis import Basis
from curvlab.fisher.block import BlockState, Total
from curvlab.fisher.inverse import DiagonalInverse
from curvlab.fisher.moment import DiagonalMoment, Factor, Moment


class MomentOverTrace(Moment):
    """`M/tr M` of an average M, in every group; 0 where M is."""

    @property
    def _divisor(self) -> Float[Tensor, "Q 1 1"]:
        traces = self._traces()
        return torch.where(traces > 0, traces, 1)[:, None, None]


class DiagonalMomentOverTrace(DiagonalMoment):
    """`D/tr D` of an average D of diagonals, in every group; 0 where D is."""

    @property
    def values(self) -> Float[Tensor, "Q d"]:
        """The diagonals."""
        assert self.average.total is not None
        traces = self.average.total.sum(-1, keepdim=True)
        return self.average.total / torch.where(traces > 0, traces, 1)


class Identity(Factor):
    """The identity, in every group.

    Args:
        groups: number Q of groups.
        size: d of a group.
        like: a tensor of the type and on the device that products have.
    """

    def __init__(self, groups: int, size: int, like: Tensor) -> None:
        self._ones = like.new_ones(()).expand(groups, size)

    @property
    def basis(self) -> Basis:
        """The unit vectors."""
        return Basis(self._ones, None, torch.zeros_like(self._ones, dtype=torch.bool))

    @property
    def shape(self) -> torch.Size:
        """That of the diagonal."""
        return self._ones.shape

    def inverse(self, damping: Float[Tensor, " Q"]) -> DiagonalInverse:
        """Return `I/(1 + ρ)`."""
        return DiagonalInverse(self._ones / (1 + damping[:, None]))

    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:
        """Return ones."""
        return self._ones[:, 0]

    def add_up(self, total: Total) -> None:
        """Add nothing: it is the same in all processes."""

    def state(self) -> BlockState:
        """Return nothing."""
        return {}

    def restore(self, state: BlockState) -> None:
        """Take nothing back."""
