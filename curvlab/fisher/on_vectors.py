"""Dense layers on vectors: what is made of their rows unit by unit, or entry by entry."""

from __future__ import annotations

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.products import CHUNK_ELEMENTS, chunks


def is_on_vectors(rows: LayerRows) -> TypeGuard[KroneckerRows]:
    """Whether the layer is dense on vectors."""
    return isinstance(rows, KroneckerRows) and rows.positions == 1


def vector_factors(rows: KroneckerRows) -> tuple[Float[Tensor, "Q N I"], Float[Tensor, "V N U"]]:
    """Return inputs by group, and rows by unit `u = (q, o)`."""
    return rows.a[:, 0].transpose(0, 1), rows.g[:, :, 0].flatten(2)


def contract_units(left: KroneckerRows, kernels: Float[Tensor, "U N M"], right: KroneckerRows) -> Float[Tensor, "R S"]:
    """Return `Σ_u g[v,n,u] Z_u[n,m] g'[w,m,u]` for dense layers on vectors. Cost `U·R·S`."""
    (_, g), (_, h) = vector_factors(left), vector_factors(right)
    (V, N), (W, M) = left.shape, right.shape
    out = g.new_zeros(V, N, W, M)
    for part in chunks(g.shape[2], V * N * M):
        weighted = torch.einsum("vnu,unm->vunm", g[..., part], kernels[part])
        out += torch.einsum("vunm,wmu->vnwm", weighted, h[..., part])
    return out.view(V * N, W * M)


def weighted_product(left: LayerRows, weights: Float[Tensor, " P_l"], right: LayerRows) -> Float[Tensor, "R S"]:
    """Return `left diag(weights) rightᵀ`, in chunks.

    Cost `N·M·P_l + U·R·S` for dense layers on vectors, else `R·S·P_l`, the rows on the right formed once if they are small.
    """
    if not (is_on_vectors(left) and is_on_vectors(right)):
        V, N = left.shape
        largest = max(left.size, right.row_factors[-1][0].numel())
        if right.count * right.size <= CHUNK_ELEMENTS:
            right = right.formed()
        pieces = [
            right.matvec(left.select(part).dense() * weights).view(V, -1, right.count)
            for part in chunks(N, V * largest)
        ]
        return torch.cat(pieces, dim=1).flatten(0, 1)
    (V, N), (_, M) = left.shape, right.shape
    b, _ = vector_factors(right)
    grouped = weights.view(len(b), -1, b.shape[2])
    pieces = []
    for part in chunks(N, M * len(b) * max(grouped.shape[1:])):
        some = left.select(part)
        a, _ = vector_factors(some)
        pairs = (a[:, :, None] * b[:, None]).flatten(1, 2)
        kernels = (grouped @ pairs.mT).unflatten(2, (-1, M)).flatten(0, 1)
        pieces.append(contract_units(some, kernels, right).view(V, -1, right.count))
    return torch.cat(pieces, dim=1).flatten(0, 1)
