r"""Convergence of natural gradient descent and K-FAC on the outputs of a wide network, step by step.

Notation of Zhang, Martens & Grosse (2019, arXiv 1905.10961): n samples, one output each, outputs u, targets
y, residual r = u − y, Jacobian J `[n, p]` with n ≤ p, Gram matrix G = JJᵀ, **not divided by n**. The step

    θ ← θ − η Jᵀ(JJᵀ)⁻¹ r

is natural gradient descent (NGD) at zero damping; it has no factor n, because gradient and Fisher are both
sums or both means. With J fixed the residual becomes (1 − η)r: `predict_train` with the response 1. Every
bound is on the **squared** norm ‖r‖².

The two-layer network of the paper is f(x) = m^{-½} Σ_r a_r φ(w_rᵀx), a_r = ±1 fixed, w_r ~ N(0, ν²I_d), no
biases. Row i of its Jacobian is s_i ⊗ x_i, s_i = a ∘ φ'(W x_i)/√m. With S `[n, m]` and X `[n, d]` that hold
s_i and x_i as rows, G = (SSᵀ) ∘ (XXᵀ).

**K-FAC** for this network is F = (SᵀS) ⊗ (XᵀX), both factors summed over samples. If SSᵀ is invertible,
J F⁺ Jᵀ = I ∘ H, the diagonal matrix of the leverages h_i = x_iᵀ(XᵀX)⁺x_i (`leverages`). So the linearised
network is stable up to η = 2/max h_i, which is 2 or more as no leverage exceeds 1; λ_min(XᵀX) does not
enter. `kfac_layer_response(S, X)/n` is J F⁺ Jᵀ where SSᵀ is singular, too.

**Other steps.** Gradient descent contracts the modes of G (`kernel_modes`) by `gd_contraction`, so that it
needs κ(G) times the steps of NGD; NGD with (JJᵀ + μI)⁻¹ contracts them by `damped_contraction`, where λ and
μ are those of G, or of G/n with a Fisher F = JᵀJ/n + μI.

**Why the bounds hold** (c = ‖J(θ) − J(0)‖₂/√λ_min(G(0)) over a ball, L(u) μ-strongly convex with an
L-Lipschitz gradient g; μ = L = 1 for the squared error). A step moves u by −η(I + E)g with ‖E‖₂ ≤ 2c/(1 − c),
which is at most C if c ≤ C/(2 + C), in particular if c ≤ C/3. Expanding ‖u − u⋆‖² with ⟨g, u − u⋆⟩ ≥
(μL‖u − u⋆‖² + ‖g‖²)/(μ + L) and μ‖u − u⋆‖ ≤ ‖g‖ gives `general_rate` up to `general_largest_step`; summing
the moves, with 1 − c ≥ ⅔, gives `condition_radius`.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import SYMMETRY, array, length, non_negative, positive, symmetric
from curvlab.theory.dynamics import gd_contraction, kernel_modes, predict_train
from curvlab.theory.kernels import infinite_width_kernels

UNIT = 1e-5
"""Largest distance of a norm from 1 that counts as round-off, of float32 data too."""


def activation_limit_gram(
    inputs: Float[np.ndarray, "N D"], activation: str = "relu", weight_std: float = 1.0
) -> Float[np.ndarray, "N N"]:
    """S∞, the limit of SSᵀ for wide layers: E[φ'(wᵀx)φ'(wᵀx')], w ~ N(0, ν²I).

    (π − arccos ρ)/2π for ReLU, ρ the cosine of the inputs' angle: the probability that both are active.

    Args:
        inputs: x, of any norm.
        activation: "relu" or "erf" (φ(u) = erf(u), without a scale).
        weight_std: ν; without effect for ReLU.

    Raises:
        ValueError: for a wrong shape, entries that are not finite, an unknown activation, ν ≤ 0, or a zero
            input with ReLU, whose derivative is undefined there. Cost O(N² D).
    """
    positive("weight_std", weight_std)
    # The first layer of an NTK network with s_w² = ν²d has these pre-activations, and B_1 = s_w² E[φ'φ'].
    scale = weight_std * sqrt(array("inputs", inputs, 2).shape[1])
    kernels = infinite_width_kernels(inputs, depth=2, activation=activation, weight_std=scale)
    return np.asarray(kernels.backward[0] / scale**2)


def two_layer_limit_gram(
    inputs: Float[np.ndarray, "N D"], activation: str = "relu", weight_std: float = 1.0
) -> Float[np.ndarray, "N N"]:
    """G∞, the limit of G for wide layers: xᵀx' E[φ'(wᵀx)φ'(wᵀx')]. Its least eigenvalue is the paper's λ₀.

    Singular if two inputs are equal; for ReLU also if they are positively parallel. Arguments, errors and
    cost are those of `activation_limit_gram`.
    """
    return _product(activation_limit_gram(inputs, activation, weight_std), inputs)


def two_layer_gram(pattern: Float[np.ndarray, "N M"], inputs: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N N"]:
    """G = (SSᵀ) ∘ (XXᵀ) of a network of finite width.

    Args:
        pattern: S, rows a ∘ φ'(W x_i)/√m.
        inputs: X.

    Raises:
        ValueError: for wrong shapes or entries that are not finite. Cost O(N² (M + D)).
    """
    pattern = array("pattern", pattern, 2)
    return _product(pattern @ pattern.T, inputs)


def stability_constant(change_norm: float, lambda_min: float) -> float:
    """C_emp = 3‖J(θ) − J(0)‖₂/√λ_min(G(0)): the smallest C with which condition 2 holds at θ.

    The condition wants C_emp ≤ C < ½ in the whole ball of `condition_radius`. The theorem has room: it
    follows from ‖J(θ) − J(0)‖₂ ≤ C√λ_min/(2 + C), thus with 2.5 instead of 3, but not with 2.

    Args:
        change_norm: ‖J(θ) − J(0)‖₂, the spectral norm.
        lambda_min: λ_min(G(0)) > 0.

    Raises:
        ValueError: for a negative norm, λ_min ≤ 0 or a value that is not finite.
    """
    non_negative("change_norm", change_norm)
    positive("lambda_min", lambda_min)
    return 3 * change_norm / sqrt(lambda_min)


def condition_radius(residual_norm: float, lambda_min: float, mu: float = 1.0, L: float = 1.0) -> float:
    """Radius of the ball around θ(0) in which condition 2 is assumed: 3‖r(0)‖/√λ_min(G(0)).

    For a general loss it is 3(1 + κ)/2 · ‖u(0) − u⋆‖/√λ_min, κ = L/μ: the sum of all moves, bounded by
    (3/2) ηL Σ_k (1 − 2ημL/(μ + L))^{k/2} ‖u(0) − u⋆‖/√λ_min.

    Args:
        residual_norm: ‖u(0) − y‖, or ‖u(0) − u⋆‖.
        lambda_min: λ_min(G(0)) > 0.
        mu: strong convexity μ of the loss in u; 1 for the squared error.
        L: Lipschitz constant of its gradient; 1 for the squared error.

    Raises:
        ValueError: for a negative norm, λ_min ≤ 0, μ ≤ 0, L < μ or a value that is not finite.
    """
    return 1.5 / general_constant_limit(mu, L) * movement_bound(residual_norm, lambda_min)


def largest_step(C: float) -> float:
    """Largest η of the convergence theorem, (1 − 2C)/(1 + C)²; 0 if C ≥ ½, where it covers no step.

    (1 − 2C)/(1 − C)² would do: ‖(1 − η)r − ηEr‖ ≤ (1 − η + ηC)‖r‖, and the paper bounds this less sharply.

    Raises:
        ValueError: if C is negative or not finite.
    """
    return general_largest_step(C, 1.0, 1.0)


def ngd_rate_bound(eta: float) -> float:
    """Bound on the factor per step of ‖r‖² under the theorem's conditions: 1 − η, for η up to `largest_step`.

    Raises:
        ValueError: if η is not in (0, 1].
    """
    return general_rate(eta, 1.0, 1.0)


def ngd_linear_ratio(eta: float) -> float:
    """Factor per step of ‖r‖² if the model is linear: (1 − η)², below the bound 1 − η unless η is 1.

    Raises:
        ValueError: if η is not a finite number above 0.
    """
    positive("eta", eta)
    return (1 - eta) ** 2


def general_constant_limit(mu: float, L: float) -> float:
    """The C below which a loss with condition number κ = L/μ has a covered step: 1/(1 + κ).

    No larger C can do for the rate of `general_rate`: with E = −CI along the direction of curvature μ, the
    squared distance shrinks by (1 − ημ(1 − C))², for small η more slowly than 1 − 2ημL/(μ + L).

    Args:
        mu: strong convexity μ of the loss in u.
        L: Lipschitz constant of its gradient, μ or above.

    Raises:
        ValueError: for μ ≤ 0, L < μ or a value that is not finite.
    """
    positive("mu", mu)
    positive("L", L)
    if mu > L:
        raise ValueError(f"mu, L: the Lipschitz constant L = {L} cannot lie below the strong convexity μ = {mu}.")
    return mu / (mu + L)


def general_largest_step(C: float, mu: float, L: float) -> float:
    """Largest η for a strongly convex loss, 2/(μ + L) · (1 − (1 + κ)C)/(1 + C)²; 0 if C ≥ 1/(1 + κ).

    The step is θ ← θ − ηJᵀ(JJᵀ)⁻¹g, g the gradient in u; with JᵀHJ in place of JᵀJ, H the loss's Hessian in
    u, it is a Newton step in u, to which `largest_step` applies if the loss is quadratic.

    Args:
        C: the constant of condition 2.
        mu: strong convexity μ of the loss in u.
        L: Lipschitz constant of its gradient.

    Raises:
        ValueError: for C < 0, μ ≤ 0, L < μ or a value that is not finite.
    """
    non_negative("C", C)
    limit = general_constant_limit(mu, L)
    return max(0.0, 2 / (mu + L) * (1 - C / limit) / (1 + C) ** 2)


def general_rate(eta: float, mu: float, L: float) -> float:
    """Bound on the factor per step of ‖u − u⋆‖²: 1 − 2ημL/(μ + L), for η up to `general_largest_step`.

    With J fixed it is the rate of gradient descent on a strongly convex function (Nesterov 2004, theorem
    2.1.15), attained at η = 2/(μ + L): ((L − μ)/(L + μ))².

    Raises:
        ValueError: for η outside (0, 2/(μ + L)], μ ≤ 0, L < μ or a value that is not finite.
    """
    positive("eta", eta)
    largest = general_largest_step(0.0, mu, L)
    if eta > largest:
        raise ValueError(f"eta: must be at most 2/(μ + L) = {largest:.6g}, got {eta}; no bound covers larger steps.")
    return 1 - 2 * eta * mu * L / (mu + L)


def total_movement(residual: Float[np.ndarray, "N"], gram: Float[np.ndarray, "N N"]) -> float:
    """How far NGD moves the parameters of a linear model in all: ‖θ(∞) − θ(0)‖ = √(rᵀG⁺r), at any η < 2.

    In the range of G alone if that is singular, up to λ ≤ Nελ_max: the step is then −ηJ⁺r. Cost O(N³).

    Args:
        residual: r(0).
        gram: G, not divided by n.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or a matrix that is not positive
            semidefinite or is zero.
    """
    values, components = _modes(residual, gram, "residual")
    kept = values > 0
    return float(np.sqrt((components[kept] ** 2 / values[kept]).sum()))


def movement(
    residual: Float[np.ndarray, "N"], gram: Float[np.ndarray, "N N"], eta: float, steps: Sequence[int]
) -> Float[np.ndarray, "S"]:
    """‖θ(k) − θ(0)‖ after each number of NGD steps on a linear model: |1 − (1 − η)^k| √(rᵀG⁺r).

    Args:
        residual: r(0).
        gram: G, not divided by n.
        eta: learning rate η.
        steps: numbers of steps k, in any order.

    Raises:
        ValueError: as `total_movement`; for η ≤ 0 or k < 0.
    """
    covered = predict_train(np.zeros(1), np.ones(1), 1.0, eta, steps)[:, 0]
    return np.asarray(np.abs(covered) * total_movement(residual, gram))


def movement_bound(residual_norm: float, lambda_min: float) -> float:
    """Bound on `total_movement` by the least eigenvalue: ‖r(0)‖/√λ_min(G(0)).

    Raises:
        ValueError: for a negative norm, λ_min ≤ 0 or a value that is not finite.
    """
    non_negative("residual_norm", residual_norm)
    positive("lambda_min", lambda_min)
    return residual_norm / sqrt(lambda_min)


def kfac_residual(
    leverage: Float[np.ndarray, "N"], eta: float, steps: Sequence[int], initial: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "S N"]:
    """Residuals after each number of K-FAC steps with S frozen and SSᵀ invertible: (1 − ηh_i)^k r_i(0).

    Every sample decays on its own. With factors that are means over samples, the step is n times larger: pass
    nη.

    Args:
        leverage: h, `leverages(X)`.
        eta: learning rate η.
        steps: numbers of steps k, in any order.
        initial: r(0).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, leverages outside [0, 1], η ≤ 0 or k < 0.
    """
    leverage, initial = array("leverage", leverage, 1), array("initial", initial, 1)
    length("initial", initial, len(leverage), "one per leverage")
    times = array("steps", np.asarray(list(steps)), 1)[:, None]
    if times.min() < 0:
        raise ValueError(f"steps: must be 0 or above, got {int(times.min())}.")
    if leverage.min() < -UNIT or leverage.max() > 1 + UNIT:
        raise ValueError("leverage: must lie in [0, 1]; take it from leverages(X), not divided or multiplied by n.")
    return np.asarray(gd_contraction(leverage, eta) ** times * initial)


def kfac_worst_rate(inputs: Float[np.ndarray, "N D"], eta: float) -> float:
    """Bound on the factor per step of ‖r‖² under K-FAC: 1 − η/λ_max(XᵀX) (theorem 4).

    It puts the smallest leverage that unit inputs could have, 1/λ_max, in the place of all. With S frozen it
    holds for ηh_i ≤ 1, so for η ≤ 1 and for η ≤ λ_min(XᵀX), the paper's order of η. Cost O(N D min(N, D)).

    Args:
        inputs: X, rows of norm 1.
        eta: learning rate η, at most λ_max.

    Raises:
        ValueError: for a wrong shape, entries that are not finite, rows without unit norm, or η outside
            (0, λ_max].
    """
    inputs = array("inputs", inputs, 2)
    norms = np.linalg.norm(inputs, axis=1)
    worst = int(np.abs(norms - 1).argmax())
    if abs(norms[worst] - 1) > UNIT:
        raise ValueError(f"inputs: row {worst} has norm {norms[worst]:.6g}, but the bound is for rows of norm 1.")
    positive("eta", eta)
    largest = float(np.linalg.norm(inputs, 2) ** 2)
    if eta > largest:
        raise ValueError(f"eta: must be at most λ_max(XᵀX) = {largest:.6g}, got {eta}; no bound covers larger steps.")
    return 1 - eta / largest


def complexity_term(targets: Float[np.ndarray, "N"], gram: Float[np.ndarray, "N N"]) -> float:
    """The leading term of the generalisation bound, √(2 yᵀG⁻¹y/n), to be measured, not a bound in itself.

    It is twice the Rademacher complexity √(tr G)/n · B of the linear functions in a ball of radius B =
    √(yᵀG⁻¹y), `total_movement` from zero outputs; the 2 stands for 4 tr(G)/n, tr(G)/n = ½ for ReLU and unit
    inputs (Arora et al. 2019, arXiv 1901.08584). Cost O(N³).

    Args:
        targets: y.
        gram: G∞, or G, not divided by n.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or a matrix that is not positive definite
            to round-off, λ_min ≤ Nελ_max.
    """
    values, components = _modes(targets, gram, "targets")
    if not values.all():
        raise ValueError(
            "gram: is singular to round-off, so yᵀG⁻¹y is undefined; leave out duplicate and nearly parallel inputs."
        )
    return float(np.sqrt(2 * np.mean(components**2 / values)))


def path_straightness(path: Float[np.ndarray, "T N *C"]) -> Float[np.ndarray, "N"]:
    """Length of each sample's path in output space over the distance of its end points, 1 or above.

    NGD on a linear model with η ≤ 1 gives 1. A sample that never moves counts as straight, one that returns
    to its start as infinitely long. With a single output, straight means that it never turns back.

    Args:
        path: outputs over time, at least two points, of one output `[T, N]` or of several `[T, N, C]`.

    Raises:
        ValueError: for a wrong shape, entries that are not finite, or a single point.
    """
    path = array("path", path, max(2, min(np.ndim(path), 3)))
    if len(path) < 2:
        raise ValueError("path: needs the outputs at two times or more, got one; include those before the first step.")
    points = path.reshape(*path.shape[:2], -1)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=-1).sum(axis=0)
    distances = np.linalg.norm(points[-1] - points[0], axis=-1)
    fallback = np.where(lengths > 0, np.inf, 1.0)
    return np.asarray(np.divide(lengths, distances, out=fallback, where=distances > 0))


def _product(pattern_gram: Float[np.ndarray, "N N"], inputs: ArrayLike) -> Float[np.ndarray, "N N"]:
    """(SSᵀ) ∘ (XXᵀ)."""
    inputs = array("inputs", inputs, 2)
    length("inputs", inputs, len(pattern_gram), "one per row of pattern")
    return np.asarray(pattern_gram * (inputs @ inputs.T))


def _modes(vector: ArrayLike, gram: ArrayLike, name: str) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Eigenvalues of G, 0 where they are below round-off, and the vector's components along the eigenvectors."""
    values, vectors = kernel_modes(symmetric("gram", gram))
    vector = array(name, vector, 1)
    length(name, vector, len(values), "one per row of gram")
    round_off = len(values) * np.finfo(np.float64).eps * values[0]
    if values[-1] < -SYMMETRY * values[0] or values[0] <= 0:
        raise ValueError(
            f"gram: has eigenvalues from {values[-1]:.3g} to {values[0]:.3g}, but JJᵀ is not zero and has no negative "
            "eigenvalue."
        )
    return np.where(values > round_off, values, 0.0), vectors.T @ vector
