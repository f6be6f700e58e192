"""Structures with one Kronecker product a layer, whatever its factors are."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature

from curvlab.fisher.block import Block
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.factors import EmbeddingBlock, LinearBlock, TiedBlock
from curvlab.fisher.kronecker import KroneckerOptions, stagger
from curvlab.fisher.lasting import LastingBlock
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.tied import TiedRows
from curvlab.tools.shown import some


class KroneckerStructure(Structure):
    """Blocks with two factors for Linear, convolutions and tables; exact or diagonal ones for all other parameters.

    Args:
        config: how layers are factored, and what becomes of those that are not; the constructor's arguments are among it.
    """

    averages = True
    by_layer = True
    adds = True
    linear: type[LinearBlock]
    """Block of Linear and convolutions."""
    embedding: type[EmbeddingBlock]
    """Block of an embedding."""
    tied: type[TiedBlock]
    """Block of a table that is looked up and multiplied with."""

    def __init__(self, config: KroneckerOptions) -> None:
        super().__init__()
        self._config = config

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {name: getattr(self._config, name) for name in signature(type(self)).parameters}

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
            return self.embedding(layer.name, layer.layout, self._config, layer)
        if isinstance(layer, TiedRows):
            return self.tied(layer.name, layer.layout, self._config, layer)
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
