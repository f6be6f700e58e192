"""EKFAC: the Fisher's own diagonal in K-FAC's eigenbasis.

Source: George et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.fisher.block import Batch, Block, BlockState, RunningAverage, Total
from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, TiedBlock
from curvlab.fisher.kfac import KFAC
from curvlab.fisher.kronecker import KroneckerBlock, KroneckerOptions, Sharing
from curvlab.fisher.moment import Moment, decompose
from curvlab.fisher.system import rank_tolerance
from curvlab.rows.parameters import Layout
from curvlab.tools.looks import Look


class Corrected(KroneckerBlock):
    """Replaces K-FAC's entries by the diagonal of the block in the same basis."""

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions, *more: Any) -> None:
        super().__init__(name, layout, options, *more)
        self.corrections = RunningAverage()

    def update(self, batch: Batch) -> None:
        """Average the factors; bring the corrections so far into the basis to which they turned.

        A re-projected correction is the diagonal, in the new basis, of the matrix that it described in the old one.
        """
        total = None if batch.decay == 0 else self.corrections.total
        if total is None:
            self.update_factors(batch)
            return
        units, width = self.units.basis, self.width.basis
        self.update_factors(batch)
        over_units, over_width = self.units.basis.overlaps(units), self.width.basis.overlaps(width)
        total = total if over_units is None else over_units @ total
        self.corrections.total = total if over_width is None else total @ over_width.mT

    def refine(self, batch: Batch) -> None:
        """Average the diagonal in the present basis."""
        diagonal = self.rotate(batch.layers[0]).diagonal().view_as(super().entries())
        batch.average(self.corrections, diagonal)

    def add_up_refined(self, total: Total) -> None:
        """Add up the corrections, which are in one basis, that of the factors of all."""
        self.corrections.add_up(total)

    def entries(self) -> Float[Tensor, "Q r s"]:
        """Return the corrections."""
        return self.corrections.value

    def null(self) -> Bool[Tensor, "Q r s"]:
        """Return which corrections count as null; they are products of two squares, hence round-off squared."""
        values, rtol = self.entries(), self.options.rtol
        if rtol is None:
            rtol = (max(values.shape[1:]) * torch.finfo(values.dtype).eps) ** 2
        small = values <= rank_tolerance(values.flatten(), rtol, 1, values.dtype)
        return small if self.options.sharing != "expand" else small | super().null()

    def state(self) -> BlockState:  # noqa: D102
        return {**super().state(), **{f"corrections.{key}": value for key, value in self.corrections.state().items()}}

    def restore(self, state: BlockState) -> None:  # noqa: D102
        super().restore(state)
        self.corrections.restore({key: state[f"corrections.{key}"] for key in ("total", "weight")})


class _LinearEKFAC(Corrected, LinearBlock):
    """EKFAC of Linear and convolutions."""

    @property
    def _leaves_span(self) -> bool:
        return self.options.sharing != "expand"


class _EmbeddingEKFAC(Corrected, EmbeddingBlock):
    """EKFAC of an embedding."""


class _TiedEKFAC(Corrected, TiedBlock):
    """EKFAC of a table that is looked up and multiplied with; what couples the two uses is in its corrections."""


class EKFAC(KFAC, key="ekfac", summary="the diagonal of F in K-FAC's eigenbasis", look=Look("#56B4E9", "p", "EKFAC")):
    """K-FAC's eigenbasis with the Fisher's own diagonal in it.

    `fit` goes twice over the data, so that many batches give what one would. `update` corrects in the basis of the
    batches so far and re-projects older corrections.

    Args:
        sharing: "expand", "reduce" or "gradient", for weights that are shared over positions.
        max_block: layers without Kronecker factors keep an exact block up to this size, a diagonal one above it.
        max_factor: largest side of a factor that is a matrix; a longer one is diagonal, and so is its part of the basis.
        rtol: rank tolerance of undamped solves, of the factors and relative to the largest correction.
        output_groups: as in `KFAC`.
    """

    adds = False
    passes = 2
    linear = _LinearEKFAC
    embedding = _EmbeddingEKFAC
    tied = _TiedEKFAC

    def __init__(
        self,
        *,
        sharing: Sharing = "expand",
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        output_groups: int = 1,
    ) -> None:
        super().__init__(
            sharing=sharing, max_block=max_block, max_factor=max_factor, rtol=rtol, output_groups=output_groups
        )

    def _prepare_refining(self, blocks: Iterable[Block]) -> None:
        decompose_factors(blocks)


def decompose_factors(blocks: Iterable[Block]) -> None:
    """Find the eigenvectors that corrections are in."""
    corrected = [block for block in blocks if isinstance(block, Corrected)]
    decompose(factor for block in corrected for factor in (block.units, block.width) if isinstance(factor, Moment))
