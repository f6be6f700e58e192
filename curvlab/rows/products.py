"""Products of rows with rows, done in blocks so that a symmetric result is computed once."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Largest number of elements of an intermediate tensor that is formed at once."""

SYMMETRIC_BLOCKS = 4
"""A symmetric product is cut into this many row blocks; 4 leave 5/8 of the work of the full product."""

SMALLEST_BLOCK = 128
"""Rows below which cutting a product costs more than it saves."""


def chunks(total: int, elements_each: int) -> Iterator[slice]:
    """Cut `range(total)` so that a chunk's intermediate tensor stays below `CHUNK_ELEMENTS`."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def row_blocks(V: int, N: int) -> list[tuple[slice, slice]]:
    """Cut the row axis `(v, n)` into contiguous blocks, given as a slice of `v` and a slice of `n`."""
    wanted = max(1, min(SYMMETRIC_BLOCKS, V * N // SMALLEST_BLOCK))
    axis = V if V > 1 else N
    edges = [round(axis * k / min(wanted, axis)) for k in range(min(wanted, axis) + 1)]
    cuts = [slice(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    return [(cut, slice(0, N)) for cut in cuts] if V > 1 else [(slice(0, 1), cut) for cut in cuts]


def mirror(out: Float[Tensor, "R R"], V: int, N: int) -> None:
    """Copy the blocks above the diagonal of a symmetric product below it."""
    blocks = row_blocks(V, N)
    view = out.view(V, N, V, N)
    for i, (vi, ni) in enumerate(blocks):
        for vj, nj in blocks[i + 1 :]:
            view[vj, nj, vi, ni] = view[vi, ni, vj, nj].permute(2, 3, 0, 1)


def add_product(
    out: Float[Tensor, "R S"],
    left: Float[Tensor, "V N D"],
    right: Float[Tensor, "W M D"],
    weight: Float[Tensor, "N M"] | None = None,
    *,
    symmetric: bool,
) -> None:
    """Add `(left @ rightᵀ) ∘ weight` to `out`; the weight repeats over `(v, w)`.

    Args:
        out: accumulator; where `symmetric`, only the blocks on and above the diagonal are written (see `mirror`).
        left: rows `(v, n)`.
        right: rows `(w, m)`.
        weight: elementwise factor of the pair of samples, ones if None.
        symmetric: whether `left` is `right`.
    """
    V, N, D = left.shape
    W, M, _ = right.shape
    view = out.view(V, N, W, M)
    left_blocks = row_blocks(V, N) if symmetric else [(slice(0, V), slice(0, N))]
    right_blocks = left_blocks if symmetric else [(slice(0, W), slice(0, M))]
    for i, (vi, ni) in enumerate(left_blocks):
        a = left[vi, ni]
        for vj, nj in right_blocks[i if symmetric else 0 :]:
            b = right[vj, nj]
            product = (a.reshape(-1, D) @ b.reshape(-1, D).T).view(*a.shape[:2], *b.shape[:2])
            target = view[vi, ni, vj, nj]
            if weight is None:
                target += product
            else:
                target.addcmul_(product, weight[ni, nj][None, :, None, :])
