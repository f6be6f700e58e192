"""Kronecker products of the partial traces of F: `L ⊗ R / tr L`, or one of the two beside the identity.

    L = Σ_r X_r X_rᵀ   [O, O],      R = Σ_r X_rᵀ X_r   [I, I],      F = Σ_r vec X_r vec X_rᵀ

with X_r `[O, I]` what row r is in a layer, units × width with the bias as a column: the gradient of a sample's loss for
`empirical` rows, that of the batch's loss for `rows="batch"`. L and R are the traces of F over inputs and over outputs;
each may be kept as a matrix, as its diagonal, or not at all, which leaves the identity:

    both sides         L ⊗ R / tr L, which has the trace of F, and is F where F = B ⊗ A
    one side           L ⊗ I, or I ⊗ R
    both diagonal      r cᵀ / Σr, r and c the row and column sums of the diagonal of F

In a grouped convolution every group has its own. A table's inputs are one-hot, so that side is diagonal at most; entries are its
outputs. A table that is the weight of a Linear, too, counts as a table. Normalisations and bare parameters keep exact blocks, or
diagonals. Averages over batches are those of L and of R.

Cost: where a layer is applied once to a sample, no X_r is formed, as `L = Σ ‖a‖² g gᵀ` and `R = Σ ‖g‖² a aᵀ`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.fisher.block import Batch, Block
from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, Side, TableBlock, TiedBlock, add
from curvlab.fisher.kronecker import KFACBlock, KroneckerBlock, KroneckerOptions
from curvlab.fisher.kronecker_structure import KroneckerStructure
from curvlab.fisher.moment import DiagonalMoment, Factor, Moment
from curvlab.fisher.trace_factors import DiagonalMomentOverTrace, Identity, MomentOverTrace
from curvlab.rows import Rows
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.products import chunks
from curvlab.rows.tied import TiedRows
from curvlab.tools.looks import Look

Kept = Literal["matrix", "diagonal", "identity"]
"""What is kept of a partial trace."""

Convolution = Literal["derived", "published"]
"""Whether the outputs' trace of a convolution is that of F, or over the root of the number of its positions."""


@dataclass(frozen=True)
class TraceOptions(KroneckerOptions):
    """What is kept of partial traces.

    Attributes:
        outputs: what is kept of L.
        inputs: what is kept of R.
        convolution: how L of a convolution is scaled.
    """

    outputs: Kept = "matrix"
    inputs: Kept = "matrix"
    convolution: Convolution = "derived"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("outputs", self.outputs, Kept),
            ("inputs", self.inputs, Kept),
            ("convolution", self.convolution, Convolution),
        ):
            if value not in get_args(known):
                raise unknown_name(name, value, get_args(known))
        if self.outputs == self.inputs == "identity":
            raise ValueError(
                "outputs and inputs are both 'identity', so that nothing of F is kept. Keep one of them as 'matrix' or 'diagonal'."
            )

    def form(self, side: Side, size: int, *, one_hot: bool = False) -> Kept:
        """Return what a layer keeps of a side, of which long and one-hot ones have no matrix."""
        kept = self.outputs if side == "outputs" else self.inputs
        return "diagonal" if kept == "matrix" and (one_hot or size > self.max_factor) else kept

    def factor(self, side: Side, shape: tuple[int, int], like: Tensor, *, one_hot: bool = False) -> Factor:
        """Return the factor of a side, of some shape (groups, size); L is over its trace where R stands beside it."""
        kept, over_trace = self.form(side, shape[1], one_hot=one_hot), side == "outputs" and self.inputs != "identity"
        if kept == "identity":
            return Identity(*shape, like)
        if kept == "diagonal":
            return (DiagonalMomentOverTrace if over_trace else DiagonalMoment)(self.rtol)
        return (MomentOverTrace if over_trace else Moment)(self.rtol)

    def elements(self, side: Side, shape: tuple[int, int], *, one_hot: bool = False) -> int:
        """Return how many numbers the factor of a side holds."""
        groups, size = shape
        return groups * {"matrix": size**2, "diagonal": size, "identity": 0}[self.form(side, size, one_hot=one_hot)]


class _Traces(KroneckerBlock):
    """The partial traces of a layer as factors."""

    options: TraceOptions

    @property
    def _wanted(self) -> dict[str, bool]:
        """Which of the traces are kept."""
        return {"units": not isinstance(self.units, Identity), "width": not isinstance(self.width, Identity)}

    def _add_traces(self, batch: Batch, pieces: Iterable[tuple[Tensor | None, Tensor | None]]) -> None:
        """Add roots of the traces over the width and over units, of some samples after the others."""
        for position, roots in enumerate(pieces):
            own, weight = (batch, batch.fresh_weight) if position == 0 else (replace(batch, decay=1.0), 0.0)
            for factor, root in zip((self.units, self.width), roots, strict=True):
                if root is not None:
                    add(factor, root, weight, batch.weight, own, additive=batch.additive)


