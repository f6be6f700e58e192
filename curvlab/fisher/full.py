"""The full Fisher matrix, and its restriction to diagonal blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from curvlab.errors import PartitionError, unknown_name
from curvlab.fisher.block import Block
from curvlab.fisher.row_block import RowBlock
from curvlab.fisher.side import RowSide, Side
from curvlab.fisher.structure import Structure
from curvlab.rows import Rows
from curvlab.rows.parameters import Layout
from curvlab.tools.looks import Look
from curvlab.tools.text import as_names


class RowStructure(Structure):
    """A structure whose blocks are exact Fisher blocks."""

    within_layers: ClassVar[bool] = False
    """Whether no block reaches over several layers."""

    def __init__(self, *, side: Side = "auto", window: int | None = None, rtol: float | None = None) -> None:
        super().__init__()
        self._config = RowSide(side, window, rtol)
        self.by_layer = self.within_layers and side == "parameters"

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"side": self._config.side, "window": self._config.window, "rtol": self._config.rtol}

    @property
    def _window(self) -> int | None:
        return self._config.window


class Full(RowStructure, key="full", summary="F = SᵀS itself", look=Look("#000000", "o", "full")):
    """The full matrix `F = SᵀS`.

    With R rows and P parameters it is kept as rows, and solved with `[R, R]`, or as `[P, P]`, whichever is smaller.

    Args:
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.
    """

    def _make_blocks(self, rows: Rows) -> list[Block]:
        parts = [layer.layout for layer in rows.layers]
        return [RowBlock(", ".join(layer.name for layer in rows.layers), parts, self._config)]


class BlockDiagonal(
    RowStructure,
    key="block-diagonal",
    summary="diagonal blocks of F, by default one a layer",
    look=Look("#0072B2", "s", "block-diagonal"),
):
    """The blocks of `F` on its diagonal: one a layer, or those of a partition of the parameters' names.

    Args:
        partition: groups of parameter names, or names alone, each a block; layers if None.
        side: "rows" or "parameters", on which a block is kept and solved; "auto" for the smaller one.
        window: keep the rows of the last `window` batches, each `decay` times the weight of the next.
        rtol: rank tolerance of undamped solves, relative to λ_max; n·ε if None.
    """

    within_layers = True

    def __init__(
        self,
        *,
        partition: Sequence[str | Sequence[str]] | None = None,
        side: Side = "auto",
        window: int | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(side=side, window=window, rtol=rtol)
        self._partition = as_partition(partition)
        self.by_layer = self.by_layer and partition is None

    @property
    def options(self) -> Mapping[str, object]:
        """The configuration."""
        return {"partition": self._partition, **super().options}

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [RowBlock(name, parts, self._config) for name, parts in partition_parts(rows, self._partition)]


def as_partition(partition: Sequence[str | Sequence[str]] | None) -> tuple[tuple[str, ...], ...] | None:
    """Read a partition of parameters' names; a name that stands alone is a block of its own."""
    if partition is None:
        return None
    groups = (partition,) if isinstance(partition, str) else partition
    return tuple(as_names(group, "partition") for group in groups)


def partition_parts(rows: Rows, partition: Sequence[Sequence[str]] | None) -> list[tuple[str, list[Layout]]]:
    """Cut the layers by a partition of the parameters' names.

    Raises:
        PartitionError: if a parameter is missing from the partition or stands in it twice.
        ValueError: if a name is unknown.
    """
    if partition is None:
        return [(layer.name, [layer.layout]) for layer in rows.layers]
    listed = [name for group in partition for name in group]
    for name in listed:
        if name not in rows.space.shapes:
            raise unknown_name("parameter", name, rows.space.shapes)
    twice = sorted({name for name in listed if listed.count(name) > 1})
    missing = [name for name in rows.space.shapes if name not in listed]
    if twice or missing or not all(partition):
        problems = [
            f"in several blocks: {', '.join(twice)}" if twice else "",
            f"in no block: {', '.join(missing)}" if missing else "",
            "" if all(partition) else "a block is empty",
        ]
        raise PartitionError(
            f"Every trainable parameter belongs to exactly one block; {'; '.join(p for p in problems if p)}. "
            "List each name once, or freeze parameters that are not to be analysed."
        )
    blocks = []
    for group in partition:
        parts = [layer.layout.restrict(group)[0] for layer in rows.layers if set(group) & set(layer.layout.names)]
        blocks.append((", ".join(group), parts))
    return blocks
