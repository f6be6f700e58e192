"""`(M + ρI)⁻¹` of damped factors M, in the form in which it is cheapest to multiply with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.fisher.block import BlockState
from curvlab.rows.aligned import aligned, product

WORTH_FORMING = 4
"""Vectors a dimension from which on the inverse of a triangle's product is formed.

On two cores forming it takes as long as substitution costs more than products with the inverse, for about 4·d vectors.
"""


@dataclass(eq=False)
class Inverse(ABC):
    """The inverses of a factor, one a group."""

    def times_columns(self, x: Float[Tensor, "*K Q d m"]) -> Float[Tensor, "*K Q d m"]:
        """Multiply columns of every group."""
        return self.times_rows(x.mT).mT

    def times_rows(self, x: Float[Tensor, "*K Q m d"]) -> Float[Tensor, "*K Q m d"]:
        """Multiply rows of every group, those of all K in one product."""
        by_group = x.movedim(-3, 0)
        rows = by_group.reshape(len(by_group), -1, x.shape[-1])
        return self._times(rows).reshape(by_group.shape).movedim(0, -3)

    @abstractmethod
    def _times(self, rows: Float[Tensor, "Q n d"]) -> Float[Tensor, "Q n d"]:
        """Multiply rows of every group."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "Q d d"] | Float[Tensor, "Q d"]:
        """Return the matrices, of diagonal ones the diagonals."""

    def state(self) -> BlockState:
        """Return what `restored` needs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(eq=False)
class DiagonalInverse(Inverse):
    """The inverse of a diagonal factor."""

    diagonal: Float[Tensor, "Q d"]

    def _times(self, rows: Float[Tensor, "Q n d"]) -> Float[Tensor, "Q n d"]:
        return rows * self.diagonal[:, None]

    def dense(self) -> Float[Tensor, "Q d"]:  # noqa: D102
        return self.diagonal


@dataclass(eq=False)
class MatrixInverse(Inverse):
    """An inverse that was formed."""

    matrix: Float[Tensor, "Q d d"]

    def times_columns(self, x: Float[Tensor, "*K Q d m"]) -> Float[Tensor, "*K Q d m"]:  # noqa: D102
        return self.matrix @ x

    def _times(self, rows: Float[Tensor, "Q n d"]) -> Float[Tensor, "Q n d"]:
        return rows @ self.matrix if len(rows) > 1 else product(rows[0], self.matrix[0])[None]

    def dense(self) -> Float[Tensor, "Q d d"]:  # noqa: D102
        return self.matrix


@dataclass(eq=False)
class CholeskyInverse(Inverse):
    """The inverse of `LLᵀ`, one group: by substitution, or formed if it multiplies `WORTH_FORMING·d` vectors.

    A first product tells how many there will be; the inverse is formed at once if they are many.

    Attributes:
        triangle: L, which may be continued beyond d; None once the inverse is formed.
        size: d.
        uses: products to expect.
        seen: vectors so far.
        matrix: the inverse, once it is formed.
    """

    triangle: Float[Tensor, "1 w w"] | None
    size: int
    uses: int
    seen: int = 0
    matrix: Float[Tensor, "1 d d"] | None = None

    def _times(self, rows: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 n d"]:
        """Count the vectors, and form the inverse if they are, or at this rate will be, many."""
        vectors = rows.shape[1]
        self.seen += vectors
        if self.triangle is not None and max(self.seen, self.uses * vectors) >= WORTH_FORMING * self.size:
            self.matrix, self.triangle = self.dense(), None
        if self.triangle is None:
            return MatrixInverse(self.dense())._times(rows)
        triangle = self.triangle[0]
        columns = nn.functional.pad(rows[0], (0, len(triangle) - self.size)).mT
        torch.linalg.solve_triangular(triangle, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(triangle.mT, columns, upper=True, out=columns)
        return columns.mT[None, :, : self.size]

    def dense(self) -> Float[Tensor, "1 d d"]:  # noqa: D102
        if self.triangle is None:
            assert self.matrix is not None
            return self.matrix
        return torch.cholesky_inverse(self.triangle)[:, : self.size, : self.size]


@dataclass(eq=False)
class LowRankInverse(Inverse):
    """`I/ρ − HᵀH`, for H with few rows."""

    root: Float[Tensor, "Q r d"]
    rho: Float[Tensor, " Q"]

    def times_columns(self, x: Float[Tensor, "*K Q d m"]) -> Float[Tensor, "*K Q d m"]:  # noqa: D102
        return x / self.rho[:, None, None] - self.root.mT @ (self.root @ x)

    def _times(self, rows: Float[Tensor, "Q n d"]) -> Float[Tensor, "Q n d"]:
        return rows / self.rho[:, None, None] - (rows @ self.root.mT) @ self.root

    def dense(self) -> Float[Tensor, "Q d d"]:  # noqa: D102
        Q, _, d = self.root.shape
        inverse = aligned((Q, d, d), self.root).zero_()
        inverse.diagonal(dim1=1, dim2=2).add_(self.rho.reciprocal()[:, None])
        return inverse.baddbmm_(self.root.mT, self.root, alpha=-1)


_FORMS: dict[frozenset[str], type[Inverse]] = {
    frozenset(field.name for field in fields(form)): form
    for form in (DiagonalInverse, MatrixInverse, CholeskyInverse, LowRankInverse)
}


def from_dense(inverse: Float[Tensor, "Q d d"] | Float[Tensor, "Q d"]) -> Inverse:
    """Return the inverse that `dense` gave."""
    return MatrixInverse(inverse) if inverse.ndim == 3 else DiagonalInverse(inverse)


def restored(state: BlockState) -> Inverse:
    """Return the inverse with a state."""
    return _FORMS[frozenset(state)](**state)
