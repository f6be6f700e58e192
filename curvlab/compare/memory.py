"""What a structure takes in training, and whether rows and matrices fit into memory before they are formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from curvlab.compare.batches import Batch
from curvlab.compare.landscape import Landscape
from curvlab.fisher import Structure
from curvlab.fisher.memory import matrix_elements
from curvlab.rows import Rows
from curvlab.rows.packed import part_of
from curvlab.rows.passes import Pass
from curvlab.rows.streamed import PROBED, bytes_of
from curvlab.tools.memory import available_memory
from curvlab.tools.text import as_bytes, size

SQUARES = 5
"""Matrices `[R, R]` at once: the response, its symmetric part, the projector, a Gram matrix and its factorisation."""


@dataclass(frozen=True)
class Needs:
    """What a comparison needs, seen from the rows of a few samples.

    Attributes:
        R: number of rows.
        rows: bytes of all rows.
        square: bytes of a matrix `[R, R]`.
    """

    R: int
    rows: int
    square: int

    @property
    def total(self) -> int:
        """Bytes of all rows, twice while they are formed, and of the matrices of a response."""
        return 2 * self.rows + SQUARES * self.square

    def check(self, allowed: float | None) -> None:
        """Refuse what does not fit.

        Raises:
            MemoryError: with what would fit.
        """
        if allowed is not None and self.total > allowed:
            raise MemoryError(
                f"The comparison needs {size(self.total)}: {size(self.rows)} for R = {self.R} rows, twice while they are formed, "
                f"and {SQUARES} matrices of R × R, {size(self.square)} each; {size(allowed)} are allowed. Use fewer samples "
                "(or positions), or more memory=."
            )


def needs_of(landscape: Landscape, batch: Batch, how: Pass, total: int) -> Needs:
    """Estimate from the rows of the first samples of a batch what all of them need. Cost: a sweep over two samples.

    Args:
        landscape: the model and its loss.
        batch: inputs and targets.
        how: which rows.
        total: number of samples.
    """
    few = min(PROBED, total)
    rows = landscape.rows(landscape.here, part_of(batch, slice(0, few), total), how)
    R = rows.shape[0] * total
    return Needs(R, bytes_of(rows) * total // few, R**2 * rows.dtype.itemsize)


def allowed_memory(memory: int | str | None, device: torch.device) -> float | None:
    """Return the bytes that may be used: those given, else those that are free; None where the system does not tell."""
    return available_memory(str(device)) if memory is None else float(as_bytes(memory))


def too_large(structure: Structure, rows: Rows, left: float | None) -> str:
    """Return why a structure of these rows does not fit into what is left, empty if it does; nothing is formed."""
    needed = 2 * matrix_elements(structure, rows) * rows.dtype.itemsize
    if left is None or needed <= left:
        return ""
    return f"its matrices and their factorisation need {size(needed)}, {size(left)} are left"


def state_bytes(structure: Structure, rows: Rows) -> int:
    """Return the memory of what a structure, updated with some rows, holds from step to step in training.

    These are its matrices, and where it is solved on the side of the rows, the rows of S; not those of a Jacobian behind them. A
    running average has whole matrices, even if the factors of one small batch are kept on their smaller side.
    """
    state = structure.state_dict()
    kept = [layer["factors"] for _, packed in state["kept"] for layer in packed["layers"]]
    found = _bytes([state["blocks"], kept])
    return max(found, matrix_elements(structure, rows) * rows.dtype.itemsize) if structure.averages else found


def _bytes(state: Any) -> int:
    """Memory of the tensors in nested containers, storage that is shared counted once."""
    storages = [x.untyped_storage() for x in tree_leaves(state) if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
