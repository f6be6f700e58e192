"""Memory in which the rows of a matrix start at cache lines.

A layer with a bias has an odd number of columns, such as 1025. Where they lie close together, matrix products take up to
1.4 times as long as with rows 1040 entries apart. Rows a multiple of a page apart displace each other from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

LINE = 64
"""Bytes of a cache line."""
PAGE = 4096
"""Bytes, multiples of which rows should not lie apart."""
NARROW = 256
"""Columns below which rows are left close together."""


def padded_columns(columns: int, dtype: torch.dtype) -> int:
    """Return the number of entries from one row to the next."""
    if columns < NARROW:
        return columns
    line = LINE // dtype.itemsize
    lines = -(-columns // line)
    return (lines + (lines * LINE % PAGE == 0)) * line


def aligned(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return memory for a tensor of some shape, not filled."""
    *leading, columns = shape
    return like.new_empty(*leading, padded_columns(columns, like.dtype))[..., :columns]


def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Multiply matrices into such memory."""
    return torch.mm(left, right, out=aligned((len(left), right.shape[1]), left))
