r"""Block-diagonal parts of a curvature matrix: how much they leave out, and what that says of steps.

C is symmetric, `[P, P]`, cut into blocks C_bc by a partition of the parameters; BD(C) keeps the diagonal ones. The
**off-block share** is ω = 1 − Σ_b ‖C_bb‖_F² / ‖C‖_F², so that ‖C − BD(C)‖_F = √ω ‖C‖_F. Every function states its partition by
its arguments: a number of blocks, or their kernels.

**Row side.** For C = SᵀS with S = [S_1 … S_B] and kernels K_b = S_bS_bᵀ `[R, R]`, tr(S_bᵀS_c S_cᵀS_b) gives ‖C_bc‖_F² =
⟨K_b, K_c⟩_F ≥ 0. Kernels that are alike make ω large: equal ones 1 − 1/B, whatever steps do.

**Steps.** Undamped, with K = Σ_b K_b and every K_b of full rank R, a gradient Sᵀr has the full step SᵀK⁻¹r and the
block-diagonal step with the parts S_bᵀK_b⁻¹r, of squared norms rᵀK⁻¹r and Σ_b rᵀK_b⁻¹r and with the inner product Σ_b
rᵀK⁻¹S_bS_bᵀK_b⁻¹r = B rᵀK⁻¹r.

Source: derived; the questions are those of Granziol & Juarev 2026 (arXiv 2602.00816, whether block-diagonal approximations
fail), Zhang, Chen, Ding, Li, Sun & Luo 2024 (arXiv 2402.16788, quadratics) and Dong, Zhang, Luo, Yao & Sun 2025 (arXiv
2505.02809, many classes).
"""

from collections.abc import Sequence
from math import log, sqrt

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, at_least_one, length, positive, symmetric


def off_block_share(mass: ArrayLike) -> float:
    """ω from the squared Frobenius norms ‖C_bc‖_F² `[B, B]` of all blocks.

    Raises:
        ValueError: for a matrix that is not square and symmetric, a negative norm, or norms that are all 0.
    """
    mass = symmetric("mass", mass)
    if mass.min() < 0 or not mass.any():
        raise ValueError("mass: squared norms of blocks are at least 0, and not all of them are 0.")
    return float(1 - np.trace(mass) / mass.sum())


def kernel_mass(kernels: ArrayLike) -> Float[np.ndarray, "B B"]:
    """‖C_bc‖_F² of C = SᵀS from the kernels K_b = S_bS_bᵀ `[B, R, R]`: ⟨K_b, K_c⟩_F. Cost O(B²R²).

    Raises:
        ValueError: for anything but a stack of symmetric matrices.
    """
    flat = symmetric("kernels", kernels, ndim=3)
    flat = flat.reshape(len(flat), -1)
    return np.asarray(flat @ flat.T)


def aligned_share(norms: ArrayLike) -> float:
    """ω for kernels of given Frobenius norms that are multiples of one another: 1 − Σ n_b² / (Σ n_b)², 1 − 1/B if equal.

    It is the largest ω that kernels of these norms can have.

    Raises:
        ValueError: for a negative norm, or norms that are all 0.
    """
    norms = array("norms", norms, 1)
    if norms.min() < 0 or not norms.any():
        raise ValueError("norms: must be at least 0, and not all of them 0.")
    return float(1 - np.square(norms).sum() / norms.sum() ** 2)


def random_product_error(share: float) -> float:
    """√(E‖(C − BD)v‖² / E‖Cv‖²) for a Gaussian v: √ω, as E‖Av‖² = ‖A‖_F² for every A.

    Raises:
        ValueError: for ω outside [0, 1].
    """
    return sqrt(_share(share))


def random_alignment(share: float) -> float:
    """What cos(Cv, BD v) concentrates at for a Gaussian v: ⟨C, BD⟩_F/(‖C‖_F‖BD‖_F) = √(1 − ω).

    Raises:
        ValueError: for ω outside [0, 1].
    """
    return sqrt(1 - _share(share))


