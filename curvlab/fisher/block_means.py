"""The diagonal of the Fisher matrix, averaged over blocks of parameters: one number a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import unknown_name
from curvlab.fisher.block import Batch, Block, check_rtol
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.parameters import Layout
from curvlab.tools.looks import Look

Blocks = Literal["units", "parameters"]
"""Over what is averaged: an output unit of a weight, a whole parameter."""


class _MeansBlock(DiagonalBlock):
    """The diagonal of one layer's block, of which only means are kept."""

    def __init__(self, name: str, layout: Layout, rtol: float | None, labels: Int[Tensor, " P_l"]) -> None:
        super().__init__(name, layout, rtol)
        self._labels = labels
        self._sizes = torch.bincount(labels)

    @property
    def values(self) -> Float[Tensor, " P_b"]:
        """The means, at every entry of their blocks."""
        return self.average.value[self._labels]

    def elements(self, batch: Batch) -> int:  # noqa: ARG002
        return len(self._sizes)

    def update(self, batch: Batch) -> None:
        diagonal = batch.layers[0].diagonal()
        sums = diagonal.new_zeros(len(self._sizes)).index_add_(0, self._labels, diagonal)
        batch.average(self.average, sums / self._sizes)


class BlockMeans(
    Structure,
    key="block-means",
    summary="the mean of the diagonal of F over a unit, or over a parameter",
    look=Look("#B3A2D9", "$M$", "block means"),
):
    """The diagonal of `F`, averaged over blocks.

    With `rows="batch"` its power ½ is what Adam-mini divides by, whose authors have one number for all that forms a dense block of
    the Hessian: an output unit in most layers, a row of a table.

    Args:
        blocks: "units" for the incoming weights of an output, or the row of a table, with vectors such as biases as a whole;
            "parameters" for every parameter as a whole.
        rtol: entries up to `rtol` times a layer's largest count as zero in undamped solves; ε if None.

    Source: Zhang et al. 2024 (Adam-mini).
    """

    averages = True
    by_layer = True
    adds = True
    of_optimiser = True

    def __init__(self, *, blocks: Blocks = "units", rtol: float | None = None) -> None:
        super().__init__()
        if blocks not in get_args(Blocks):
            raise unknown_name("blocks", blocks, get_args(Blocks))
        check_rtol(rtol)
        self._over, self._rtol = blocks, rtol

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"blocks": self._over, "rtol": self._rtol}

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [
            _MeansBlock(layer.name, layer.layout, self._rtol, self._labels(layer.layout, rows.device))
            for layer in rows.layers
        ]

    def _labels(self, layout: Layout, device: torch.device) -> Int[Tensor, " P_l"]:
        """Number the blocks of a layer, and say to which every entry belongs."""
        columns, blocks = [], 0
        for slot in layout.slots:
            by_unit = self._over == "units" and len(slot.shape) > 1
            count = layout.units if by_unit else 1
            label = blocks + torch.arange(layout.units, device=device) % count
            columns.append(label[:, None].expand(-1, slot.stop - slot.start))
            blocks += count
        return torch.cat(columns, dim=1).flatten()
