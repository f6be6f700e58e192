r"""The Forster transform (radial isotropic position) of a set of points.

A linear map followed by scaling every point to length one, z = xA/‖xA‖, after which ZᵀZ = (N/d)I: the remedy
of Karakida & Osawa (2020) for K-FAC with fewer input dimensions d than samples N. It makes all leverages
equal to d/N, and thus the response of the first layer d·I.

It exists and is unique up to a rotation if every proper linear subspace of dimension k holds fewer than kN/d
of the points (Forster 2002; Barthe 1998), which is almost surely so for N > d points with a density. For N =
d independent points it exists as well: they become orthonormal.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from curvlab.theory._checks import array, at_least_one, length, positive

_COLLAPSED = 1e8
"""Condition number that the map from orthonormalised points reaches only as it flattens them on a subspace; beyond
it, round-off would lift points out of that subspace and fake a solution."""


@dataclass(frozen=True)
class ForsterTransform:
    """A fitted Forster transform; calling `apply` sends any points through the same map."""

    matrix: Float[np.ndarray, "d d"]
    """A, of spectral norm one (the transform does not depend on its scale)."""
    deviation: float
    """‖ZᵀZ − (N/d)I‖_F/‖(N/d)I‖_F on the points that it was fitted to."""
    iterations: int
    """Iterations that the fit took."""

    def apply(self, points: Float[np.ndarray, "K d"]) -> Float[np.ndarray, "K d"]:
        """Rows z = xA/‖xA‖ of training or test points alike. Cost O(K d²).

        Raises:
            ValueError: for a wrong number of columns, entries that are not finite, or a row of zeros.
        """
        points = _nonzero(array("points", points, 2), "points")
        length("points", points, len(self.matrix), "the dimension of the points that were fitted", axis=1)
        return _normalised(points @ self.matrix)


def forster_transform(
    points: Float[np.ndarray, "N d"], *, tolerance: float = 1e-8, max_iterations: int = 1000
) -> ForsterTransform:
    """Fits the Forster transform by alternating Z ← Z(ZᵀZ)^{-½} and scaling the rows to length one.

    Both operations are linear maps up to the scale of each row, so their product over the iterations is one
    map A, which is kept. The deviation ε on which the iteration stops bounds what the transform is for: the
    eigenvalues of (d/N)ZᵀZ lie within 1 ± ε√d (a spectral norm is at most the Frobenius norm), so every
    leverage zᵀ(ZᵀZ)⁻¹z of the unit rows lies between (d/N)/(1 + ε√d) and (d/N)/(1 − ε√d). The published code
    stops at ε = 10⁻³ or after 100 iterations and adds 10⁻⁷I under the root, which leaves the fixed point
    where it is; here the rank is checked instead, and the root taken from a singular value decomposition,
    which does not square the condition number. The deviation falls by a constant factor per iteration, which
    approaches one as N approaches d from above.

    Args:
        points: one point per row, N ≥ d of them, spanning all d dimensions. They are not centred.
        tolerance: ε.
        max_iterations: give up after as many.

    Returns:
        The transform; `transform.apply(points)` are the transformed points. Cost O(N d²) per iteration.

    Raises:
        ValueError: for entries that are not finite, zero rows, N < d, points that do not span the space, or
            when the iteration does not converge, as when a subspace holds too many of the points.
    """
    positive("tolerance", tolerance)
    at_least_one("max_iterations", max_iterations)
    points = _nonzero(array("points", points, 2), "points")
    count, dimension = points.shape
    if count < dimension:
        raise ValueError(
            f"points: {count} points cannot be isotropic in {dimension} dimensions; take at least {dimension}, or "
            "project them on their span, where with N ≤ d a layer's leverages are all one already."
        )
    left, values, right = np.linalg.svd(_normalised(points), full_matrices=False)
    rank = int((values > count * np.finfo(np.float64).eps * values[0]).sum())
    if rank < dimension:
        raise ValueError(
            f"points: they span only {rank} of {dimension} dimensions (constant or dependent columns); project them "
            f"on their span first, as with the leading {rank} right singular vectors."
        )
    start, matrix, rows = right.T / values @ right, np.eye(dimension), _normalised(left @ right)
    for iteration in range(max_iterations + 1):
        _, values, axes = np.linalg.svd(rows, full_matrices=False)
        deviation = float(np.linalg.norm(values**2 * dimension / count - 1) / np.sqrt(dimension))
        if deviation < tolerance:
            total = start @ matrix
            return ForsterTransform(total / np.linalg.norm(total, ord=2), deviation, iteration)
        if np.linalg.cond(matrix) > _COLLAPSED:
            break
        whitening = axes.T * (values[0] / values) @ axes
        rows, matrix = _normalised(rows @ whitening), matrix @ whitening
        matrix /= np.linalg.norm(matrix, ord=2)
    crowded = values**2 > (count / dimension) * (1 + tolerance)
    held = int((np.linalg.norm(rows @ axes[crowded].T, axis=1) > 1 - 1e-3).sum())
    raise ValueError(
        f"points: no radial isotropic position after {iteration} iterations, relative deviation {deviation:.2g} "
        f"(tolerance {tolerance:.2g}). None exists if a subspace of dimension k holds more than kN/d of the points, as "
        f"duplicated or collinear points do; here about {held} of {count} points lie close to a subspace of dimension "
        f"{int(crowded.sum())} of {dimension}. Drop such points, or, if the deviation still falls (N only just above "
        "d), raise max_iterations."
    )


def _normalised(rows: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N d"]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _nonzero(points: Float[np.ndarray, "N d"], name: str) -> Float[np.ndarray, "N d"]:
    zero = np.flatnonzero(~points.any(axis=1))
    if len(zero):
        raise ValueError(f"{name}: row {zero[0]} is zero and has no direction; drop it ({len(zero)} such rows).")
    return points
