"""`I ⊗ A`: K-FAC with nothing but the inputs of a layer.

    A = Σ_n ω_n (1/T) Σ_t a aᵀ / Σ_n ω_n

as in `curvlab.fisher.kfac`. It knows no targets and no outputs: its solve whitens what a layer sees.
"""

from __future__ import annotations

from typing import Literal

from curvlab.errors import UnsupportedModel, unknown_name
from curvlab.fisher.block import Batch, Block
from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, Side
from curvlab.fisher.kronecker import KFACBlock, KroneckerOptions
from curvlab.fisher.kronecker_structure import KroneckerStructure
from curvlab.fisher.moment import Factor
from curvlab.fisher.trace_factors import Identity
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.tied import TiedRows
from curvlab.tools.looks import Look


class _LinearInputs(LinearBlock, KFACBlock):
    """The inputs of Linear and convolutions."""

    def _factor(self, side: Side, size: int, rows: KroneckerRows) -> Factor:
        return Identity(rows.g.shape[3], size, rows.g) if side == "outputs" else super()._factor(side, size, rows)

    def elements(self, batch: Batch) -> int:
        rows = self._factored(batch.layers[0], KroneckerRows)
        Q, I = rows.g.shape[3], rows.layout.width  # noqa: E741
        return Q * (I if self.options.max_factor < I else I**2)

    def update_factors(self, batch: Batch) -> None:
        rows, weights = self._shared(batch)
        assert isinstance(rows, KroneckerRows)
        if not batch.further:
            self._add_inputs(rows, weights, batch)


class _EmbeddingInputs(EmbeddingBlock, KFACBlock):
    """The inputs of an embedding, which are one-hot."""

    def _factor(self, side: Side, size: int, rows: LayerRows) -> Factor:
        return Identity(1, size, rows.row_factors[-1]) if side == "outputs" else super()._factor(side, size, rows)

    def elements(self, batch: Batch) -> int:
        return self._factored(batch.layers[0], EmbeddingRows).layout.units

    def update_factors(self, batch: Batch) -> None:
        rows, weights = self._shared(batch)
        assert isinstance(rows, EmbeddingRows)
        if not batch.further:
            self._add_frequency(rows, weights, batch)


class InputSide(
    KroneckerStructure,
    key="input-side",
    summary="I ⊗ A, the second moment of the inputs of a layer",
    look=Look("#1F4E4E", "$A$", "input side"),
):
    """The second moment of a layer's inputs, for all its outputs alike.

    This is the "local Fisher layer" of structured natural gradient descent. Normalisations and bare parameters keep blocks of F.

    Args:
        sharing: "expand" or "reduce", for weights that are shared over positions, see `curvlab.fisher.kfac`.
        factored_damping: see `curvlab.fisher.KFAC`; the identity takes its share, too.
        max_block: other layers keep an exact block up to this size, a diagonal one above it.
        max_factor: largest side of an A that is a matrix; a longer one is diagonal, and the repr names its layer.
        rtol: rank tolerance of A in undamped solves, relative to λ_max.
        invert_every: see `curvlab.fisher.KFAC`.

    Raises:
        UnsupportedModel: by `update`, for a table that is the weight of a Linear, too, and so sees two kinds of inputs.

    Source: Liu et al. 2024 (SNGD), with the inputs' moment for the local Fisher matrix.
    """

    of_optimiser = True
    linear = _LinearInputs
    embedding = _EmbeddingInputs

    def __init__(
        self,
        *,
        sharing: Literal["expand", "reduce"] = "expand",
        factored_damping: bool | Literal["equal"] = False,
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        invert_every: int = 1,
    ) -> None:
        if sharing not in ("expand", "reduce"):
            raise unknown_name("sharing", sharing, ("expand", "reduce"))
        super().__init__(KroneckerOptions(sharing, factored_damping, max_block, max_factor, rtol, invert_every))

    def work(self, layout: Layout, *, table: bool = False) -> float:
        """Return the cube of the width, the side itself where A is diagonal."""
        side, diagonal = (layout.units, True) if table else (layout.width, layout.width > self._config.max_factor)
        return float(side if diagonal else side**3)

    def _make_block(self, layer: LayerRows) -> Block:
        if isinstance(layer, TiedRows):
            raise UnsupportedModel(
                f"The table of {layer.name!r} is looked up and multiplied with: its inputs are table rows in one use, and vectors "
                "in the other, so that it has no second moment of inputs. Choose another structure for it, such as "
                f"PerLayer({{{layer.name!r}: KFAC(), '*': InputSide()}})."
            )
        return super()._make_block(layer)
