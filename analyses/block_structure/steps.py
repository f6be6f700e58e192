"""Steps with a matrix and with an approximation of it, each at the damping at which it lowers the loss most."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.block_structure.setting import Point
from curvlab.spectrum import DenseOperator, Partition

DAMPINGS = tuple(10.0**k for k in range(-5, 1))
"""ρ in units of the full matrix' largest eigenvalue."""

Solve = Callable[[float], Float[Tensor, " P"]]


@dataclass(frozen=True, eq=False)
class Best:
    """A step (C + ρI)⁻¹g with η = 1, at the best damping of the grid.

    Attributes:
        step: Subtracted from the parameters.
        damping: ρ.
        gain: By how much it lowers the loss.
    """

    step: Float[Tensor, " P"]
    damping: float
    gain: float


def best(point: Point, solve: Solve, largest: float) -> Best:
    """Return the step that lowers the loss of the network itself most, of those that a solver gives."""
    before = point.loss_at(torch.zeros_like(point.parameters))
    found = [(rho, solve(rho)) for rho in (relative * largest for relative in DAMPINGS)]
    tried = [Best(step, rho, before - point.loss_at(step)) for rho, step in found]
    return max((one for one in tried if one.gain == one.gain), key=lambda one: one.gain)


def full_solver(matrix: DenseOperator, gradient: Float[Tensor, " P"]) -> Solve:
    """Return what solves with a positive semi-definite matrix."""

    def solve(damping: float) -> Float[Tensor, " P"]:
        damped = matrix.matrix + damping * torch.eye(matrix.size, dtype=matrix.dtype, device=matrix.device)
        return torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(damped))[:, 0]

    return solve


@dataclass(frozen=True, eq=False)
class Blocks:
    """The diagonal blocks of a positive semi-definite matrix, in their eigenbases.

    Attributes:
        matrix: All of it.
        parts: Entries, eigenvalues and eigenvectors of every block.
    """

    matrix: DenseOperator
    parts: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, matrix: DenseOperator, partition: Partition) -> "Blocks":
        """Decompose the blocks of a partition."""
        at = [partition.indices(block).to(matrix.device) for block in range(len(partition))]
        return cls(matrix, [(i, *torch.linalg.eigh(matrix.matrix[i[:, None], i])) for i in at])

    def solve(self, columns: Float[Tensor, "P K"], damping: float) -> Float[Tensor, "P K"]:
        """Return (BD + ρI)⁻¹ times some columns."""
        out = torch.empty_like(columns)
        for at, values, vectors in self.parts:
            out[at] = vectors @ ((vectors.T @ columns[at]) / (values.clamp(min=0) + damping)[:, None])
        return out

    def solver(self, gradient: Float[Tensor, " P"]) -> Solve:
        """Return what solves for a gradient."""
        return lambda damping: self.solve(gradient[:, None], damping)[:, 0]

    def anisotropy(self, damping: float, rows: int) -> float:
        """‖M − ᾱI‖_F/‖ᾱI‖_F of M = S(BD + ρI)⁻¹Sᵀ `[R, R]`, ᾱ = tr M/R, for SᵀS the matrix: from the traces of M and M²."""
        product = self.solve(self.matrix.matrix, damping)
        trace, square = float(product.trace()), float((product * product.T).sum())
        return float(max(0.0, rows * square / trace**2 - 1) ** 0.5)


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of two vectors."""
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0).clamp(-1, 1))
