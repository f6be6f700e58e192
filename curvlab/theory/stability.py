r"""Stability of first-order methods on a quadratic: characteristic roots, and the curvature at which they leave the unit disc.

Along an eigenvector of curvature a the gradient is ax, and a method with step size η and momentum β is a recursion
x(t+1) = p·x(t) − q·x(t−1):

    gradient descent  x ← x − ηg                      p = 1 − ηa              q = 0
    heavy ball        v ← βv + g,  x ← x − ηv         p = 1 + β − ηa          q = β
    Nesterov          v ← βv + g,  x ← x − η(g + βv)  p = (1 + β)(1 − ηa)     q = β(1 − ηa)

It is stable while both roots of r² − pr + q lie in the unit disc. The first to leave it does so at r = −1, where
1 + p + q = 0: hence the thresholds. The recursions follow by eliminating v.

Source: Cohen et al. 2021, Gradient descent on neural networks typically occurs at the edge of stability (arXiv 2103.00065),
claims 1 and 2 of the theory; the momentum forms are those of `torch.optim.SGD` with dampening 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, positive
from curvlab.tools.text import suggestion

STEPPERS = ("gd", "heavy-ball", "nesterov")
"""The methods."""


def sharpness_threshold(method: str, eta: float, beta: float = 0.0) -> float:
    """Largest curvature at which a method is stable, its edge.

    2/η for gradient descent, (2 + 2β)/η for heavy ball, (2 + 2β)/(η(1 + 2β)) for Nesterov.

    Args:
        method: one of `STEPPERS`.
        eta: step size η.
        beta: momentum β, from 0 to below 1; gradient descent has none.

    Raises:
        ValueError: for an unknown method, η ≤ 0, and β outside its range.
    """
    _check(method, eta, beta)
    numerator = 2.0 + 2.0 * beta
    return numerator / (eta * (1.0 + 2.0 * beta)) if method == "nesterov" else numerator / eta


def characteristic_roots(
    method: str, curvature: ArrayLike, eta: float, beta: float = 0.0
) -> Complex[np.ndarray, "K 2"]:
    """Both characteristic roots along eigenvectors of given curvatures, the larger modulus first.

    Args:
        method: one of `STEPPERS`.
        curvature: eigenvalues a `[K]` of the quadratic, of any sign.
        eta: step size η.
        beta: momentum β.

    Raises:
        ValueError: see `sharpness_threshold`; and for curvatures that are not finite.
    """
    _check(method, eta, beta)
    a = array("curvature", curvature, 1)
    p, q = _recursion(method, a, eta, beta)
    root = np.sqrt(p * p - 4.0 * q + 0j)
    # The root without cancellation, and the other one from the product q of both.
    first = (p + np.where(p >= 0.0, root, -root)) / 2.0
    second = np.divide(q, first, out=np.zeros_like(first), where=first != 0.0)
    return np.asarray(np.stack([first, second], axis=1))


def growth(method: str, curvature: ArrayLike, eta: float, beta: float = 0.0) -> Float[np.ndarray, " K"]:
    """Asymptotic factor by which a step multiplies x along eigenvectors of given curvatures: the larger |root|.

    Above 1 the method diverges. Arguments and errors as for `characteristic_roots`.
    """
    return np.asarray(np.abs(characteristic_roots(method, curvature, eta, beta)).max(axis=1))


def _recursion(
    method: str, a: Float[np.ndarray, " K"], eta: float, beta: float
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """P and q of x(t+1) = p·x(t) − q·x(t−1)."""
    if method == "nesterov":
        return (1.0 + beta) * (1.0 - eta * a), beta * (1.0 - eta * a)
    return 1.0 + beta - eta * a, np.full_like(a, beta)


def _check(method: str, eta: float, beta: float) -> None:
    if method not in STEPPERS:
        raise ValueError(f"method: unknown {method!r}. {suggestion(method, STEPPERS)}")
    positive("eta", eta)
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta: must lie in [0, 1), got {beta}.")
    if method == "gd" and beta:
        raise ValueError(f"beta: gradient descent has no momentum, got {beta}; name 'heavy-ball' or 'nesterov'.")
