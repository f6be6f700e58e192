"""K-FAC: `F_l ≈ B ⊗ A` for every layer whose rows are sums of `g ⊗ a`.

    B = Σ_{v,n,t} g gᵀ,   A = Σ_n ω_n (1/T) Σ_t a aᵀ / Σ_n ω_n

with g carrying Λ^{1/2}/√count and ω_n the sample's loss weight. For weights shared over positions t this is K-FAC
*expand*; *reduce* sums g and averages a over t first. Over batches, A averages by Σω and B by the terms of the loss. An
embedding has one-hot inputs, so its A is diagonal. Normalisations and bare parameters keep exact blocks.

Source: Martens & Grosse 2015; Grosse & Martens 2016 (convolutions); Eschenhagen et al. 2023 (expand and reduce).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from curvlab.fisher.block import Block, RowBlock, RowSide
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.kronecker import EmbeddingBlock, KFACBlock, KroneckerOptions, LinearBlock, Sharing
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.layer import EmbeddingRows, KroneckerRows, LayerRows


class _LinearKFAC(LinearBlock, KFACBlock):
    """K-FAC of Linear and convolutions."""


class _EmbeddingKFAC(EmbeddingBlock, KFACBlock):
    """K-FAC of an embedding."""


class KFAC(Structure, key="kfac", summary="B ⊗ A, one Kronecker product a layer"):
    """Kronecker-factored blocks.

    Args:
        sharing: "expand" or "reduce", for weights that are shared over positions.
        factored_damping: put `√ρ·π` on A and `√ρ/π` on B, `π² = (tr A/dim A)/(tr B/dim B)` (Martens & Grosse 2015,
            section 6.3), instead of ρ on the product.
        max_block: layers without Kronecker factors keep an exact block up to this size, a diagonal one above it.
        rtol: rank tolerance of the factors in undamped solves, relative to their λ_max.
    """

    linear: type[LinearBlock] = _LinearKFAC
    embedding: type[EmbeddingBlock] = _EmbeddingKFAC

    def __init__(
        self,
        *,
        sharing: Sharing = "expand",
        factored_damping: bool = False,
        max_block: int = 1024,
        rtol: float | None = None,
    ) -> None:
        super().__init__()
        self._config = KroneckerOptions(sharing, factored_damping, max_block, rtol)

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return asdict(self._config)

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [self._make_block(layer) for layer in rows.layers]

    def _make_block(self, layer: LayerRows) -> Block:
        if isinstance(layer, KroneckerRows):
            return self.linear(layer.name, layer.layout, self._config)
        if isinstance(layer, EmbeddingRows):
            return self.embedding(layer.name, layer.layout, self._config)
        if layer.size <= self._config.max_block:
            return RowBlock(layer.name, [layer.layout], RowSide("parameters", rtol=self._config.rtol))
        return DiagonalBlock(layer, self._config.rtol)

    def _notes(self) -> list[str]:
        def named(what: str, kind: type[Block]) -> list[str]:
            names = [name for block in self._blocks if isinstance(block, kind) for name in block.names]
            return [f"{what}: {', '.join(names)}"] if names else []

        return named("exact blocks", RowBlock) + named("diagonal", DiagonalBlock)
