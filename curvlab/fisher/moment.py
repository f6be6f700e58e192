"""Second moments `Σ x xᵀ`, the factors of a Kronecker product, and their eigenvectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from curvlab.fisher.block import RunningAverage, State


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

    def overlaps(self, other: Basis) -> Float[Tensor, "Q r s"] | None:
        """Return the squared inner products with another basis' vectors; None if both are the unit vectors."""
        if self.vectors is None or other.vectors is None:
            return None
        return (self.vectors.mT @ other.vectors).square()


class Factor(ABC):
    """A running average of moments, one a group."""

    @property
    @abstractmethod
    def basis(self) -> Basis:
        """Eigenvectors that span the range."""

    @abstractmethod
    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:
        """Return the trace over the dimension."""

    @abstractmethod
    def state(self) -> State:
        """Return what `restore` needs."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Bring a saved state back."""


class Moment(Factor):
    """A running average of `[Q, d, d]` moments, stored and decomposed on its smaller side.

    Kept as roots X with `XᵀX = Σ_b w_b M_b` while they have fewer rows than columns: their singular value
    decomposition has twice the digits of the moment's eigendecomposition.

    Args:
        rtol: eigenvalues up to `rtol·λ_max` count as null; if None, `d·ε`, for roots its square.
        complete: whether the basis spans the whole space, not only the range.
    """

    def __init__(self, rtol: float | None, *, complete: bool = False) -> None:
        self.rtol = rtol
        self.complete = complete
        self.weight = 0.0
        self.root: Tensor | None = None
        self.matrix: Tensor | None = None
        self._basis: Basis | None = None

    def update(self, root: Float[Tensor, "Q n d"], weight: float, decay: float, *, additive: bool = False) -> None:
        """Add a moment M of some weight w, `rootᵀroot = w·M`; decays and sums as in `RunningAverage`."""
        self._basis = None
        fresh = decay == 0 or self.weight == 0
        if self.matrix is not None and not fresh:
            self.matrix = decay * self.matrix + root.mT @ root
        else:
            kept = root if fresh or self.root is None else torch.cat([self.root * decay**0.5, root], dim=1)
            small = kept.shape[1] < kept.shape[2]
            self.root, self.matrix = (kept, None) if small else (None, kept.mT @ kept)
        if fresh:
            self.weight = weight
        elif not (additive and decay == 1):
            self.weight = decay * self.weight + weight

    @property
    def basis(self) -> Basis:  # noqa: D102
        if self._basis is None:
            self._basis = self._from_matrix() if self.root is None else self._from_root(self.root)
        return self._basis

    def _from_root(self, root: Tensor) -> Basis:
        _, singular, vectors = torch.linalg.svd(root, full_matrices=self.complete)
        singular = nn.functional.pad(singular, (0, vectors.shape[1] - singular.shape[1]))
        eps = torch.finfo(root.dtype).eps
        tolerance = root.shape[2] * eps if self.rtol is None else self.rtol**0.5
        null = singular <= tolerance * singular.amax(-1, keepdim=True)
        return Basis(singular.square() / self._divisor, vectors.mT, null)

    @property
    def _divisor(self) -> float:
        """The weight; 1 while no sample had any, so that the moment is zero."""
        return self.weight or 1.0

    def _from_matrix(self) -> Basis:
        values, vectors = torch.linalg.eigh(self.dense())
        tolerance = values.shape[-1] * torch.finfo(values.dtype).eps if self.rtol is None else self.rtol
        null = values <= tolerance * values.amax(-1, keepdim=True)
        return Basis(values.clamp_min(0), vectors, null)

    def dense(self) -> Float[Tensor, "Q d d"]:
        """Form the moment."""
        if self.root is not None:
            return self.root.mT @ self.root / self._divisor
        assert self.matrix is not None
        return self.matrix / self._divisor

    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:  # noqa: D102
        if self.root is not None:
            return self.root.square().sum((1, 2)) / (self._divisor * self.root.shape[2])
        return self.dense().diagonal(dim1=1, dim2=2).mean(-1)

    def state(self) -> State:  # noqa: D102
        return {"root": self.root, "matrix": self.matrix, "weight": self.weight}

    def restore(self, state: State) -> None:  # noqa: D102
        root, matrix, weight = state["root"], state["matrix"], state["weight"]
        assert root is None or isinstance(root, Tensor)
        assert matrix is None or isinstance(matrix, Tensor)
        assert isinstance(weight, float)
        self.root, self.matrix, self.weight, self._basis = root, matrix, weight, None


class DiagonalMoment(Factor):
    """A running average of the diagonal moments of one-hot vectors."""

    def __init__(self) -> None:
        self.average = RunningAverage()

    def update(self, diagonal: Float[Tensor, " d"], weight: float, decay: float) -> None:
        """Add a diagonal D of some weight w, given as `w·D`."""
        self.average.update(diagonal / (weight or 1.0), weight, decay)

    @property
    def basis(self) -> Basis:  # noqa: D102
        values = self.average.value[None]
        return Basis(values, None, values == 0)

    def mean_eigenvalue(self) -> Float[Tensor, " Q"]:  # noqa: D102
        return self.average.value.mean()[None]

    def state(self) -> State:  # noqa: D102
        return self.average.state()

    def restore(self, state: State) -> None:  # noqa: D102
        self.average.restore(state)
