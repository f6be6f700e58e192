"""EKFAC: the Fisher's own diagonal in K-FAC's eigenbasis.

Source: George et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Batch, RunningAverage
from curvlab.fisher.kfac import KFAC
from curvlab.fisher.kronecker import EmbeddingBlock, KroneckerBlock, LinearBlock
from curvlab.fisher.moment import Basis, State
from curvlab.fisher.system import rank_tolerance
from curvlab.rows import Rows


class _Corrected(KroneckerBlock):
    """Replaces K-FAC's entries by the diagonal of the block in the same basis.

    When a new batch turns the basis, the corrections so far are re-projected: the diagonal, in the new basis, of the matrix
    that they described.
    """

    phase: Literal["both", "factors", "corrections"] = "both"
    _corrections: RunningAverage | None = None

    @property
    def corrections(self) -> RunningAverage:
        """Running average of the diagonal."""
        if self._corrections is None:
            self._corrections = RunningAverage()
        return self._corrections

    def update(self, batch: Batch) -> None:
        """Average the factors, then the corrections in their basis."""
        if self.phase != "corrections":
            old = (self.units.basis, self.width.basis) if self._keeps(batch) else None
            self.update_factors(batch)
            if old is not None:
                self._reproject(*old)
        if self.phase != "factors":
            diagonal = self.rotate(batch.layers[0]).diagonal().view(*self._shape())
            self.corrections.update(diagonal, batch.terms, batch.decay, additive=batch.additive)

    def _keeps(self, batch: Batch) -> bool:
        return self.phase == "both" and batch.decay > 0 and self.corrections.total is not None

    def _shape(self) -> tuple[int, int, int]:
        units, width = self.units.basis.values, self.width.basis.values
        return units.shape[0], units.shape[1], width.shape[1]

    def _reproject(self, units: Basis, width: Basis) -> None:
        total = self.corrections.total
        assert total is not None
        for_units, for_width = self.units.basis.overlaps(units), self.width.basis.overlaps(width)
        total = total if for_units is None else for_units @ total
        self.corrections.total = total if for_width is None else total @ for_width.mT

    def entries(self) -> Float[Tensor, "Q r s"]:
        """Return the corrections."""
        return self.corrections.value

    def null(self) -> Float[Tensor, "Q r s"]:
        """Return which corrections count as null."""
        values = self.entries().flatten()
        return (values <= rank_tolerance(values, self.rtol, len(values))).view_as(self.entries())

    @property
    def rtol(self) -> float | None:
        """Rank tolerance, that of the factor over the width."""
        return getattr(self.width, "rtol", None)

    def state(self) -> State:  # noqa: D102
        return {**super().state(), "corrections": self.corrections.total, "corrections_weight": self.corrections.weight}

    def restore(self, state: State) -> None:  # noqa: D102
        super().restore(state)
        total, weight = state["corrections"], state["corrections_weight"]
        assert isinstance(total, Tensor) and isinstance(weight, float)
        self.corrections.total, self.corrections.weight = total, weight


class _LinearEKFAC(_Corrected, LinearBlock):
    """EKFAC of Linear and convolutions."""


class _EmbeddingEKFAC(_Corrected, EmbeddingBlock):
    """EKFAC of an embedding."""


class EKFAC(KFAC, key="ekfac", summary="the diagonal of F in K-FAC's eigenbasis"):
    """K-FAC's eigenbasis with the Fisher's own diagonal in it.

    `fit` goes twice over the data, so that many batches give what one would. `update` corrects in the basis of the batches
    so far and re-projects older corrections.

    Args:
        sharing: see `KFAC`.
        max_block: see `KFAC`.
        rtol: rank tolerance of undamped solves, relative to the largest correction.
    """

    linear = _LinearEKFAC
    embedding = _EmbeddingEKFAC

    def __init__(
        self, *, sharing: Literal["expand", "reduce"] = "expand", max_block: int = 1024, rtol: float | None = None
    ) -> None:
        super().__init__(sharing=sharing, max_block=max_block, rtol=rtol)

    @property
    def options(self) -> dict[str, object]:
        """The configuration."""
        return {name: value for name, value in super().options.items() if name != "factored_damping"}

    def _fit(self, sweeps: Callable[[], Iterable[Rows]]) -> None:
        self._phase: Literal["both", "factors", "corrections"] = "factors"
        super()._fit(sweeps)
        self._set_phase("corrections")
        decay = 0.0
        for rows in sweeps():
            for block in self._kronecker_blocks():
                layer = block.of(rows)
                block.update(Batch(layer, rows.terms, decay, rows.reduction == "sum", rows.sample_weights))
            decay = 1.0
        self._set_phase("both")
        self._phase = "both"

    _phase = "both"

    def _make_blocks(self, rows: Rows) -> list:  # type: ignore[type-arg]
        blocks = super()._make_blocks(rows)
        for block in blocks:
            if isinstance(block, _Corrected):
                block.phase = self._phase
        return blocks

    def _set_phase(self, phase: Literal["both", "factors", "corrections"]) -> None:
        for block in self._blocks:
            if isinstance(block, _Corrected):
                block.phase = phase
