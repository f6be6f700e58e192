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

from curvlab.tools.shown import line

Product = Callable[[Tensor], Tensor]
"""A symmetric linear map of vectors `[n]`, or of blocks of vectors `[K, n]`."""


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

    def __repr__(self) -> str:
        return line(self, nodes=self.nodes)

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


def quadrature(operator: Product, start: Float[Tensor, " n"], steps: int) -> Quadrature:
    """Return the Gauss quadrature of an operator's spectral measure at one vector; see `quadratures`."""
    return quadratures(lambda block: operator(block[0])[None], start[None], steps)[0]


def quadratures(operator: Product, starts: Float[Tensor, "K n"], steps: int) -> list[Quadrature]:
    """Return the Gauss quadratures of an operator's spectral measures at several vectors, from products with blocks.

    Args:
        operator: symmetric, multiplies blocks `[K, n]`.
        starts: any vectors but 0.
        steps: products with the operator; fewer are made if all Krylov spaces are exhausted before.

    Cost: `steps` products with blocks and `2·K·steps²·n` for orthogonalising twice against all vectors; memory
    `K·steps·n`.
    """
    K, n = starts.shape
    steps = min(steps, n)
    basis = starts.new_zeros(K, steps, n)
    basis[:, 0] = starts / starts.norm(dim=1, keepdim=True)
    diagonal, beside = torch.zeros(2, K, steps, dtype=torch.float64, device="cpu")
    lengths = torch.full((K,), steps, device="cpu")
    for k in range(steps):
        image = operator(basis[:, k])
        diagonal[:, k] = (basis[:, k] * image).sum(1)
        scale = torch.maximum(image.norm(dim=1).double().cpu(), diagonal.abs().amax(1))
        known = basis[:, : k + 1]
        for _ in range(2):
            image = image - ((known @ image[..., None]).mT @ known)[:, 0]
        norm = image.norm(dim=1)
        beside[:, k] = norm
        exhausted = beside[:, k] <= n * torch.finfo(starts.dtype).eps * scale
        lengths[exhausted & (lengths == steps)] = k + 1
        if k == steps - 1 or bool((lengths <= k + 1).all()):
            break
        # What is exhausted goes on with zeros.
        live = (lengths > k + 1).to(norm)
        basis[:, k + 1] = image * (live / torch.where(live > 0, norm, 1))[:, None]
    return [_gauss(a[:m], b[:m]) for a, b, m in zip(diagonal, beside, lengths.tolist(), strict=True)]


def _gauss(diagonal: Float[Tensor, " m"], beside: Float[Tensor, " m"]) -> Quadrature:
    """Return the quadrature of a tridiagonal matrix; the last entry beside the diagonal leads out of it."""
    nodes, vectors = eigh_tridiagonal(diagonal.numpy(), beside[:-1].numpy())
    return Quadrature(
        torch.from_numpy(nodes),
        torch.from_numpy(vectors[0] ** 2),
        float(beside[-1]) * torch.from_numpy(abs(vectors[-1])),
    )