class LinearTraces(LinearBlock, _Traces):
    """Partial traces of Linear and convolutions."""

    options: TraceOptions

    def _factor(self, side: Side, size: int, rows: KroneckerRows) -> Factor:
        return self.options.factor(side, (rows.g.shape[3], size), rows.g)

    @property
    def diagonal_sides(self) -> list[str]:
        """The traces that are diagonal, as they are too large."""
        sides = (("L", self.options.outputs, self.units), ("R", self.options.inputs, self.width))
        return [name for name, kept, factor in sides if kept == "matrix" and isinstance(factor, DiagonalMoment)]

    def elements(self, batch: Batch) -> int:  # noqa: D102
        rows = self._factored(batch.layers[0], KroneckerRows)
        *_, Q, O = rows.g.shape  # noqa: E741
        return self.options.elements("outputs", (Q, O)) + self.options.elements("inputs", (Q, rows.layout.width))

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = batch.layers[0]
        assert isinstance(rows, KroneckerRows)
        if self.options.convolution == "published" and any(len(slot.shape) > 2 for slot in rows.layout.slots):
            rows = replace(rows, g=rows.g * rows.sizes().pow(-0.25).view(len(rows.a), 1, -1, 1))
        self._add_traces(batch, rows.trace_roots(**self._wanted, in_pieces=batch.total is None))


class _TableTraces(TableBlock, _Traces):
    """Partial traces of a table, its rows being inputs and their entries outputs."""

    options: TraceOptions

    def _factor(self, side: Side, size: int, rows: LayerRows) -> Factor:
        return self.options.factor(side, (1, size), rows.row_factors[-1], one_hot=side == "inputs")

    def elements(self, batch: Batch) -> int:
        layout = self._factored(batch.layers[0], self.form).layout
        by_row = self.options.elements("inputs", (1, layout.units), one_hot=True)
        return by_row + self.options.elements("outputs", (1, layout.width))


class EmbeddingTraces(_TableTraces, EmbeddingBlock):
    """Partial traces of an embedding."""

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = batch.layers[0]
        assert isinstance(rows, EmbeddingRows)
        at, entries = rows.by_entry()
        if self._wanted["units"]:
            assert isinstance(self.units, DiagonalMoment)
            energy = entries.square().sum((0, 2))[None]
            by_row = energy.new_zeros(1, rows.layout.units).index_add_(1, at, energy)
            batch.average(self.units.average, by_row)
        if self._wanted["width"]:
            self._add_traces(batch, [(None, entries[None])])


class TiedTraces(_TableTraces, TiedBlock):
    """Partial traces of a table that is looked up and multiplied with, of the rows of both uses together."""

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = batch.layers[0]
        assert isinstance(rows, TiedRows)
        self._add_traces(batch, self._roots(rows, in_pieces=batch.total is None))

    def _roots(self, rows: TiedRows, *, in_pieces: bool) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        V, N = rows.shape
        each = V * (rows.table.positions + rows.head.positions) * rows.layout.units
        for part in chunks(N, each) if in_pieces else [slice(0, N)]:
            yield from rows.select(part).by_position().trace_roots(**self._wanted, in_pieces=False)


class _LinearProduct(LinearTraces, KFACBlock):
    """A product of partial traces, of Linear and convolutions."""


class _EmbeddingProduct(EmbeddingTraces, KFACBlock):
    """A product of partial traces, of an embedding."""


class _TiedProduct(TiedTraces, KFACBlock):
    """A product of partial traces, of a table that is looked up and multiplied with."""


class TraceStructure(KroneckerStructure):
    """What is kept of two partial traces; subclasses with a key say what that is."""

    of_optimiser = True
    linear: type[LinearBlock] = _LinearProduct
    embedding: type[EmbeddingBlock] = _EmbeddingProduct
    tied: type[TiedBlock] = _TiedProduct
    _config: TraceOptions

    def work(self, layout: Layout, *, table: bool = False) -> float:
        """Return the cubes of the sides of matrices, and the sides of diagonals."""
        sides: tuple[Side, Side] = ("inputs", "outputs") if table else ("outputs", "inputs")
        units = self._config.form(sides[0], layout.units, one_hot=table)
        width = self._config.form(sides[1], layout.width)
        exponents = {"matrix": 3, "diagonal": 1, "identity": 0}
        return float(layout.units ** exponents[units] + layout.width ** exponents[width])


