"""Whether the matrices of a structure fit into memory, before they are formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from curvlab.fisher.block import Batch, Block, batches_of
from curvlab.rows import Rows
from curvlab.tools.memory import available_memory
from curvlab.tools.text import size

WORTH_CHECKING = 1 << 28
"""Bytes from which on an update looks first at how much memory there is."""


def check_memory(key: str, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
    """Raise `MemoryError` before an allocation that cannot succeed: matrices, and as much again to factorise them."""
    if not blocks:
        return
    elements = {block: block.elements(batch) for block, batch in zip(blocks, batches, strict=True)}
    rows = batches[0].layers[0].row_factors[-1]
    needed = 2 * sum(elements.values()) * rows.element_size()
    if needed < WORTH_CHECKING:
        return
    available = available_memory(str(rows.device))
    if available is not None and needed > available:
        largest = max(elements, key=elements.__getitem__)
        raise MemoryError(
            f"The {key} structure needs {size(needed)} for its matrices and their factorisation, {size(available)} "
            f"are available; the largest is that of {largest.name!r}. Use a structure of smaller blocks, such as 'kfac' "
            "or 'diagonal', or fewer rows (kind='mc', smaller batches)."
        )


@runtime_checkable
class Divided(Protocol):
    """What cuts rows into blocks, as structures do."""

    def _make_blocks(self, rows: Rows) -> list[Block]: ...


def matrix_elements(structure: Divided, rows: Rows) -> int:
    """Return how many numbers the matrices of a structure would hold after an update with rows; none are formed."""
    blocks = structure._make_blocks(rows)
    return sum(block.elements(batch) for block, batch in zip(blocks, batches_of(blocks, rows, 0.0), strict=True))
