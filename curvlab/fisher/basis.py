"""Eigenvectors of moments, and functions of matrices that have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of a stack of moments that span their ranges.

    Attributes:
        values: eigenvalues.
        vectors: orthonormal columns `[Q, d, r]`; None for the unit vectors.
        null: directions that count as null at the rank tolerance.
    """

    values: Float[Tensor, "Q r"]
    vectors: Float[Tensor, "Q d r"] | None
    null: Bool[Tensor, "Q r"]

    @property
    def complete(self) -> bool:
        """Whether the vectors span the whole space."""
        return self.vectors is None or self.vectors.shape[1] == self.vectors.shape[2]

    def into(self, x: Float[Tensor, "*K Q d m"]) -> Float[Tensor, "*K Q r m"]:
        """Return the coordinates `Vᵀx`."""
        return x if self.vectors is None else self.vectors.mT @ x

    def back(self, y: Float[Tensor, "*K Q r m"]) -> Float[Tensor, "*K Q d m"]:
        """Return the vectors with given coordinates, `Vy`."""
        return y if self.vectors is None else self.vectors @ y

    def shifted(self, rho: Float[Tensor, " Q"], power: float) -> Callable[[Tensor], Tensor]:
        """Return the function that multiplies `[*K, Q, d, m]` with `(M + ρI)^power`, from the left."""
        outside = (rho**power)[:, None, None]
        within = ((self.values + rho[:, None]) ** power)[..., None] - outside
        return lambda x: self.back(within * self.into(x)) + outside * x

    def overlaps(self, other: Basis) -> Float[Tensor, "Q r s"] | None:
        """Return the squared inner products with another basis' vectors; None if both are the unit vectors."""
        if self.vectors is None or other.vectors is None:
            return None
        return (self.vectors.mT @ other.vectors).square()
