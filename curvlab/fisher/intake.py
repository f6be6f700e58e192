"""A batch whose rows arrive layer by layer, for structures that treat every layer by itself.

intake = structure.intake(rows_without_layers, number, first=True)
intake.take(layer)      # as often as there are layers, or parts of their rows; nothing of it is kept but moments
structure.take_in(intake, number)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from curvlab.fisher.block import Batch, Block, batches_of
from curvlab.fisher.memory import check_memory
from curvlab.fisher.serialise import without_numbers
from curvlab.rows import Rows
from curvlab.rows.layer import LayerRows
from curvlab.rows.sweep import in_parameter_order


class Intake:
    """Takes the rows of one layer after the other.

    Args:
        key: of the structure, for messages.
        head: rows without layers.
        decay: weight of the state so far.
        known: the blocks of the layers by the layer's name, empty before the first batch.
        make: cuts a layer's parameters into blocks.
        absorb: lets a block add its share.
    """

    def __init__(
        self,
        key: str,
        head: Rows,
        decay: float,
        known: dict[str, list[Block]],
        make: Callable[[Rows], list[Block]],
        absorb: Callable[[Block, Batch], None],
    ) -> None:
        self.key, self.head, self.decay, self.known, self.make, self.absorb = key, head, decay, known, make, absorb
        self._layers: list[LayerRows] = []
        self._blocks: dict[str, list[Block]] = {}

    def take(self, layer: LayerRows) -> None:
        """Add the rows of a layer, or more of them; those in half precision are converted to float32."""
        rows = replace(self.head, layers=(layer.to(torch.promote_types(layer.dtype, torch.float32)),))
        if (taken := self._blocks.get(layer.name)) is not None:
            for block, batch in zip(taken, batches_of(taken, rows, 1.0), strict=True):
                self.absorb(block, replace(batch, further=True))
            return
        blocks = self.known[layer.name] if self.known else self.make(rows)
        batches = batches_of(blocks, rows, self.decay)
        check_memory(self.key, blocks, batches)
        for block, batch in zip(blocks, batches, strict=True):
            self.absorb(block, batch)
        self._layers += without_numbers(rows).layers
        self._blocks[layer.name] = blocks

    @property
    def rows(self) -> Rows:
        """Rows of zeros, without memory, of the layers that have arrived."""
        layers = in_parameter_order(self.head.space.shapes, self._layers)
        return replace(without_numbers(replace(self.head, layers=())), layers=layers)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the layers that have arrived, in the order of the parameters."""
        return [block for layer in self.rows.layers for block in self._blocks[layer.name]]
