"""Rows of single units, and contractions over units.

A unit of a dense layer on vectors (T = 1) sees row `(v, n)` as `g[v,n,u] a[n]`. Its Fisher block is
`aᵀ diag(Σ_v g[v,n,u]²) a`, so its row side is `[N, N]` with roots `x[n] = s[n,u] a[n]`, `s = (Σ_v g²)^{1/2}`, never
`[R, R]`. Other layers keep the stack `[U, R, width]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.layer import KroneckerRows, LayerRows
from curvlab.rows.products import chunks


def is_plain(rows: LayerRows) -> TypeGuard[KroneckerRows]:
    """Whether the layer is dense on vectors."""
    return isinstance(rows, KroneckerRows) and rows.positions == 1


def plain_factors(rows: KroneckerRows) -> tuple[Float[Tensor, "Q N I"], Float[Tensor, "V N U"]]:
    """Return inputs by group, and rows by unit `u = (q, o)`."""
    return rows.a[:, 0].transpose(0, 1), rows.g[:, :, 0].flatten(2)


def contract_units(left: KroneckerRows, kernels: Float[Tensor, "U N M"], right: KroneckerRows) -> Float[Tensor, "R S"]:
    """Return `Σ_u g[v,n,u] Z_u[n,m] g'[w,m,u]` for plain layers. Cost `U·R·S`."""
    g, h = left.g[:, :, 0].flatten(2), right.g[:, :, 0].flatten(2)
    (V, N), (W, M) = left.shape, right.shape
    out = g.new_zeros(V, N, W, M)
    for part in chunks(g.shape[2], V * N * M):
        weighted = torch.einsum("vnu,unm->vunm", g[..., part], kernels[part])
        out += torch.einsum("vunm,wmu->vnwm", weighted, h[..., part])
    return out.view(V * N, W * M)


def weighted_product(left: LayerRows, weights: Float[Tensor, " P_l"], right: LayerRows) -> Float[Tensor, "R S"]:
    """Return `left diag(weights) rightᵀ`. Cost `N·M·P_l + U·R·S` for plain layers, else `R·S·P_l`, in chunks."""
    if not (is_plain(left) and is_plain(right)):
        V, N = left.shape
        largest = max(left.size, right.factors[-1][0].numel())
        pieces = [
            right.matvec(left.select(part).dense() * weights).view(V, -1, right.count)
            for part in chunks(N, V * largest)
        ]
        return torch.cat(pieces, dim=1).flatten(0, 1)
    (V, N), (_, M) = left.shape, right.shape
    b, _ = plain_factors(right)
    grouped = weights.view(len(b), -1, b.shape[2])
    pieces = []
    for part in chunks(N, M * len(b) * max(grouped.shape[1:])):
        some = left.select(part)
        a, _ = plain_factors(some)
        pairs = (a[:, :, None] * b[:, None]).flatten(1, 2)
        kernels = (grouped @ pairs.mT).unflatten(2, (-1, M)).flatten(0, 1)
        pieces.append(contract_units(some, kernels, right).view(V, -1, right.count))
    return torch.cat(pieces, dim=1).flatten(0, 1)


class UnitRoots(ABC):
    """Matrices X_u, one a unit, with `X_uᵀX_u` the unit's Fisher block."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "U n n"]:
        """Return `X_u X_uᵀ`."""

    @abstractmethod
    def moment(self) -> Float[Tensor, "U width width"]:
        """Return `X_uᵀ X_u`."""

    @abstractmethod
    def times(self, x: Float[Tensor, "K U width"]) -> Float[Tensor, "U n K"]:
        """Return `X_u x_u`."""

    @abstractmethod
    def combine(self, c: Float[Tensor, "U n K"]) -> Float[Tensor, "K U width"]:
        """Return `X_uᵀ c_u`."""

    @abstractmethod
    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "U n K"]:
        """Return c_u with `X_uᵀ c_u` the unit's share of `Sᵀc`."""


@dataclass(frozen=True, eq=False)
class PlainRoots(UnitRoots):
    """Roots of a dense layer on vectors, `s[n,u] a[n]`."""

    a: Float[Tensor, "Q N I"]
    g: Float[Tensor, "V N U"]
    s: Float[Tensor, "N U"]

    @property
    def scale(self) -> Float[Tensor, "Q O N"]:
        """`s` by group, unit and sample."""
        return self.s.T.reshape(self.a.shape[0], -1, self.s.shape[0])

    def gram(self) -> Float[Tensor, "U n n"]:  # noqa: D102
        s, aa = self.scale, self.a @ self.a.mT
        gram: Tensor = s[..., :, None] * aa[:, None] * s[..., None, :]
        return gram.flatten(0, 1)

    def moment(self) -> Float[Tensor, "U width width"]:  # noqa: D102
        pieces = []
        Q, O, N = self.scale.shape  # noqa: E741
        for part in chunks(O, Q * N * self.a.shape[2]):
            x = self.scale[:, part, :, None] * self.a[:, None]
            pieces.append(x.mT @ x)
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def times(self, x: Float[Tensor, "K U width"]) -> Float[Tensor, "U n K"]:  # noqa: D102
        grouped = x.unflatten(1, (self.a.shape[0], -1))
        return torch.einsum("qni,kqoi,qon->qonk", self.a, grouped, self.scale).flatten(0, 1)

    def combine(self, c: Float[Tensor, "U n K"]) -> Float[Tensor, "K U width"]:  # noqa: D102
        scaled = c.unflatten(0, (self.a.shape[0], -1)) * self.scale[..., None]
        return torch.einsum("qni,qonk->kqoi", self.a, scaled).flatten(1, 2)

    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "U n K"]:  # noqa: D102
        summed = torch.einsum("vnu,kvn->unk", self.g, c.reshape(-1, *self.g.shape[:2]))
        s = self.s.T[..., None]
        return torch.where(s > 0, summed / torch.where(s > 0, s, 1), 0)


@dataclass(frozen=True, eq=False)
class StackedRoots(UnitRoots):
    """Roots that were formed: all rows of every unit."""

    x: Float[Tensor, "U R width"]

    def gram(self) -> Float[Tensor, "U n n"]:  # noqa: D102
        return self.x @ self.x.mT

    def moment(self) -> Float[Tensor, "U width width"]:  # noqa: D102
        return self.x.mT @ self.x

    def times(self, x: Float[Tensor, "K U width"]) -> Float[Tensor, "U n K"]:  # noqa: D102
        return torch.einsum("uni,kui->unk", self.x, x)

    def combine(self, c: Float[Tensor, "U n K"]) -> Float[Tensor, "K U width"]:  # noqa: D102
        return torch.einsum("uni,unk->kui", self.x, c)

    def coefficients(self, c: Float[Tensor, "K R"]) -> Float[Tensor, "U n K"]:  # noqa: D102
        return c.T.expand(len(self.x), -1, -1)


def unit_roots(rows: LayerRows) -> UnitRoots:
    """Return the roots of a layer's units."""
    if is_plain(rows):
        a, g = plain_factors(rows)
        return PlainRoots(a, g, g.square().sum(0).sqrt())
    return StackedRoots(rows.unit_stack())
