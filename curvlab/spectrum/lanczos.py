"""Stochastic Lanczos quadrature: the spectral density of a symmetric operator from products with vectors.

From a unit vector q, m Lanczos steps give the m-point Gauss quadrature of the measure `Σ_i (q·v_i)² δ(λ − λ_i)`. For q
uniform on the unit sphere of a d-dimensional invariant subspace, d times the measure is the spectral density there, in
the mean: `tr h(A) = d·E Σ_j w_j h(θ_j)`. What is constant on the spectrum comes out exactly, without any variance.

Source: Golub & Meurant 2010, Matrices, Moments and Quadrature, section 6 (nodes and weights); Ubaru & Saad 2016, Fast
methods for estimating the numerical rank of large matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A symmetric linear map of float64 vectors `[n]`."""


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Gauss quadrature of the measure that a unit vector sees.

    Attributes:
        nodes: Ritz values θ_j, ascending.
        weights: they sum to 1.
        residuals: an eigenvalue lies within this distance of its node.
    """

    nodes: Float[Tensor, " m"]
    weights: Float[Tensor, " m"]
    residuals: Float[Tensor, " m"]

    def surely_above(self, number: float) -> float:
        """Return the weight that belongs to eigenvalues above a number.

        Of the nodes above it only the nearest can stand for eigenvalues below (Chebyshev, Markov, Stieltjes). Its Ritz
        vector, a distance d away and with the residual r, does so with at most the share (r/d)² (Chebyshev).
        """
        above = self.nodes > number
        if not bool(above.any()):
            return 0.0
        nearest = int(above.nonzero()[0])
        leak = min(1.0, float(self.residuals[nearest] / (self.nodes[nearest] - number)) ** 2)
        return float(self.weights[above].sum() - leak * self.weights[nearest])

    def mirrored(self) -> Quadrature:
        """Return the quadrature for the operator's negative."""
        return Quadrature(-self.nodes.flip(0), self.weights.flip(0), self.residuals.flip(0))


def quadrature(operator: Operator, start: Float[Tensor, " n"], steps: int) -> Quadrature:
    """Return the Gauss quadrature of an operator's spectral measure at a vector.

    Args:
        operator: symmetric, in float64.
        start: any vector but 0.
        steps: products with the operator; fewer are made if the Krylov space is exhausted before.

    Cost: `steps` products and `2·steps²·n` for orthogonalising twice against all vectors; memory `steps·n`.
    """
    steps = min(steps, len(start))
    basis = start.new_zeros(steps, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for k in range(steps):
        image = operator(basis[k])
        diagonal.append(float(basis[k] @ image))
        scale = float(image.norm())
        known = basis[: k + 1]
        for _ in range(2):
            image = image - known.T @ (known @ image)
        beside.append(float(image.norm()))
        exhausted = beside[-1] <= len(start) * torch.finfo(start.dtype).eps * max(scale, max(map(abs, diagonal)))
        if exhausted or k == steps - 1:
            break
        basis[k + 1] = image / beside[-1]
    nodes, vectors = eigh_tridiagonal(diagonal, beside[:-1])
    return Quadrature(
        torch.from_numpy(nodes), torch.from_numpy(vectors[0] ** 2), beside[-1] * torch.from_numpy(abs(vectors[-1]))
    )
