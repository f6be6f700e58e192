"""The Kronecker factors of layers: of Linear and convolutions, of embeddings, and of tables that are both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.fisher.block import Batch
from curvlab.fisher.inverse import DiagonalInverse, Inverse
from curvlab.fisher.kronecker import KroneckerBlock, KroneckerOptions
from curvlab.fisher.moment import DiagonalMoment, Factor, Moment
from curvlab.fisher.on_vectors import is_on_vectors
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.tied import TiedRows

Side = Literal["outputs", "inputs"]
"""The two sides of a linear map, or of a table, whose inputs are the choice of its row."""


class LinearBlock(KroneckerBlock):
    """Factors of a layer whose rows are `Σ_t g ⊗ a`: B over units, A over the width, one pair a group.

    Where a layer's outputs are cut into groups, as into heads, there is a B for each of these, and one A.

    Args:
        name: of the layer.
        layout: of its parameters.
        options: how layers are factored.
        rows: of the layer.

    Raises:
        ValueError: if its outputs cannot be cut.
    """

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions, rows: KroneckerRows) -> None:
        super().__init__(name, layout, options)
        groups, (Q, O) = options.output_groups, rows.g.shape[3:]  # noqa: E741
        if groups > 1 and (Q > 1 or O % groups):
            raise ValueError(
                f"output_groups={groups} does not cut layer {name!r}, which has {Q} groups of {O} outputs. Choose layers by "
                "curvlab.fisher.PerLayer."
            )
        self.units = self._factor("outputs", O // groups, rows)
        self.width = self._factor("inputs", layout.width, rows)

    def _factor(self, side: Side, size: int, rows: KroneckerRows) -> Factor:  # noqa: ARG002
        if size > self.options.max_factor:
            return DiagonalMoment(self.options.rtol)
        return Moment(self.options.rtol, complete=self._leaves_span)

    @property
    def diagonal_sides(self) -> list[str]:
        """The factors that are diagonal, as they are too large."""
        return [side for side, factor in (("B", self.units), ("A", self.width)) if isinstance(factor, DiagonalMoment)]

    def elements(self, batch: Batch) -> int:  # noqa: D102
        rows = self._factored(batch.layers[0], KroneckerRows)
        (*_, Q, O), I = rows.g.shape, rows.layout.width  # noqa: E741
        k = self.options.output_groups
        sides = {O // k: Q * k, I: Q} if O // k != I else {I: Q * (k + 1)}
        return sum(n * (side if side > self.options.max_factor else side**2) for side, n in sides.items())

    @property
    def _leaves_span(self) -> bool:
        """Whether the block is not zero outside the range of the factors."""
        return False

    @property
    def _reduce(self) -> bool:
        return self.options.sharing == "reduce"

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows, weights = self._shared(batch)
        assert isinstance(rows, KroneckerRows)
        outputs = self._cut(rows).output_root(reduce=self._reduce)
        if not batch.further:
            self._add_inputs(rows, weights, batch)
        add(self.units, outputs, batch.fresh_weight, batch.weight, batch, additive=batch.additive)

    def _add_inputs(self, rows: KroneckerRows, weights: Float[Tensor, " N"], batch: Batch) -> None:
        """Add to A, some samples after the others where their inputs are not unfolded yet."""
        pieces = list(rows.pieces()) if batch.total is None else [slice(None)]
        for position, part in enumerate(pieces):
            inputs, scale = rows.select(part).input_root(weights[part], reduce=self._reduce)
            weight = float(batch.sample_weights.sum()) if position == 0 else 0.0
            own = batch if position == 0 else replace(batch, decay=1.0)
            add(self.width, inputs, weight, scale, own, additive=False)

    def _cut(self, rows: KroneckerRows, inputs: Tensor | None = None) -> KroneckerRows:
        """Return the same rows with outputs in groups, which see the same inputs, or others that are given."""
        k = self.options.output_groups
        if k == 1:
            return rows if inputs is None else replace(rows, a=inputs)
        a = rows.a if inputs is None else inputs
        return replace(rows, a=a.expand(-1, -1, k, -1), g=rows.g.flatten(3).unflatten(3, (k, -1)))

    def spans(self, rows: LayerRows) -> bool:  # noqa: D102
        return self.options.sharing == "expand" or (self._reduce and is_on_vectors(rows))

    def rotate(self, rows: LayerRows) -> KroneckerRows:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        u, v = self.units.basis, self.width.basis
        (Q, r), s = u.values.shape, v.values.shape[1]
        layout = Layout.of(Q * r, {rows.name: torch.Size((Q, r, s))})
        cut = self._cut(rows, None if v.vectors is None else torch.einsum("ntqi,qij->ntqj", rows.a, v.vectors))
        outputs = cut.g if u.vectors is None else torch.einsum("vntqo,qop->vntqp", cut.g, u.vectors)
        return KroneckerRows(rows.name, layout, cut.a, outputs, rows.lengths)

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "S s"]
    ) -> KroneckerRows:
        assert isinstance(rows, KroneckerRows)
        return replace(rows, a=rows.a * width, g=rows.g * units)

    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> KroneckerRows:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        cut = self._cut(rows, _per_group(rows.a, width))
        return replace(cut, g=_per_group(cut.g, units))

    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:  # noqa: D102
        assert isinstance(rows, KroneckerRows)
        (V, N, T, _, O), I = rows.g.shape, rows.layout.width  # noqa: E741
        adding = N * T * O * I if summed else 0
        return N * T * ((1 if summed else V) * O**2 + I**2) + adding < O * I * (O + I)


def add(
    factor: Factor, root: Float[Tensor, "Q m t d"], weight: float, scale: float, batch: Batch, *, additive: bool
) -> None:
    """Add `scale·Σ x xᵀ` over x in the root to a factor, or its diagonal where that is all it keeps."""
    if isinstance(factor, DiagonalMoment):
        diagonal = scale * root.square().sum((1, 2))
        factor.update(diagonal, weight, batch.decay, additive=additive, total=batch.total)
    else:
        assert isinstance(factor, Moment)
        factor.update(root, weight, batch.decay, scale=scale, additive=additive, total=batch.total)


def _per_group(x: Float[Tensor, "*K T Q d"], inverse: Inverse) -> Float[Tensor, "*K T Q d"]:
    """Multiply the rows of every group with its inverse."""
    return inverse.times_rows(x.transpose(-3, -2)).transpose(-3, -2)


class TableBlock(KroneckerBlock):
    """Factors of a table: diagonal over its rows, a matrix over their entries."""

    form: ClassVar[type[LayerRows]]
    """Class of the rows of such a table."""

    def __init__(self, name: str, layout: Layout, options: KroneckerOptions, rows: LayerRows) -> None:
        super().__init__(name, layout, options)
        self.units = self._factor("inputs", layout.units, rows)
        self.width = self._factor("outputs", layout.width, rows)

    def _factor(self, side: Side, size: int, rows: LayerRows) -> Factor:  # noqa: ARG002
        return DiagonalMoment() if side == "inputs" else Moment(self.options.rtol)

    def elements(self, batch: Batch) -> int:  # noqa: D102
        self._factored(batch.layers[0], self.form)
        return self.parts[0].units + self.parts[0].width ** 2

    def _add_entries(self, root: Float[Tensor, "m t I"], batch: Batch) -> None:
        """Add `Σ x xᵀ` over x in the root to the matrix, with the weight of the batch."""
        add(self.width, root[None], batch.fresh_weight, batch.weight, batch, additive=batch.additive)

    def _rotation(self, rows: LayerRows) -> tuple[Layout, Callable[[Tensor], Tensor]]:
        """Return the layout of rotated rows, and what multiplies with the eigenvectors of the factor over entries."""
        U, basis = rows.layout.units, self.width.basis
        layout = Layout.of(U, {rows.name: torch.Size((U, basis.values.shape[1]))})
        return layout, lambda x: x if basis.vectors is None else x @ basis.vectors[0]


class EmbeddingBlock(TableBlock):
    """Factors of an embedding: A, diagonal over the table's rows, and B over their entries."""

    form = EmbeddingRows

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows, weights = self._shared(batch)
        assert isinstance(rows, EmbeddingRows)
        if not batch.further:
            self._add_frequency(rows, weights, batch)
        self._add_entries(rows.output_root(), batch)

    def _add_frequency(self, rows: EmbeddingRows, weights: Float[Tensor, " N"], batch: Batch) -> None:
        """Add to A."""
        assert isinstance(self.units, DiagonalMoment)
        weight = float(batch.sample_weights.sum())
        self.units.update(rows.frequency(weights)[None], weight, batch.decay, total=batch.total)

    def rotate(self, rows: LayerRows) -> EmbeddingRows:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        layout, rotate = self._rotation(rows)
        return replace(rows, layout=layout, g=rotate(rows.g))

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> EmbeddingRows:
        assert isinstance(rows, EmbeddingRows)
        return replace(rows, g=rows.g * width[0] * units[0, rows.index][..., None])

    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> EmbeddingRows:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        assert isinstance(units, DiagonalInverse)
        weights = units.diagonal[0, rows.index][..., None]
        return replace(rows, g=width.times_rows(rows.g[..., None, :, :])[..., 0, :, :] * weights)

    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:  # noqa: D102
        assert isinstance(rows, EmbeddingRows)
        return rows.g.shape[summed:3].numel() < rows.layout.units


