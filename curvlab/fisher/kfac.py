"""K-FAC: `F_l ≈ B ⊗ A` for every layer whose rows are sums of `g ⊗ a`.

    B = Σ_{v,n,t} g gᵀ,   A = Σ_n ω_n (1/T) Σ_t a aᵀ / Σ_n ω_n

with g carrying Λ^{1/2}/√count and ω_n the sample's loss weight. For weights shared over positions t this is K-FAC
*expand*; *reduce* sums g and averages a over t first. Over batches, A averages by Σω and B by the terms of the loss. An
embedding has one-hot inputs, so its A is diagonal. Normalisations and bare parameters keep exact blocks.

Source: Martens & Grosse 2015; Grosse & Martens 2016 (convolutions); Eschenhagen et al. 2023 (expand and reduce).
"""

from __future__ import annotations

from collections.abc import Mapping

from curvlab.fisher.block import Block, RowBlock, RowSide
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.kronecker import EmbeddingBlock, KFACBlock, KroneckerBlock, LinearBlock, Sharing
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.layer import EmbeddingRows, KroneckerRows


class _LinearKFAC(LinearBlock, KFACBlock):
    """K-FAC of Linear and convolutions."""


class _EmbeddingKFAC(EmbeddingBlock, KFACBlock):
    """K-FAC of an embedding."""


class KFAC(Structure, key="kfac", summary="B ⊗ A, one Kronecker product a layer"):
    """Kronecker-factored blocks.

    Args:
        sharing: "expand" or "reduce", for weights that are shared over positions.
        factored_damping: put `√ρ·π` on A and `√ρ/π` on B, `π² = (tr A/dim A)/(tr B/dim B)` (Martens & Grosse 2015, section
            6.3), instead of ρ on the product.
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
        if sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing is 'expand' or 'reduce', got {sharing!r}.")
        if max_block < 0:
            raise ValueError(f"max_block is a number of parameters, got {max_block}.")
        self._sharing: Sharing = sharing
        self._factored_damping = factored_damping
        self._max_block = max_block
        self._exact = RowSide("parameters", rtol=rtol)

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {
            "sharing": self._sharing,
            "factored_damping": self._factored_damping,
            "max_block": self._max_block,
            "rtol": self._exact.rtol,
        }

    def _make_blocks(self, rows: Rows) -> list[Block]:
        blocks: list[Block] = []
        rtol = self._exact.rtol
        for layer in rows.layers:
            if isinstance(layer, KroneckerRows):
                blocks.append(self.linear(layer.name, layer.layout, self._factored_damping, self._sharing, rtol))
            elif isinstance(layer, EmbeddingRows):
                blocks.append(self.embedding(layer.name, layer.layout, self._factored_damping, rtol))
            elif layer.size <= self._max_block:
                blocks.append(RowBlock(layer.name, [layer.layout], self._exact))
            else:
                blocks.append(DiagonalBlock(layer.name, [layer.layout], rtol))
        return blocks

    def _notes(self) -> list[str]:
        def named(what: str, kind: type[Block]) -> list[str]:
            names = [name for block in self._blocks if isinstance(block, kind) for name in block.names]
            return [f"{what}: {', '.join(names)}"] if names else []

        return named("exact blocks", RowBlock) + named("diagonal", DiagonalBlock)

    def _kronecker_blocks(self) -> list[KroneckerBlock]:
        return [block for block in self._blocks if isinstance(block, KroneckerBlock)]