def undamped_cosine(kernels: ArrayLike, residual: ArrayLike) -> float:
    """Cosine of the undamped full and block-diagonal steps for the gradient Sᵀr: B √(rᵀK⁻¹r) / √(Σ_b rᵀK_b⁻¹r).

    1 if all kernels are equal, whatever ω is, and B / √(Σ c_b · Σ 1/c_b) for multiples c_b of one kernel: the block-diagonal
    step moves every block by as much in the outputs, the full one by its share c_b. In the outputs both steps have the
    direction r. Cost O(B R³).

    Args:
        kernels: K_b `[B, R, R]`, positive definite.
        residual: r `[R]`.

    Raises:
        ValueError: for a kernel that is not positive definite, or a residual of another length.
    """
    kernels = symmetric("kernels", kernels, ndim=3)
    r = array("residual", residual, 1)
    length("residual", r, kernels.shape[-1], "the rows of the kernels")
    whole, *parts = (_quadratic(index, kernel, r) for index, kernel in enumerate([kernels.sum(0), *kernels]))
    return min(1.0, len(kernels) * sqrt(whole / sum(parts)))


def _quadratic(index: int, kernel: Float[np.ndarray, "R R"], r: Float[np.ndarray, " R"]) -> float:
    """rᵀK⁻¹r."""
    try:
        return float(r @ scipy.linalg.cho_solve(scipy.linalg.cho_factor(kernel), r))
    except np.linalg.LinAlgError:
        what = f"that of block {index - 1}" if index else "their sum"
        raise ValueError(
            f"kernels: {what} is not positive definite, which undamped steps need: take fewer rows."
        ) from None


def canonical_correlations(left: ArrayLike, right: ArrayLike) -> Float[np.ndarray, " k"]:
    """Singular values of C_bb^{−1/2} C_bc C_cc^{−1/2} on the ranges, for C = SᵀS with columns S_b and S_c; descending.

    With S_b = U_bΣ_bV_bᵀ they are those of U_bᵀU_c. Where both have full row rank R, all R of them are 1.

    Args:
        left: S_b `[R, P_b]`.
        right: S_c `[R, P_c]`.

    Raises:
        ValueError: for arrays with different numbers of rows.
    """
    left, right = array("left", left, 2), array("right", right, 2)
    length("right", right, len(left), "the rows of left")
    bases = []
    for block in (left, right):
        u, sizes, _ = np.linalg.svd(block, full_matrices=False)
        bases.append(u[:, sizes > max(block.shape) * np.finfo(np.float64).eps * sizes[0]])
    return np.asarray(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(max=1.0))


def softmax_share(classes: int) -> float:
    """ω of softmax regression at uniform probabilities, with a block a class: 1/C, whatever the inputs are.

    The blocks are (1/C)(1 − 1/C) E[xxᵀ] on the diagonal and −(1/C²) E[xxᵀ] off it.

    Raises:
        ValueError: for fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes: must be at least 2, got {classes}.")
    return 1 / classes


def condition_numbers(spectra: Sequence[ArrayLike]) -> tuple[float, float]:
    """κ of a block-diagonal quadratic with given spectra, and the largest κ_b of a block.

    The first is that of gradient descent with one step size, the second that with the best step size in every block.

    Raises:
        ValueError: for no blocks, or an eigenvalue that is not above 0.
    """
    blocks = [array("spectra", spectrum, 1) for spectrum in spectra]
    at_least_one("blocks", len(blocks))
    for block in blocks:
        positive("spectra", float(block.min()))
    return (
        float(max(block.max() for block in blocks) / min(block.min() for block in blocks)),
        float(max(block.max() / block.min() for block in blocks)),
    )


def descent_steps(condition: float, reduction: float) -> float:
    """Steps by which gradient descent at its best step size multiplies the worst error by a number below 1.

    The factor of a step is (κ − 1)/(κ + 1), at η = 2/(λ_max + λ_min).

    Raises:
        ValueError: for κ below 1, or a reduction that does not lie between 0 and 1.
    """
    if not condition >= 1:
        raise ValueError(f"condition: must be at least 1, got {condition}.")
    if not 0 < reduction < 1:
        raise ValueError(f"reduction: must lie between 0 and 1, got {reduction}.")
    factor = (condition - 1) / (condition + 1)
    return log(reduction) / log(factor) if factor > 0 else 1.0


def best_difference(unit: float) -> float:
    """The ε at which a central difference of gradients is most exact, up to a constant: u^{1/3}.

    Its error is ε² from what the difference cuts off, plus u/ε from round-off, at quantities of order 1.

    Args:
        unit: unit round-off u of the floating-point type.

    Raises:
        ValueError: for u that is not above 0.
    """
    positive("unit", unit)
    return float(unit ** (1 / 3))


def _share(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"share: lies between 0 and 1, got {share}.")
    return share
