r"""Natural gradient on the cross-entropy loss in function space: Newton's method, sample by sample.

With H = blockdiag(diag(p) − ppᵀ) and F = JᵀHJ/N, a step of size η moves the logits by Δz = −ηΘ(HΘ + ρI)⁻¹(p −
y), Θ = JJᵀ/N, in rows (output, sample). At zero damping HΔz = −η(p − y). For a sample of class k this is
solved by

    Δz = η (1/p_k) e_k + s 1,

for any shift s: only the logit of the label moves against the others, for two classes and for many (derived).
With S = (1 − p_k)/p_k = exp(ℓ) − 1 of the loss ℓ = log(1 + S), every step multiplies S by exp(−η(1 + S)). So
the loss obeys a scalar recursion of its own, whatever the network, and its ratio per step tends to exp(−η)
from below as the samples are fitted; no step interpolates. The shift s (the gauge) leaves the losses of the
training samples alone but not the test outputs: the limit ρ → 0 picks the one with the smallest step in
parameters (`minimum_norm_gauge`). Source: Karakida & Osawa (2020), appendix; claim 13.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import log_softmax, softmax

from curvlab.theory._checks import array, length, positive, symmetric


def newton_logit_step(
    logits: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"], eta: float
) -> Float[np.ndarray, "N C"]:
    """The zero-damping step of the logits in the gauge of mean zero: −ηH⁺(p − y) = (η/p_k)(e_k − 1/C).

    Args:
        logits: z.
        labels: class k of each sample.
        eta: learning rate η.

    Returns:
        Δz. Cost O(N C).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, labels that are no class, or η ≤ 0.
    """
    logits, one_hot = _logits(logits, labels)
    positive("eta", eta)
    inverse = np.exp(-(log_softmax(logits, axis=1) * one_hot).sum(axis=1, keepdims=True))
    return np.asarray(eta * inverse * (one_hot - 1 / logits.shape[1]))


def minimum_norm_gauge(kernel: Float[np.ndarray, "R R"], step: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Adds to each sample's step of the logits the shift for which the step in parameters is shortest.

    The shortest parameter step that gives Δz has the squared length ΔzᵀΘ⁻¹Δz/N; with G the shifts, its
    minimum over Δz + Gs is at s = −(GᵀΘ⁻¹G)⁻¹GᵀΘ⁻¹Δz (derived). If Θ = I_C ⊗ K, as at infinite width, steps
    of mean zero stay.

    Args:
        kernel: Θ, positive definite, in rows (output, sample).
        step: Δz in any gauge.

    Returns:
        Δz in the gauge of the zero-damping limit. Cost O(R³).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or a singular kernel.
    """
    step = array("step", step, 2)
    kernel = _kernel(kernel, step)
    samples, outputs = step.shape
    shifts = np.tile(np.eye(samples), (outputs, 1))
    both = np.concatenate([shifts, step.T.reshape(-1, 1)], axis=1)
    try:
        factor = np.linalg.cholesky(kernel)
    except np.linalg.LinAlgError:
        raise ValueError(
            "kernel: is not positive definite, so some step of the logits has no parameter step; widen the network "
            "or take fewer samples."
        ) from None
    whitened = np.linalg.solve(factor, both)
    shift = np.linalg.lstsq(whitened[:, :-1], -whitened[:, -1])[0]
    return np.asarray(step + shift[:, None])


def damped_logit_step(
    kernel: Float[np.ndarray, "R R"],
    logits: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, "N"],
    eta: float,
    damping: float,
) -> Float[np.ndarray, "N C"]:
    """The damped step of the logits, −ηΘ(HΘ + ρI)⁻¹(p − y).

    The published λ, added to HJJᵀ without the divisor N, is λ = Nρ. The ratio of the loss turns from exp(−η)
    towards 1 once p(1 − p) × Θ of the fitted samples falls below ρ.

    Args:
        kernel: Θ, divided by N, in rows (output, sample).
        logits: z.
        labels: class of each sample.
        eta: learning rate η.
        damping: ρ > 0, in the units of F.

    Returns:
        Δz. Cost O(R³).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, labels that are no class, η ≤ 0 or ρ ≤ 0.
    """
    logits, one_hot = _logits(logits, labels)
    kernel = _kernel(kernel, logits)
    positive("eta", eta)
    positive("damping", damping)
    samples, outputs = logits.shape
    p = softmax(logits, axis=1)
    hessian = -np.einsum("nc,nd,nm->cndm", p, p, np.eye(samples)).reshape(p.size, p.size)
    np.fill_diagonal(hessian, np.diagonal(hessian) + p.T.ravel())
    system = hessian @ kernel + damping * np.eye(p.size)
    moved = -eta * kernel @ np.linalg.solve(system, (p - one_hot).T.ravel())
    return np.asarray(moved.reshape(outputs, samples).T)


def newton_losses(losses: Float[np.ndarray, "N"], eta: float, steps: int) -> Float[np.ndarray, "S N"]:
    """Cross-entropy of every training sample after 0, 1, …, `steps` zero-damping steps, from its initial value alone.

    ℓ = log(1 + S) with log S ← log S − η(1 + S). Cost O(N · steps).

    Args:
        losses: initial ℓ of each sample, above 0.
        eta: learning rate η.
        steps: number of steps.

    Returns:
        One row for each number of steps, `steps` + 1 of them.

    Raises:
        ValueError: for losses that are not finite and above 0, η ≤ 0 or steps < 0.
    """
    current = array("losses", losses, 1)
    positive("eta", eta)
    if current.min() <= 0:
        raise ValueError(f"losses: a cross-entropy is above 0, got {current.min()}.")
    if steps < 0:
        raise ValueError(f"steps: must be 0 or above, got {steps}.")
    odds = np.log(np.expm1(current))
    rows = [current]
    for _ in range(steps):
        odds = odds - eta * np.exp(np.logaddexp(0, odds))
        rows.append(np.logaddexp(0, odds))
    return np.stack(rows)


def fitted_loss_ratio(eta: float) -> float:
    """exp(−η), to which the ratio of the loss per zero-damping step tends as the samples are fitted.

    Raises:
        ValueError: if η ≤ 0.
    """
    positive("eta", eta)
    return float(np.exp(-eta))


def _logits(logits: ArrayLike, labels: ArrayLike) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N C"]]:
    """The validated logits and the one-hot labels."""
    logits = array("logits", logits, 2)
    classes = logits.shape[1]
    labels = np.asarray(labels)
    if labels.shape != (len(logits),) or not np.isin(labels, np.arange(classes)).all():
        raise ValueError(
            f"labels: expected one class index from 0 to {classes - 1} for each of the {len(logits)} samples."
        )
    return logits, np.eye(classes)[labels]


def _kernel(kernel: ArrayLike, outputs: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "R R"]:
    kernel = symmetric("kernel", kernel)
    length("kernel", kernel, outputs.size, "one row per (output, sample)")
    return kernel