class TiedBlock(TableBlock):
    """Factors of a table that is looked up and multiplied with: its partial traces, over positions of both uses.

        F ≈ D ⊗ W / tr W,   D = diag_u(Σ_p |x_p|²_u),   W = Σ_p x_pᵀx_p

    with x_p `[units, width]` what position p of a use adds to a row. Positions count as independent, and D is diagonal. So the
    block has the trace of F, traces of its blocks of table rows and the sum of these, as far as positions do not interact;
    scales of the two uses need not match. *reduce* and *gradient* do not apply to it.
    """

    form = TiedRows

    def update_factors(self, batch: Batch) -> None:  # noqa: D102
        rows = self._factored(batch.layers[0], TiedRows)
        by_unit, root = rows.partial_traces()
        by_unit = batch.weight * by_unit
        assert isinstance(self.units, DiagonalMoment)
        self.units.update(by_unit[None], float(by_unit.sum()), batch.decay, total=batch.total)
        self._add_entries(root[None], batch)

    def rotate(self, rows: LayerRows) -> TiedRows:  # noqa: D102
        return _in_columns(rows, *self._rotation(rows))

    def weigh(  # noqa: D102
        self, rows: LayerRows, units: Float[Tensor, "Q r"], width: Float[Tensor, "Q s"]
    ) -> TiedRows:
        return _by_unit(_in_columns(rows, rows.layout, lambda x: x * width[0]), units[0])

    def weigh_by_inverses(self, rows: LayerRows, units: Inverse, width: Inverse) -> TiedRows:  # noqa: D102
        assert isinstance(units, DiagonalInverse)
        through = _in_columns(rows, rows.layout, lambda x: width.times_rows(x[..., None, :, :])[..., 0, :, :])
        return _by_unit(through, units.diagonal[0])

    def worth_factoring(self, rows: LayerRows, *, summed: bool = False) -> bool:  # noqa: D102
        assert isinstance(rows, TiedRows)
        (_, N, T, I), S, U = rows.table.g.shape, rows.head.positions, rows.layout.units  # noqa: E741
        V = 1 if summed else len(rows.head.g)
        return N * (V * T + S) * I + (N * S * U if summed else 0) < U * I


def _in_columns(rows: LayerRows, layout: Layout, function: Callable[[Tensor], Tensor]) -> TiedRows:
    """Apply a linear map of `[…, I]` to the columns of a table's rows."""
    assert isinstance(rows, TiedRows)
    table = replace(rows.table, layout=layout, g=function(rows.table.g))
    head = replace(rows.head, layout=layout, a=function(rows.head.a[:, :, 0])[:, :, None])
    return TiedRows(rows.name, layout, table, head)


def _by_unit(rows: TiedRows, weights: Float[Tensor, " U"]) -> TiedRows:
    """Multiply the rows of a table with weights."""
    table = replace(rows.table, g=rows.table.g * weights[rows.table.index][..., None])
    return replace(rows, table=table, head=replace(rows.head, g=rows.head.g * weights))
