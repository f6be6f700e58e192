"""K-FAC: `F_l ≈ B ⊗ A` for every layer whose rows are sums of `g ⊗ a`.

    B = Σ_{v,n,t} g gᵀ,   A = Σ_n ω_n (1/T) Σ_t a aᵀ / Σ_n ω_n

with g carrying Λ^{1/2}/√count and ω_n the sample's loss weight. For weights shared over positions t this is K-FAC
*expand*; *reduce* sums g and averages a over t first. Over batches, A averages by Σω and B by the terms of the loss. An
embedding has one-hot inputs, so its A is diagonal. An embedding that is the weight of a Linear, too, has one block for both
uses, see `curvlab.fisher.factors.TiedBlock`. Normalisations and bare parameters keep exact blocks.

In a graph, the positions are its nodes, labelled or not. *gradient* adds the rows of a sample before B is formed, so that
g is the gradient of the total loss at a position, and sums A over all positions:

    B = Σ_{n,t} (Σ_v g)(Σ_v g)ᵀ,   A = Σ_n Σ_t a aᵀ / Σ_n ω_n

With `empirical` rows, inputs that `curvlab.nn.Propagation` has aggregated and `factored_damping="equal"` this is the
preconditioner of Izadi et al. 2020 for L labelled nodes, ω their number: unlabelled nodes enter A with unit weight.
`curvlab.optim` then collects one row a sample, its whole gradient; where loss terms have weights, only that is g.

Source: Martens & Grosse 2015; Grosse & Martens 2016 (convolutions); Eschenhagen et al. 2023 (expand and reduce);
Izadi et al. 2020 (graphs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from curvlab.fisher.block import Block
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, TiedBlock
from curvlab.fisher.kronecker import KFACBlock, KroneckerOptions, Sharing, stagger
from curvlab.fisher.lasting import LastingBlock
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.tied import TiedRows
from curvlab.tools.looks import Look
from curvlab.tools.shown import some


class _LinearKFAC(LinearBlock, KFACBlock):
    """K-FAC of Linear and convolutions."""


class _EmbeddingKFAC(EmbeddingBlock, KFACBlock):
    """K-FAC of an embedding."""


class _TiedKFAC(TiedBlock, KFACBlock):
    """K-FAC of a table that is looked up and multiplied with."""


class KFAC(Structure, key="kfac", summary="B ⊗ A, one Kronecker product a layer", look=Look("#E69F00", "P", "K-FAC")):
    """Kronecker-factored blocks.

    Args:
        sharing: "expand", "reduce" or "gradient", for weights that are shared over positions.
        factored_damping: put `√ρ·π` on A and `√ρ/π` on B, `π² = (tr A/dim A)/(tr B/dim B)` (Martens & Grosse 2015,
            section 6.3), instead of ρ on the product; "equal" puts √ρ on both.
        max_block: layers without Kronecker factors keep an exact block up to this size, a diagonal one above it.
        rtol: rank tolerance of the factors in undamped solves, relative to their λ_max.
        max_factor: largest side of a factor that is a matrix. A longer one, such as that of outputs to a vocabulary, is diagonal;
            the repr names its layer.
        invert_every: with factored damping, updates after which the inverses of a layer's factors, and the factorisation of an
            exact block, are made anew; solves in between use the old ones if the damping is the same. Layers take turns.
        output_groups: cut the outputs of linear layers into so many equal groups, as the packed queries, keys and values of
            attention into 3 or into `3·heads`: B is block-diagonal, A is one. Choose such layers by `PerLayer`.
    """

    averages = True
    by_layer = True
    adds = True
    linear: type[LinearBlock] = _LinearKFAC
    embedding: type[EmbeddingBlock] = _EmbeddingKFAC
    tied: type[TiedBlock] = _TiedKFAC

    def __init__(
        self,
        *,
        sharing: Sharing = "expand",
        factored_damping: bool | Literal["equal"] = False,
        max_block: int = 1024,
        max_factor: int = 8192,
        rtol: float | None = None,
        invert_every: int = 1,
        output_groups: int = 1,
    ) -> None:
        super().__init__()
        self._config = KroneckerOptions(
            sharing, factored_damping, max_block, max_factor, rtol, invert_every, output_groups
        )
        self.joins_positions = sharing == "gradient"

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return asdict(self._config)

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [self._make_block(layer) for layer in rows.layers]

    def _begin(self, blocks: list[Block], rows: Rows) -> None:  # noqa: ARG002
        stagger(blocks)

    def work(self, layout: Layout, *, table: bool = False) -> float:
        """Return the cubes of the sides of the factors, the sides themselves where these are diagonal."""
        sides = ((layout.units, table), (layout.width, False))
        most = self._config.max_factor
        return float(sum(side if diagonal or side > most else side**3 for side, diagonal in sides))

    def _make_block(self, layer: LayerRows) -> Block:
        if isinstance(layer, KroneckerRows):
            return self.linear(layer.name, layer.layout, self._config, layer)
        if isinstance(layer, EmbeddingRows):
            return self.embedding(layer.name, layer.layout, self._config)
        if isinstance(layer, TiedRows):
            return self.tied(layer.name, layer.layout, self._config)
        if layer.size <= self._config.max_block:
            return LastingBlock(layer.name, layer.layout, self._config.rtol, self._config.invert_every)
        return DiagonalBlock(layer.name, layer.layout, self._config.rtol)

    def _notes(self) -> list[str]:
        def named(what: str, kind: type[Block]) -> list[str]:
            names = [name for block in self._blocks if isinstance(block, kind) for name in block.names]
            return [f"{what}: {some(names)}"] if names else []

        long = [
            f"{block.name} ({', '.join(block.diagonal_sides)})"
            for block in self._blocks
            if isinstance(block, LinearBlock) and block.diagonal_sides
        ]
        factors = [f"diagonal factors: {some(long)}"] if long else []
        return factors + named("exact blocks", LastingBlock) + named("diagonal", DiagonalBlock)
