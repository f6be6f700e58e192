"""Products of rows with rows, cut so that a symmetric result is computed once and intermediate tensors stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Largest number of elements of an intermediate tensor that is formed at once."""

CACHE_ELEMENTS = 1 << 20
"""Elements of an intermediate tensor that a processor's cache holds, where a product is limited by memory traffic."""

STRIP = 128
"""Columns of a strip of a symmetric product: narrower ones cost a matrix product more speed than they save work."""

WORTH_HALVING = 1 << 25
"""Multiply-adds of a product below which halving it saves less time than calling more functions takes."""

Tile = tuple[slice, slice]
"""Some of the rows `(v, n)`: a slice of `v` and a slice of `n`."""

Piece = tuple[slice, slice]
"""Some samples, and some of their positions."""


def cached(device: torch.device) -> int:
    """Return how many elements of an intermediate tensor to form at once where a product is limited by memory traffic."""
    return CACHE_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS


def chunks(total: int, elements_each: int, elements: int | None = None) -> Iterator[slice]:
    """Cut `range(total)` so that a chunk's intermediate tensor stays below `elements`, by default `CHUNK_ELEMENTS`."""
    step = max(1, (elements or CHUNK_ELEMENTS) // max(1, elements_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def pieces(z: Float[Tensor, "N C X"]) -> Iterator[Piece]:
    """Cut an output so that a piece stays in a processor's cache: some samples, or some positions of one."""
    N, C, X = z.shape
    limit = cached(z.device)
    for n in chunks(N, C * X, limit):
        for x in chunks(X, C * (n.stop - n.start), limit):
            yield n, x


def triangle(V: int, N: int, columns: int = WORTH_HALVING) -> Iterator[tuple[Tile, Tile]]:
    """Cut the pairs of rows `(v, n)` on and above the diagonal into strips: all rows that come first, and some columns.

    Tall and narrow products run fastest. The largest one comes first, and the next ones take up its memory.

    Args:
        V: number of v.
        N: number of n.
        columns: entries of a row.
    """
    every, rows = slice(0, N), V * N
    whole = rows < 2 * STRIP or rows**2 * columns < WORTH_HALVING
    for v in reversed(list(chunks(V, 1, V if whole else max(1, STRIP // N)))):
        if whole or N < 2 * STRIP:
            yield (slice(0, v.stop), every), (v, every)
        else:
            if v.start:
                yield (slice(0, v.start), every), (v, every)
            for n in reversed(list(chunks(N, 1, STRIP))):
                yield (v, slice(0, n.stop)), (v, n)


def within_memory(rows: Tile, columns: Tile) -> Iterator[tuple[Tile, Tile]]:
    """Cut the rows until a block's product stays below `CHUNK_ELEMENTS`."""
    if _rows(rows) * _rows(columns) <= CHUNK_ELEMENTS or _rows(rows) == 1:
        yield rows, columns
    else:
        for half in _halves(rows):
            yield from within_memory(half, columns)


def _rows(block: Tile) -> int:
    v, n = block
    length: int = (v.stop - v.start) * (n.stop - n.start)
    return length


def _halves(block: Tile) -> tuple[Tile, Tile]:
    """Cut along v, or along n where there is one v, so that both halves are contiguous."""
    v, n = block
    if v.stop - v.start > 1:
        middle = (v.start + v.stop) // 2
        return (slice(v.start, middle), n), (slice(middle, v.stop), n)
    middle = (n.start + n.stop) // 2
    return (v, slice(n.start, middle)), (v, slice(middle, n.stop))


def mirror(out: Float[Tensor, "*Q R R"]) -> None:
    """Copy what is above the diagonals of matrices to below them.

    The result is symmetric to the last bit, which a matrix product with its own transpose is not.
    """
    upper = torch.ones(STRIP, STRIP, dtype=torch.bool, device=out.device).triu()
    for strip in chunks(out.shape[-1], 1, STRIP):
        own, size, below = out[..., strip, strip], strip.stop - strip.start, slice(strip.stop, None)
        own.copy_(torch.where(upper[:size, :size], own, own.mT))
        out[..., below, strip] = out[..., strip, below].mT


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
        out: accumulator; where `symmetric`, it is complete on and above the diagonal only (see `mirror`).
        left: rows `(v, n)`.
        right: rows `(w, m)`.
        weight: elementwise factor of the pair of samples, ones if None.
        symmetric: whether `left` is `right`.
    """
    V, N, D = left.shape
    W, M, _ = right.shape
    view = out.view(V, N, W, M)
    everything = (slice(0, V), slice(0, N)), (slice(0, W), slice(0, M))
    for pair in triangle(V, N, D) if symmetric else [everything]:
        for rows, columns in within_memory(*pair):
            a, b = distinct(left[rows]), distinct(right[columns])
            product = (a.reshape(-1, D) @ b.reshape(-1, D).T).view(*a.shape[:2], *b.shape[:2])
            target = view[rows + columns]
            if weight is None:
                target += product
            else:
                target.addcmul_(product, weight[rows[1], columns[1]][None, :, None, :])


def distinct(rows: Float[Tensor, "V N ..."]) -> Float[Tensor, "V n ..."]:
    """Keep one sample where all have the same rows, as at the output of a network: an expanded tensor."""
    return rows[:, :1] if rows.stride(1) == 0 else rows


def add_pairs(
    out: Float[Tensor, "R S"],
    left: Float[Tensor, "V N T O"],
    right: Float[Tensor, "W M U O"],
    alike: Callable[[slice, slice], Float[Tensor, "n t m u"]],
    *,
    symmetric: bool,
) -> None:
    """Add `Σ_{t,u} alike[n,t,m,u] ⟨left[v,n,t], right[w,m,u]⟩` to `out`.

    Args:
        out: accumulator.
        left: rows `(v, n)` at positions t.
        right: rows `(w, m)` at positions u.
        alike: similarity of positions of two samples, for a slice of `n` and one of `m`.
        symmetric: whether `left` is `right` and `alike` symmetric; each pair of samples is then visited once.

    Cost: `N·M·W·T·O·(U + V)`, half of it where symmetric; see `pairs_cost`.
    """
    (V, N, T, O), (W, M, U, _) = left.shape, right.shape  # noqa: E741
    view = out.view(V, N, W, M)
    side = max(1, isqrt(cached(left.device) // (T * max(W * O, U))))
    parts = [slice(k, min(k + side, N)) for k in range(0, N, side)]
    others = parts if symmetric else [slice(k, min(k + side, M)) for k in range(0, M, side)]
    for i, n in enumerate(parts):
        a = left[:, n].transpose(0, 1).flatten(2)
        for m in others[i if symmetric else 0 :]:
            b = right[:, m].permute(1, 2, 0, 3).flatten(2)
            similarity = alike(n, m).permute(2, 0, 1, 3)
            moved = torch.bmm(similarity.flatten(1, 2), b)
            moved = moved.view(len(b), len(a), T, W, O).permute(1, 2, 4, 3, 0).reshape(len(a), T * O, -1)
            product = torch.bmm(a, moved).view(len(a), V, W, len(b)).transpose(0, 1)
            view[:, n, :, m] += product
            if symmetric and m != n:
                view[:, m, :, n] += product.permute(2, 3, 0, 1)


def pairs_cost(left: Float[Tensor, "V N T O"], right: Float[Tensor, "W M U O"]) -> int:
    """Return the multiply-adds of `add_pairs`, without those of its `alike`."""
    (V, N, T, O), (W, M, U, _) = left.shape, right.shape  # noqa: E741
    return N * M * W * T * O * (U + V)
