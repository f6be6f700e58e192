"""The diagonal of F in the eigenbasis of its partial traces: EKFAC in another basis.

Given the basis, no other diagonal is nearer to F in the Frobenius norm, that of the product of the traces included.
"""

from __future__ import annotations

from collections.abc import Iterable

from curvlab.fisher.block import Block
from curvlab.fisher.ekfac import Corrected, decompose_factors
from curvlab.fisher.partial_traces import EmbeddingTraces, LinearTraces, TiedTraces, TraceOptions, TraceStructure
from curvlab.tools.looks import Look


class _LinearDiagonal(Corrected, LinearTraces):
    """The diagonal for Linear and convolutions."""


class _EmbeddingDiagonal(Corrected, EmbeddingTraces):
    """The diagonal for an embedding."""


class _TiedDiagonal(Corrected, TiedTraces):
    """The diagonal for a table that is looked up and multiplied with."""


class PartialTracesDiagonal(
    TraceStructure,
    key="partial-traces-diagonal",
    summary="the diagonal of F in the eigenbasis of its partial traces",
    look=Look("#66A61E", "$Q$", "partial traces, diagonal"),
):
    """The eigenbasis of L and R with the diagonal of F in it.

    With `rows="batch"` its power ½ is what SOAP multiplies with. Vectors keep their diagonal, as there. `fit` goes twice over the
    data; `update` corrects in the basis of the batches so far and re-projects older corrections, see `curvlab.fisher.EKFAC`.

    Args:
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        max_factor: largest side of a trace that is a matrix; a longer one is diagonal, and so is its part of the basis.
        rtol: rank tolerance of undamped solves, of the traces and relative to the largest entry.

    Source: Vyas et al. 2024 (SOAP).
    """

    adds = False
    passes = 2
    linear = _LinearDiagonal
    embedding = _EmbeddingDiagonal
    tied = _TiedDiagonal

    def __init__(self, *, max_block: int = 0, max_factor: int = 8192, rtol: float | None = None) -> None:
        super().__init__(TraceOptions(max_block=max_block, max_factor=max_factor, rtol=rtol))

    def _prepare_refining(self, blocks: Iterable[Block]) -> None:
        decompose_factors(blocks)
