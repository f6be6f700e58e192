r"""Responses of the layer-wise family from the kernels of the layers, at any damping.

For training inputs X the layer kernels are Θ_l = J_l J_lᵀ/N `[R, R]`, stacked to `[L, R, R]`; for a test
response the cross-kernels Θ_l(x', X) = J_l(x') J_l(X)ᵀ/N `[L, R', R]`, with the same divisor N, the number of
training samples. The push-through identity (Sᵀ(Σ ⊗ I)S/N + ρI)⁻¹ Sᵀ = Sᵀ[(Σ ⊗ I)D + ρI]⁻¹, D = blockdiag(Θ_1,
…, Θ_L), gives

    K(x', X) = (1/N) J(x') (F + ρI)⁻¹ J(X)ᵀ = Σ_l Θ_l(x', X) Z_l,    Z = [(Σ ⊗ I)D + ρI]⁻¹ (1_L ⊗ I)

and the training response M = K(X, X) (Karakida & Osawa 2020, claims 8 and 10). Zero damping is the limit ρ →
0.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, length, non_negative, symmetric
from curvlab.theory.isotropy import null_space, reaches_ones


def exact_response(
    kernel: Float[np.ndarray, "R R"],
    damping: float = 0.0,
    test_kernel: Float[np.ndarray, "T R"] | None = None,
) -> Float[np.ndarray, "... R"]:
    """Response of the full Fisher: Θ(Θ + ρI)⁻¹, or Θ(x', X)(Θ + ρI)⁻¹ for a test kernel.

    Args:
        kernel: Θ = Σ_l Θ_l of the training inputs, divided by N.
        damping: ρ, in the units of Θ.
        test_kernel: Θ(x', X), divided by N.

    Returns:
        `[R, R]`, or `[T, R]` for a test kernel. Cost O(R³).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a negative damping, or a singular Θ at ρ =
            0.
    """
    kernel = symmetric("kernel", kernel)
    stack = None if test_kernel is None else array("test_kernel", test_kernel, 2)[None]
    return block_diagonal_response(kernel[None], damping, stack)


def block_diagonal_response(
    kernels: Float[np.ndarray, "L R R"],
    damping: float = 0.0,
    test_kernels: Float[np.ndarray, "L T R"] | None = None,
) -> Float[np.ndarray, "... R"]:
    """Response of the layer-wise block-diagonal Fisher: Σ_l Θ_l(x', X)(Θ_l + ρI)⁻¹.

    Args:
        kernels: Θ_l of the training inputs, divided by N.
        damping: ρ, in the units of Θ.
        test_kernels: Θ_l(x', X), divided by N; the training inputs themselves if left out.

    Returns:
        `[R, R]`, or `[T, R]` for test kernels. Cost O(L R³).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a negative damping, or a singular Θ_l at ρ
            = 0.
    """
    kernels, tested = _kernels(kernels, test_kernels)
    non_negative("damping", damping)
    damped = kernels + damping * np.eye(kernels.shape[-1])
    return np.asarray(sum(_right_solve(layer, damped[layer], test) for layer, test in enumerate(tested)))


def layer_wise_response(
    sigma: Float[np.ndarray, "L L"],
    kernels: Float[np.ndarray, "L R R"],
    damping: float = 0.0,
    test_kernels: Float[np.ndarray, "L T R"] | None = None,
) -> Float[np.ndarray, "... R"]:
    r"""Response of the layer-wise family for any symmetric Σ, and its limit at zero damping.

    At ρ = 0 with an invertible Σ this is Σ_l c_l Θ_l(x', X) Θ_l⁻¹, c = Σ⁻¹1; layers with c_l = 0 need no
    inverse. With a singular Σ and 1 ∈ range(Σ), let U be an orthonormal basis of ker Σ and c = Σ⁺1; the
    limit, which is also the response of the pseudo-inverse, is (derived)

        Z = D⁻¹(c ⊗ I) − D⁻¹(U ⊗ I) G⁻¹ (Uᵀ ⊗ I) D⁻¹(c ⊗ I),    G = (Uᵀ ⊗ I) D⁻¹ (U ⊗ I).

    So the training response is αI whatever D is, and test responses depend on all of D.

    Args:
        sigma: symmetric Σ.
        kernels: Θ_l of the training inputs, divided by N.
        damping: ρ, in the units of Θ. An indefinite Σ makes F + ρI singular where −ρ is one of
            `curvature_eigenvalues`.
        test_kernels: Θ_l(x', X), divided by N; the training inputs themselves if left out.

    Returns:
        `[R, R]`, or `[T, R]` for test kernels. Cost O((LR)³) with damping, O(L R³) without and with an
        invertible Σ.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, a negative damping, F + ρI singular, and at
            ρ = 0 for a singular Θ_l that is needed or a Σ without a limit.
    """
    sigma, kernels, tested = _family(sigma, kernels, test_kernels)
    non_negative("damping", damping)
    lift = _damped_lift(sigma, kernels, damping) if damping > 0 else _undamped_lift(sigma, kernels)
    return np.asarray(np.einsum("ltr,lrs->ts", tested, lift))


def zero_damping_pole(sigma: Float[np.ndarray, "L L"], kernels: Float[np.ndarray, "L R R"]) -> Float[np.ndarray, "R R"]:
    r"""The limit of ρM as ρ → 0: how the response diverges where 1 ∉ range(Σ), and zero where it does not.

    With U an orthonormal basis of ker Σ it is (1ᵀU ⊗ I)[(Uᵀ ⊗ I) D⁻¹ (U ⊗ I)]⁻¹(Uᵀ1 ⊗ I) (derived); for a
    kernel spanned by u, (Σ_l u_l)² (Σ_l u_l² Θ_l⁻¹)⁻¹, a harmonic mean of kernels, which is not isotropic.

    Args:
        sigma: symmetric Σ.
        kernels: Θ_l of the training inputs, divided by N; positive definite in every layer that ker Σ
            touches.

    Returns:
        `[R, R]`, in the units of Θ. Cost O(L R³ + (kR)³), k the dimension of ker Σ.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or a singular Θ_l that is needed.
    """
    sigma, kernels, _ = _family(sigma, kernels)
    _, null = null_space(sigma)
    size = kernels.shape[-1]
    if reaches_ones(null):
        return np.zeros((size, size))
    inverses = _inverses(kernels, np.abs(null).max(axis=1) > _NEGLIGIBLE)
    ones = np.kron(null.sum(axis=0)[:, None], np.eye(size))
    return np.asarray(ones.T @ np.linalg.solve(_gathered(null, inverses), ones))


def curvature_eigenvalues(
    sigma: Float[np.ndarray, "L L"], kernels: Float[np.ndarray, "L R R"]
) -> Float[np.ndarray, "LR"]:
    """Eigenvalues of D^½(Σ ⊗ I)D^½: those of F on the span of the rows, all others being zero.

    They are real for every symmetric Σ. Where one of them equals −ρ, F + ρI is singular: an indefinite Σ,
    such as the tridiagonal one at L ≥ 3, has such poles on the way to ρ = 0.

    Args:
        sigma: symmetric Σ.
        kernels: positive semi-definite Θ_l of the training inputs, divided by N.

    Returns:
        L·R eigenvalues, ascending. Cost O((LR)³).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or a Θ_l with a clearly negative
            eigenvalue.
    """
    sigma, kernels, _ = _family(sigma, kernels)
    values, vectors = np.linalg.eigh(kernels)
    if values.min() < -1e-8 * np.abs(values).max():
        layer = int(values.min(axis=1).argmin())
        raise ValueError(
            f"kernels: layer {layer} has the eigenvalue {values.min():.3g}; a kernel J Jᵀ/N has none below 0."
        )
    roots = vectors * np.sqrt(np.clip(values, 0, None))[:, None, :]
    blocks = np.einsum("lm,lri,mrj->limj", sigma, roots, roots)
    size = blocks.shape[0] * blocks.shape[1]
    return np.asarray(np.linalg.eigvalsh(blocks.reshape(size, size)))


_NEGLIGIBLE = 1e-10
"""Entries of c and of ker Σ below this, relative to 1 or to the largest c, are zeros of exact arithmetic."""


def _kernels(
    kernels: ArrayLike, test_kernels: ArrayLike | None
) -> tuple[Float[np.ndarray, "L R R"], Float[np.ndarray, "L T R"]]:
    kernels = symmetric("kernels", kernels, ndim=3)
    if test_kernels is None:
        return kernels, kernels
    tested = array("test_kernels", test_kernels, 3)
    length("test_kernels", tested, len(kernels), "one cross-kernel per layer kernel")
    length("test_kernels", tested, kernels.shape[-1], "the rows of the training kernels", axis=2)
    return kernels, tested


def _family(
    sigma: ArrayLike, kernels: ArrayLike, test_kernels: ArrayLike | None = None
) -> tuple[Float[np.ndarray, "L L"], Float[np.ndarray, "L R R"], Float[np.ndarray, "L T R"]]:
    sigma = symmetric("sigma", sigma)
    kernels, tested = _kernels(kernels, test_kernels)
    length("sigma", sigma, len(kernels), "one row per layer kernel")
    return sigma, kernels, tested


def _factor(layer: int, kernel: Float[np.ndarray, "R R"]) -> tuple[Float[np.ndarray, "R R"], bool]:
    try:
        factor, lower = scipy.linalg.cho_factor(kernel)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"kernels: the kernel of layer {layer} is not positive definite, which zero damping needs; remove "
            "duplicated inputs, widen the network or take fewer samples (a layer needs as many parameters as rows, "
            "the last layer as many inputs as samples), or use a positive damping."
        ) from None
    return factor, lower


def _right_solve(
    layer: int, kernel: Float[np.ndarray, "R R"], left: Float[np.ndarray, "T R"]
) -> Float[np.ndarray, "T R"]:
    return np.asarray(scipy.linalg.cho_solve(_factor(layer, kernel), left.T).T)


def _inverses(kernels: Float[np.ndarray, "L R R"], needed: Bool[np.ndarray, "L"]) -> Float[np.ndarray, "L R R"]:
    """Θ_l⁻¹ of the layers that are needed, zero elsewhere."""
    identity = np.eye(kernels.shape[-1])
    out = np.zeros_like(kernels)
    for layer in np.flatnonzero(needed):
        out[layer] = scipy.linalg.cho_solve(_factor(int(layer), kernels[layer]), identity)
    return out


def _gathered(null: Float[np.ndarray, "L k"], inverses: Float[np.ndarray, "L R R"]) -> Float[np.ndarray, "kR kR"]:
    """G = (Uᵀ ⊗ I) D⁻¹ (U ⊗ I)."""
    blocks = np.einsum("la,lb,lrs->arbs", null, null, inverses)
    size = blocks.shape[0] * blocks.shape[1]
    return np.asarray(blocks.reshape(size, size))


def _damped_lift(
    sigma: Float[np.ndarray, "L L"], kernels: Float[np.ndarray, "L R R"], damping: float
) -> Float[np.ndarray, "L R R"]:
    layers, size = kernels.shape[:2]
    blocks = np.einsum("lm,mrs->lrms", sigma, kernels).reshape(layers * size, layers * size)
    np.fill_diagonal(blocks, np.diagonal(blocks) + damping)
    ones = np.tile(np.eye(size), (layers, 1))
    try:
        return np.asarray(np.linalg.solve(blocks, ones).reshape(layers, size, size))
    except np.linalg.LinAlgError:
        raise ValueError(
            f"damping: F + ρI is singular at ρ = {damping}, because −ρ is one of `curvature_eigenvalues`; change it."
        ) from None


def _undamped_lift(sigma: Float[np.ndarray, "L L"], kernels: Float[np.ndarray, "L R R"]) -> Float[np.ndarray, "L R R"]:
    inverse, null = null_space(sigma)
    if not reaches_ones(null):
        raise ValueError(
            "damping: this Σ is singular and the vector of ones is not in its range, so the response diverges like "
            "1/ρ; use a positive damping, or `zero_damping_pole` for the rate."
        )
    coefficients = inverse.sum(axis=1)
    coefficients[np.abs(coefficients) <= _NEGLIGIBLE * np.abs(coefficients).max()] = 0
    needed = (coefficients != 0) | (np.abs(null) > _NEGLIGIBLE).any(axis=1)
    inverses = _inverses(kernels, needed)
    lift = coefficients[:, None, None] * inverses
    if null.shape[1] == 0:
        return np.asarray(lift)
    size = kernels.shape[-1]
    gathered = np.einsum("la,lrs->ars", null, lift).reshape(-1, size)
    shift = np.linalg.solve(_gathered(null, inverses), gathered).reshape(-1, size, size)
    return np.asarray(lift - np.einsum("lrs,la,ast->lrt", inverses, null, shift))
