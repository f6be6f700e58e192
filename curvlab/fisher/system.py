"""Damped solves with symmetric positive semi-definite matrices, and what is done when they are ill-conditioned.

In this order: symmetrise and Cholesky; the same in float64 (from the factors, where they are at hand: a Gram matrix formed
in float32 has already lost what is below 1e-7 of its largest eigenvalue); eigendecomposition with negative eigenvalues set
to zero. Anything after the first step is an `IllConditioned` warning with the condition number. Without damping the
solve is the pseudo-inverse: eigenvalues up to `rtol` times the largest count as zero.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import IllConditioned


def rank_tolerance(values: Float[Tensor, "*B n"], rtol: float | None, size: int) -> Float[Tensor, "*B 1"]:
    """Return the eigenvalue up to which a direction counts as null: `rtol·λ_max`, with `rtol = size·ε` if None."""
    relative = size * torch.finfo(values.dtype).eps if rtol is None else rtol
    return relative * values.abs().amax(-1, keepdim=True)


def inverse_values(
    values: Float[Tensor, "*B n"], damping: float, null: Float[Tensor, "*B n"] | None
) -> Float[Tensor, "*B n"]:
    """Return `1/(λ + ρ)`, and 0 on null directions if there is no damping."""
    if damping > 0 or null is None:
        return 1 / (values + damping)
    return torch.where(null, 0.0, 1 / torch.where(null, 1.0, values))


@dataclass(frozen=True)
class Eigen:
    """Eigendecomposition of a symmetric matrix or a stack; `null` marks the directions that count as null."""

    values: Float[Tensor, "*B n"]
    vectors: Float[Tensor, "*B n n"]
    null: Float[Tensor, "*B n"]


class System:
    """A positive semi-definite matrix, or a stack of equal size, to be solved with different dampings.

    Args:
        matrix: `[n, n]` or `[B, n, n]`.
        name: what it belongs to, for messages.
        rtol: rank tolerance, `n·ε` if None.
        in_float64: recomputes the matrix in float64, if its factors are at hand.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "*B n n"],
        name: str,
        rtol: float | None = None,
        in_float64: Callable[[], Float[Tensor, "*B n n"]] | None = None,
    ) -> None:
        self.matrix = (matrix + matrix.mT) / 2
        self.name = name
        self.rtol = rtol
        self._in_float64 = in_float64
        self._eigen: Eigen | None = None
        self._solvers: dict[float, Callable[[Tensor], Tensor]] = {}

    @property
    def eigen(self) -> Eigen:
        """The eigendecomposition, negative round-off set to zero."""
        if self._eigen is None:
            self._set_eigen(*torch.linalg.eigh(self.matrix))
        assert self._eigen is not None
        return self._eigen

    def _set_eigen(self, values: Tensor, vectors: Tensor) -> None:
        null = values <= rank_tolerance(values, self.rtol, values.shape[-1])
        self._eigen = Eigen(values.clamp_min(0), vectors, null)

    def solve(self, rhs: Float[Tensor, "*B n K"], damping: float) -> Float[Tensor, "*B n K"]:
        """Return `(K + ρI)⁻¹ rhs`, `K⁺ rhs` for ρ = 0."""
        if damping not in self._solvers:
            prepare([self], damping)
        return self._solvers[damping](rhs)

    def _use_cholesky(self, damping: float, factor: Tensor, failed: Tensor) -> bool:
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
        limit = 0.1 / torch.finfo(factor.dtype).eps
        if bool(failed.any()) or not bool((condition < limit).all()):
            return False
        dtype = self.matrix.dtype
        self._solvers[damping] = lambda rhs: torch.cholesky_solve(rhs.to(factor.dtype), factor).to(dtype)
        return True

    def _use_eigen(self, damping: float) -> None:
        eigen = self.eigen
        scaled = inverse_values(eigen.values, damping, eigen.null)
        self._solvers[damping] = lambda rhs: eigen.vectors @ (scaled[..., None] * (eigen.vectors.mT @ rhs))

    def _rescue(self, damping: float) -> None:
        """Solve a system that plain Cholesky could not, and say so."""
        done = "an eigendecomposition"
        if self.matrix.dtype != torch.float64:
            exact = self.matrix.double() if self._in_float64 is None else self._in_float64()
            if self._use_cholesky(damping, *_cholesky(exact, damping)):
                done = "float64"
        if damping not in self._solvers:
            self._use_eigen(damping)
        largest = float(torch.linalg.matrix_norm(self.matrix, 2).max())
        warnings.warn(
            f"{self.name}: condition number about {largest / damping + 1:.1e} at damping {damping:.1e} is too large for "
            f"Cholesky in {str(self.matrix.dtype).removeprefix('torch.')}; solved by {done}.",
            IllConditioned,
            stacklevel=2,
        )


def _cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    return factor, info != 0


def prepare(systems: Iterable[System], damping: float) -> None:
    """Factorise systems for one damping; those of equal size in one batched call."""
    waiting = [system for system in systems if damping not in system._solvers]
    if damping == 0:
        decompose(waiting)
        for system in waiting:
            system._use_eigen(0.0)
        return
    for group in _by_shape(waiting):
        factors, failed = _cholesky(torch.stack([system.matrix for system in group]), damping)
        for system, factor, bad in zip(group, factors, failed, strict=True):
            if not system._use_cholesky(damping, factor, bad):
                system._rescue(damping)


def decompose(systems: Iterable[System]) -> None:
    """Compute eigendecompositions; those of equal size in one batched call."""
    for group in _by_shape([system for system in systems if system._eigen is None]):
        values, vectors = torch.linalg.eigh(torch.stack([system.matrix for system in group]))
        for system, value, vector in zip(group, values, vectors, strict=True):
            system._set_eigen(value, vector)


def _by_shape(systems: Iterable[System]) -> list[list[System]]:
    groups: dict[tuple[torch.Size, torch.dtype], list[System]] = defaultdict(list)
    for system in systems:
        groups[system.matrix.shape, system.matrix.dtype].append(system)
    return list(groups.values())