class PartialTraces(
    TraceStructure,
    key="partial-traces",
    summary="L ⊗ R / tr L, the partial traces of F",
    look=Look("#6A3D9A", "$S$", "partial traces"),
):
    """Products of the partial traces of F over inputs and outputs.

    With the gradients of batches, `rows="batch"`, its power ½ is what Shampoo with exponents ½ divides by, and its power ¼ times
    `(tr L)^{1/4}` is the `L^{1/4} ⊗ R^{1/4}` of 2018.

    Args:
        outputs: what is kept of L: "matrix", "diagonal", or "identity" for nothing.
        inputs: what is kept of R, likewise.
        factored_damping: put `√ρ·π` on R and `√ρ/π` on L/tr L, π² the ratio of their mean eigenvalues, instead of ρ on the product;
            "equal" puts √ρ on both.
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        max_factor: largest side of a trace that is a matrix; a longer one is diagonal, and the repr names its layer.
        rtol: rank tolerance of the traces in undamped solves, relative to their λ_max.
        invert_every: see `curvlab.fisher.KFAC`.

    Source: Gupta, Koren & Singer 2018 (Shampoo); Morwani et al. 2024 (what its square approximates).
    """

    def __init__(
        self,
        *,
        outputs: Kept = "matrix",
        inputs: Kept = "matrix",
        factored_damping: bool | Literal["equal"] = False,
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        invert_every: int = 1,
    ) -> None:
        super().__init__(
            TraceOptions(
                factored_damping=factored_damping,
                max_block=max_block,
                max_factor=max_factor,
                rtol=rtol,
                invert_every=invert_every,
                outputs=outputs,
                inputs=inputs,
            )
        )


class OutputSide(
    TraceStructure,
    key="output-side",
    summary="L ⊗ I, the trace of F over the inputs of a layer",
    look=Look("#8C510A", "$L$", "output side"),
):
    """The second moment of a layer's gradients over its outputs, `Σ_r X_r X_rᵀ ⊗ I`.

    With `empirical` rows, one a sample, this is NG+, which adds the root of its damping. Its authors leave the parameters of other
    layers to gradient descent; here they have the blocks that they have beside K-FAC.

    Args:
        factored_damping: see `PartialTraces`; the identity takes its share, too.
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        max_factor: largest side of a trace that is a matrix; a longer one is diagonal, and the repr names its layer.
        rtol: rank tolerance in undamped solves, relative to λ_max.
        invert_every: see `curvlab.fisher.KFAC`.
        convolution: "derived" for the trace of F; "published" for that over the root of the number of positions in convolutions, as
            in the authors' code; not for rows of batches, whose positions are those of all samples.

    Source: Yang et al. 2021 (NG+).
    """

    def __init__(
        self,
        *,
        factored_damping: bool | Literal["equal"] = False,
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        invert_every: int = 1,
        convolution: Convolution = "derived",
    ) -> None:
        super().__init__(
            TraceOptions(
                factored_damping=factored_damping,
                max_block=max_block,
                max_factor=max_factor,
                rtol=rtol,
                invert_every=invert_every,
                inputs="identity",
                convolution=convolution,
            )
        )

    def _make_blocks(self, rows: Rows) -> list[Block]:
        if rows.per == "batch" and self._config.convolution == "published":
            raise ValueError(
                "convolution='published' divides by the root of a sample's number of positions, which rows of batches do not tell. "
                "Use rows='sample', or convolution='derived'."
            )
        return super()._make_blocks(rows)


class ColumnScaled(
    TraceStructure,
    key="column-scaled",
    summary="I ⊗ diag R, one number an input of a layer",
    look=Look("#D8B365", "$C$", "column-scaled"),
):
    """The squared norms of the columns of a layer's gradients, `I ⊗ diag(Σ_r X_rᵀX_r)`.

    With `rows="batch"` and no average (decay 0) this is D-NGD: a column of norm t of the gradient becomes one of norm `t/(t² + ρ)`.
    Its authors leave the parameters of other layers to gradient descent; here they have the diagonal of F.

    Args:
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        rtol: rank tolerance in undamped solves, relative to the largest entry.

    Source: the published code of "Diagonal Natural Gradient Descent" (D-NGD).
    """

    def __init__(self, *, max_block: int = 0, rtol: float | None = None) -> None:
        super().__init__(TraceOptions(max_block=max_block, rtol=rtol, outputs="identity", inputs="diagonal"))


class RankOne(
    TraceStructure,
    key="rank-one",
    summary="r cᵀ / Σr, the row and column sums of the diagonal of F",
    look=Look("#FF1493", "$R$", "rank one"),
):
    """The diagonal of F as a matrix of rank one in every layer, from its sums over inputs and over outputs.

    With `rows="batch"` its power ½ is what Adafactor divides by. Vectors keep their diagonal, as there.

    Args:
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        rtol: rank tolerance in undamped solves, of either sums relative to the largest one.

    Source: Shazeer & Stern 2018 (Adafactor).
    """

    def __init__(self, *, max_block: int = 0, rtol: float | None = None) -> None:
        super().__init__(TraceOptions(max_block=max_block, rtol=rtol, outputs="diagonal", inputs="diagonal"))
