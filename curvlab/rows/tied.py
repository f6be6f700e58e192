"""Rows of a table that is looked up and multiplied with, as a token embedding that is the output layer's weight, too.

    row (v, n) = Σ_t g[v,n,t,i] 1[index[n,t] = u] + Σ_s h[v,n,s,u] a[n,s,i]

with g the rows at what was looked up and h those at the outputs. Both parts stay factored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.grouping import Grouping
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.products import chunks


@dataclass(frozen=True, eq=False, repr=False)
class TiedRows(LayerRows):
    """Sums of the rows of two uses of one table.

    Attributes:
        table: those of the use as a table.
        head: those of the use as the weight of a linear layer.
    """

    table: EmbeddingRows
    head: KroneckerRows

    summands = 2

    @classmethod
    def of(cls, name: str, layout: Layout, *factors: Tensor) -> TiedRows:  # noqa: D102
        *shared, g, h = factors
        half = len(shared) // 2
        table = EmbeddingRows.of(name, layout, *shared[:half], g)
        return cls(name, layout, table, KroneckerRows.of(name, layout, *shared[half:], h))

    @property
    def factors(self) -> tuple[Tensor, ...]:  # noqa: D102
        (*looked_up, g), (*inputs, h) = self.table.factors, self.head.factors
        return (*looked_up, *inputs, g, h)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.head.shape

    def group(self, grouping: Grouping) -> TiedRows:  # noqa: D102
        return self._joined(self.table.group(grouping), self.head.group(grouping))

    def of_batch(self) -> TiedRows:  # noqa: D102
        table, head = self.table.of_batch(), self.head.of_batch()
        assert isinstance(table, EmbeddingRows)
        assert isinstance(head, KroneckerRows)
        return self._joined(table, head)

    def concatenate(self, others: Sequence[LayerRows]) -> TiedRows:
        """Append the samples of other rows of this layer; shorter samples are padded."""
        tied = [other for other in others if isinstance(other, TiedRows)]
        table = self.table.concatenate([other.table for other in tied])
        return self._joined(table, self.head.concatenate([other.head for other in tied]))

    def _joined(self, table: EmbeddingRows, head: KroneckerRows) -> TiedRows:
        """Tie two uses, both with their numbers of positions if one has them."""
        if (table.lengths is None) != (head.lengths is None):
            table, head = table.padded(table.positions), head.padded(head.positions)
        return TiedRows(self.name, self.layout, table, head)

    def restrict(self, names: Iterable[str]) -> TiedRows:  # noqa: D102
        layout, columns = self.layout.restrict(names)
        table = replace(self.table, layout=layout, g=self.table.g[..., columns])
        return TiedRows(self.name, layout, table, self.head.restrict(names))

    def at(self, units: Int[Tensor, " u"], columns: Int[Tensor, " w"]) -> TiedRows:  # noqa: D102
        table, head = self.table.at(units, columns), self.head.at(units, columns)
        return TiedRows(self.name, head.layout, table, head)

    def add_gram(self, out: Float[Tensor, "R S"], other: LayerRows) -> None:
        """Add `self @ otherᵀ`: that of either part, and of all pairs of positions of the two, `N·T·M·S·V·(I + W)`."""
        if not isinstance(other, TiedRows):
            self._add_dense_gram(out, other)
            return
        self.table.add_gram(out, self.table if other is self else other.table)
        self.head.add_gram(out, self.head if other is self else other.head)
        mixed = _products(self.table, other.head)
        out += mixed + (mixed if other is self else _products(other.table, self.head)).T

    def matvec(self, block: Float[Tensor, "K P_l"]) -> Float[Tensor, "K R"]:  # noqa: D102
        return self.table.matvec(block) + self.head.matvec(block)

    def rmatvec(self, coefficients: Float[Tensor, "K R"]) -> Float[Tensor, "K P_l"]:  # noqa: D102
        return self.head.rmatvec(coefficients) + self.table.rmatvec(coefficients)

    def along(self, units: Float[Tensor, "U K"], width: Float[Tensor, "I K"]) -> Float[Tensor, "R K"]:  # noqa: D102
        looked_up = torch.einsum("vnti,ntk,ik->vnk", self.table.g, units[self.table.index], width)
        return looked_up.flatten(0, 1) + self.head.along(units, width)

    def total(self) -> Float[Tensor, " P_l"]:  # noqa: D102
        return self.head.total() + self.table.total()

    def dense(self) -> Float[Tensor, "R P_l"]:
        """Form the rows. Memory `R·P_l`; what was looked up is added to few entries."""
        (V, N, T, I), found = self.table.g.shape, self.head.dense()  # noqa: E741
        by_entry = found.view(V, N, self.layout.units, I)
        at = self.table.index.expand(V, N, T)[..., None].expand_as(self.table.g)
        by_entry.scatter_add_(2, at, self.table.g.to(found.dtype))
        return found

    def by_position(self) -> KroneckerRows:
        """Return the same rows, as samples of one row each that have the positions of both uses. Memory `R·(T + S)·U`."""
        (V, N, T, _), U = self.table.g.shape, self.layout.units
        looked_up = one_hot(self.table.index, U).to(self.dtype).expand(V, N, T, U)
        g = torch.cat([looked_up, self.head.g[:, :, :, 0]], dim=2)
        heads = self.head.a[:, :, 0].expand(V, *self.head.a[:, :, 0].shape)
        a = torch.cat([self.table.g, heads], dim=2)
        return KroneckerRows(self.name, self.layout, a.flatten(0, 1)[:, :, None], g.flatten(0, 1)[None, :, :, None])

    def partial_traces(self) -> tuple[Float[Tensor, " U"], Float[Tensor, "m I"]]:
        """Return the partial traces of the sum of the outer products of all positions with themselves.

        Returns:
            Its diagonal blocks' traces, one for each row of the table; and X with `XᵀX` the sum of its diagonal blocks.

        Cost: two passes over the rows.
        """
        lengths = self.head.a.square().sum((2, 3))
        energy = self.head.g[:, :, :, 0].square()
        by_unit = torch.einsum("nt,vntu->u", lengths, energy)
        by_unit.index_add_(0, self.table.index.flatten(), self.table.g.square().sum((0, 3)).flatten())
        heavy = self.head.a[:, :, 0] * energy.sum((0, 3)).sqrt()[..., None]
        return by_unit, torch.cat([heavy.flatten(0, 1), self.table.g.flatten(0, 2)])


def _products(table: EmbeddingRows, head: KroneckerRows) -> Float[Tensor, "R S"]:
    """Return `table @ headᵀ`, some samples of both at a time."""
    (V, N, T, _), (W, M, S, *_) = table.g.shape, head.g.shape
    out = table.g.new_zeros(V, N, W, M)
    for m in range(M):
        for n in chunks(N, T * S * max(V, W)):
            alike = torch.einsum("vnti,si->vnts", table.g[:, n], head.a[m, :, 0])
            met = head.g[:, m, :, 0][..., table.index[n]]
            out[:, n, :, m] = torch.einsum("vnts,wsnt->vnw", alike, met)
    return out.view(V * N, W * M)
