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

SMALLEST_STRIP = 128
"""Rows below which a matrix product runs at less than full speed."""

MOST_STRIPS = 16
"""Strips of a symmetric product; 16 leave 17/32 of the work of the full product."""

Block = tuple[slice, slice]
"""Some of the rows `(v, n)`: a slice of `v` and a slice of `n`."""


def chunks(total: int, elements_each: int) -> Iterator[slice]:
    """Cut `range(total)` so that a chunk's intermediate tensor stays below `CHUNK_ELEMENTS`."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def strips(V: int, N: int) -> Iterator[tuple[Block, Block, Block]]:
    """Cut the rows into strips; with each come the rows from its start on, and those after its end.

    The products of `k` strips with the rows from their start on take (k + 1)/2k of the full product's work.
    """
    whole, along_v = slice(None), V >= 4
    length = V if along_v else N
    count = max(1, min(length, MOST_STRIPS, V * N // SMALLEST_STRIP))
    for k in range(count):
        start, stop = length * k // count, length * (k + 1) // count
        cuts = slice(start, stop), slice(start, None), slice(stop, None)
        strip, onwards, after = ((cut, whole) if along_v else (whole, cut) for cut in cuts)
        yield strip, onwards, after


def mirror(out: Float[Tensor, "R R"], V: int, N: int) -> None:
    """Complete a symmetric product of which `add_product` wrote the strips."""
    view = out.view(V, N, V, N)
    for strip, _, after in strips(V, N):
        view[after + strip] = view[strip + after].permute(2, 3, 0, 1)


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
        out: accumulator; where `symmetric`, entries that `mirror` fills in are left out.
        left: rows `(v, n)`.
        right: rows `(w, m)`.
        weight: elementwise factor of the pair of samples, ones if None.
        symmetric: whether `left` is `right`.
    """
    V, N, D = left.shape
    W, M, _ = right.shape
    view = out.view(V, N, W, M)
    whole = slice(None), slice(None)
    for strip, onwards, _ in strips(V, N) if symmetric else [(whole, whole, whole)]:
        a, b = left[strip], right[onwards]
        product = (a.reshape(-1, D) @ b.reshape(-1, D).T).view(*a.shape[:2], *b.shape[:2])
        target = view[strip + onwards]
        if weight is None:
            target += product
        else:
            target.addcmul_(product, weight[strip[1], onwards[1]][None, :, None, :])


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
    elements = CACHE_ELEMENTS if left.device.type == "cpu" else CHUNK_ELEMENTS
    side = max(1, isqrt(elements // (T * max(W * O, U))))
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
