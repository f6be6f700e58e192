r"""Function-space predictions for ½ Σ_c (z − y)² averaged over samples, with the Jacobian held at its initial value.

One step of size η answers z ← z − η M (z − y), with the response M of the method (`curvlab.theory.responses`,
`factored`): αI for an isotropic one, Θ = JJᵀ/N itself for gradient descent, Θ(Θ + ρI)⁻¹ for damped exact
natural gradient. After t steps

    f_t(X)  = f_0(X)  + [I − (I − ηM)^t] (y − f_0(X)),
    f_t(x') = f_0(x') + K(x', X) M⁻¹ [I − (I − ηM)^t] (y − f_0(X)),

K the test response; in the flow, infinitely many small steps over the same time, (I − ηM)^t becomes
exp(−ηtM). Outputs are vectors `[R]`, R = C·N in the row order (output, sample), outputs outermost:
`outputs.T.ravel()` for outputs `[N, C]`. Source: Karakida & Osawa (2020), claims 7 to 10. Anything that
recomputes the Jacobian between steps departs from these predictions after the first step.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, length, positive, symmetric


def predict_train(
    initial: Float[np.ndarray, "R"],
    target: Float[np.ndarray, "R"],
    response: float | Float[np.ndarray, "R R"],
    eta: float,
    steps: Sequence[int],
    *,
    flow: bool = False,
) -> Float[np.ndarray, "S R"]:
    """Training outputs after each number of steps.

    Args:
        initial: f_0(X).
        target: y.
        response: M, symmetric; a number α stands for αI.
        eta: learning rate η.
        steps: numbers of steps t, in any order.
        flow: the gradient flow over the time ηt instead of t discrete steps.

    Returns:
        f_t(X), one row for each t. Cost O(R³ + S R²), O(S R) for a number.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a response that is not symmetric, η ≤ 0 or
            t < 0.
    """
    initial, residual = _residual(initial, target)
    values, vectors = _spectrum(response, len(initial))
    _, covered = _progress(values, eta, steps, flow)
    return np.asarray(initial + _turn(covered * _turn(residual, vectors, inverse=True), vectors))


def predict_test(
    initial_test: Float[np.ndarray, "T"],
    initial: Float[np.ndarray, "R"],
    target: Float[np.ndarray, "R"],
    response: float | Float[np.ndarray, "R R"],
    test_response: Float[np.ndarray, "T R"],
    eta: float,
    steps: Sequence[int],
    *,
    flow: bool = False,
) -> Float[np.ndarray, "S T"]:
    """Test outputs after each number of steps of training.

    Args:
        initial_test: f_0(x').
        initial: f_0(X) on the training inputs.
        target: y of the training inputs.
        response: M, symmetric and possibly singular; a number α stands for αI.
        test_response: K(x', X), in the scale of M (not divided by α).
        eta: learning rate η.
        steps: numbers of steps t, in any order.
        flow: the gradient flow over the time ηt instead of t discrete steps.

    Returns:
        f_t(x'), one row for each t. Cost O(R³ + S R (R + T)).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a response that is not symmetric, η ≤ 0 or
            t < 0.
    """
    initial_test = array("initial_test", initial_test, 1)
    initial, residual = _residual(initial, target)
    test_response = array("test_response", test_response, 2)
    length("test_response", test_response, len(initial_test), "one row per entry of initial_test")
    length("test_response", test_response, len(initial), "one column per training row", axis=1)
    values, vectors = _spectrum(response, len(initial))
    lifted, _ = _progress(values, eta, steps, flow)
    moved = _turn(lifted * _turn(residual, vectors, inverse=True), vectors)
    return np.asarray(initial_test + moved @ test_response.T)


def kernel_modes(kernel: Float[np.ndarray, "R R"]) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R R"]]:
    """Eigenvalues of a kernel, largest first, and its eigenvectors as columns: modes that evolve independently.

    Raises:
        ValueError: if `kernel` is not a finite symmetric matrix. Cost O(R³).
    """
    values, vectors = np.linalg.eigh(symmetric("kernel", kernel))
    return values[::-1], vectors[:, ::-1]


def gd_contraction(eigenvalues: Float[np.ndarray, "R"], eta: float) -> Float[np.ndarray, "R"]:
    """Factor per step of each mode's residual under gradient descent: 1 − ηλ, stable for η < 2/λ_max.

    Raises:
        ValueError: for entries that are not finite or η ≤ 0.
    """
    positive("eta", eta)
    return 1 - eta * array("eigenvalues", eigenvalues, 1)


def damped_contraction(eigenvalues: Float[np.ndarray, "R"], damping: float, eta: float = 1.0) -> Float[np.ndarray, "R"]:
    """Factor per step of each mode's residual under damped exact natural gradient: 1 − ηλ/(λ + ρ) (claim 10).

    Evaluated as (1 − η) + ηρ/(λ + ρ), which keeps its digits at η = 1 where ρ is far below λ.

    Args:
        eigenvalues: λ of Θ, 0 or above.
        damping: ρ > 0, in the units of Θ.
        eta: learning rate η.

    Raises:
        ValueError: for eigenvalues below −ρ, entries that are not finite, ρ ≤ 0 or η ≤ 0.
    """
    eigenvalues = array("eigenvalues", eigenvalues, 1)
    positive("damping", damping)
    positive("eta", eta)
    if eigenvalues.min() <= -damping:
        raise ValueError(
            f"eigenvalues: {eigenvalues.min():.3g} is not above −ρ = {-damping:.3g}, so F + ρI is not positive; a "
            "kernel J Jᵀ/N has no negative eigenvalue."
        )
    return (1 - eta) + eta * damping / (eigenvalues + damping)


def damped_loss_ratio(
    kernel: Float[np.ndarray, "R R"], residual: Float[np.ndarray, "R"], damping: float, eta: float = 1.0
) -> float:
    """Training loss after one step of damped exact natural gradient over the loss before (claim 10).

    Σ_i g_i² (1 − ηλ_i/(λ_i + ρ))² / Σ_i g_i², g the residual in the eigenvectors of Θ. Cost O(R³).

    Args:
        kernel: Θ, divided by N.
        residual: f − y, not all zero.
        damping: ρ > 0, in the units of Θ.
        eta: learning rate η.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a residual of zero, ρ ≤ 0 or η ≤ 0.
    """
    values, vectors = kernel_modes(kernel)
    residual = array("residual", residual, 1)
    length("residual", residual, len(values), "one per row of kernel")
    if not residual.any():
        raise ValueError("residual: is zero, so the loss is too and its ratio undefined.")
    components = vectors.T @ residual
    left = components * damped_contraction(values, damping, eta)
    return float(left @ left / (components @ components))


def _residual(initial: ArrayLike, target: ArrayLike) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
    initial, target = array("initial", initial, 1), array("target", target, 1)
    length("target", target, len(initial), "one per entry of initial")
    return initial, target - initial


def _spectrum(response: float | ArrayLike, size: int) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R R"] | None]:
    """Eigenvalues and eigenvectors of the response; no eigenvectors stands for the identity."""
    if np.ndim(response) == 0:
        return array("response", np.full(size, response), 1), None
    matrix = symmetric("response", response)
    length("response", matrix, size, "one per entry of initial")
    return np.linalg.eigh(matrix)


def _turn(
    vectors: Float[np.ndarray, "... R"], basis: Float[np.ndarray, "R R"] | None, inverse: bool = False
) -> Float[np.ndarray, "... R"]:
    if basis is None:
        return vectors
    return np.asarray(vectors @ (basis if inverse else basis.T))


def _progress(
    values: Float[np.ndarray, "R"], eta: float, steps: Sequence[int], flow: bool
) -> tuple[Float[np.ndarray, "S R"], Float[np.ndarray, "S R"]]:
    """Mode by mode [1 − (1 − ηλ)^t]/λ, its limit ηt where λ is 0, and 1 − (1 − ηλ)^t; exp(−ηtλ) in the flow."""
    positive("eta", eta)
    times = array("steps", np.asarray(list(steps)), 1)[:, None]
    if times.min() < 0:
        raise ValueError(f"steps: must be 0 or above, got {int(times.min())}.")
    rate = eta * values
    covered = -np.expm1(-times * rate) if flow else 1 - (1 - rate) ** times
    if not flow:  # where (1 − ηλ)^t is close to 1 the difference loses its digits
        slow = np.abs(rate) < 0.5
        covered[:, slow] = -np.expm1(times * np.log1p(-rate[slow]))
    lifted = np.divide(covered, values, out=np.broadcast_to(eta * times, covered.shape).copy(), where=values != 0)
    return lifted, covered
