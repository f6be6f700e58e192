r"""Isotropy of the response and its scale α, for each approximate Fisher at zero damping.

Notation of Karakida & Osawa (2020, arXiv 2010.00879). The loss is ½ Σ_c (z − y)² averaged over N samples, J_l
the Jacobian of the outputs in the parameters of layer l, Θ_l = J_l J_lᵀ/N its kernel. An approximation F
answers one step of size η in function space by z ← z − η M (z − y) with the *response* M = (1/N) J (F + ρI)⁻¹
Jᵀ. It is *isotropic* if M = αI; then η = 1/α interpolates in one step and η < 2/α is stable.

**Layer-wise family.** F = (1/N) Sᵀ(Σ ⊗ I)S with S = blockdiag(J_1, …, J_L) and a symmetric Σ `[L, L]`. With
D = blockdiag(Θ_1, …, Θ_L) > 0, K = D^½(Σ ⊗ I)D^½ and w = D^½(1 ⊗ I), the response is wᵀ(K + ρI)⁻¹w. Since
ker K = D^{-½}(ker Σ ⊗ I), w is orthogonal to ker K exactly if 1 ⊥ ker Σ. Therefore, as ρ → 0:

- If 1 ∈ range(Σ), the limit exists, equals the response of the pseudo-inverse F⁺, and is **αI with α =
  1ᵀΣ⁺1**, for every D > 0, whether or not Σ is invertible. Only for an invertible Σ does each layer
  contribute a multiple of the identity, c_l I with c = Σ⁻¹1; for a singular Σ the shares of the layers depend
  on D and only their sum is isotropic (the full Fisher, Σ = 11ᵀ, with shares Θ_l Θ⁻¹ and α = 1).
- If 1 ∉ range(Σ), the response grows like 1/ρ, in proportion to an anisotropic matrix: see
  `curvlab.theory.zero_damping_pole`.

**Block-tridiagonal.** T has the eigenvalues 1 + 2cos(kπ/(L+1)) and is singular for L = 3s+2, depths which the
paper excludes. Its kernel there is spanned by (1, −1, 0, 1, −1, 0, …, 1, −1), whose entries sum to zero: 1 ∈
range(T), the limit exists and is isotropic as well. So α = ⌈L/3⌉ at every depth: s, s+1, s+1 for L = 3s,
3s+1, 3s+2.
"""

from collections.abc import Sequence
from math import cos, pi

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import at_least_one, layer_widths, positive, symmetric
from curvlab.tools.text import suggestion

STRUCTURES = ("full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise", "kfac")
"""Structures for which a response scale α is derived; no theorem covers the others."""


def tridiagonal_sigma(depth: int) -> Float[np.ndarray, "L L"]:
    """Σ of the block-tridiagonal Fisher: ones on the three central diagonals.

    Raises:
        ValueError: if `depth` is below 1.
    """
    at_least_one("depth", depth)
    return np.asarray(np.eye(depth) + np.eye(depth, k=1) + np.eye(depth, k=-1))


def tridiagonal_eigenvalues(depth: int) -> Float[np.ndarray, "L"]:
    """Eigenvalues of `tridiagonal_sigma(depth)` in descending order: 1 + 2cos(kπ/(L+1)), k = 1, …, L.

    Raises:
        ValueError: if `depth` is below 1.
    """
    at_least_one("depth", depth)
    return np.array([1 + 2 * cos(k * pi / (depth + 1)) for k in range(1, depth + 1)])


def tridiagonal_covered(depth: int) -> bool:
    """Whether Σ of the block-tridiagonal Fisher is invertible, the depths that the paper covers: L ≠ 3s + 2.

    Raises:
        ValueError: if `depth` is below 1.
    """
    at_least_one("depth", depth)
    return depth % 3 != 2


def null_space(sigma: ArrayLike) -> tuple[Float[np.ndarray, "L L"], Float[np.ndarray, "L k"]]:
    """Pseudo-inverse and orthonormal kernel of a symmetric matrix, by eigendecomposition.

    Eigenvalues up to L·ε·max|λ| (ε of float64) count as zero. Cost O(L³).

    Raises:
        ValueError: if `sigma` is not a finite symmetric matrix.
    """
    values, vectors = np.linalg.eigh(symmetric("sigma", sigma))
    zero = np.abs(values) <= len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    kept = vectors[:, ~zero]
    return kept / values[~zero] @ kept.T, vectors[:, zero]


def reaches_ones(kernel: Float[np.ndarray, "L k"]) -> bool:
    """Whether 1 lies in range(Σ), given the orthonormal kernel of Σ: then the zero-damping limit exists."""
    return bool(np.linalg.norm(kernel.sum(axis=0)) <= 1e-8 * np.sqrt(len(kernel)))


def layer_coefficients(sigma: Float[np.ndarray, "L L"]) -> Float[np.ndarray, "L"]:
    """The layer weights c of the layer-wise family at zero damping; α is their sum (Karakida & Osawa, claim 2).

    For an invertible Σ they are c = Σ⁻¹1, and layer l contributes c_l I to the response (with Θ_l > 0
    wherever c_l ≠ 0). For a singular Σ with 1 ∈ range(Σ) they are Σ⁺1: the sum α = 1ᵀΣ⁺1 is still the scale
    of the limiting response, the single entries are not the shares of the layers, which then depend on the
    kernels (module docstring).

    Args:
        sigma: symmetric Σ, one row per layer.

    Returns:
        c, one entry per layer. Cost O(L³).

    Raises:
        ValueError: if `sigma` is not a finite symmetric matrix, or if 1 is not in its range (no limit
            exists).
    """
    inverse, kernel = null_space(sigma)
    if not reaches_ones(kernel):
        raise ValueError(
            "sigma: is singular and the vector of ones is not in its range, so the response grows like 1/ρ as the "
            "damping ρ goes to 0 and has no α; choose a Σ with 1 in its range, or keep a positive damping."
        )
    return np.asarray(inverse.sum(axis=1))


def alpha(
    structure: str,
    widths: Sequence[int],
    samples: int,
    *,
    active: float = 1.0,
    bias: bool = False,
    sigma: Float[np.ndarray, "L L"] | None = None,
) -> float:
    r"""Scale α of the zero-damping response, derived from the definition of each structure.

    With N samples, C = M_L outputs and m_l = M_{l−1} inputs of layer l (one more with a bias):

    | structure | α | isotropic if |
    |---|---|---|
    | full | 1 | Θ > 0 |
    | block-diagonal | L | every Θ_l > 0 |
    | block-tridiagonal | ⌈L/3⌉ | every Θ_l > 0 |
    | layer-wise | 1ᵀΣ⁺1 | every Θ_l > 0 |
    | kfac | Σ_{l<L} min(N, m_l) min(NC, M_l)/(NC) + min(N, m_L)/N | every m_l ≥ N, hidden M_l ≥ NC |
    | unit-wise | Σ_{l<L} M_l min(m_l, γN)/(NC) + min(N, m_L)/N | every m_l ≥ N, in the limit of wide layers |

    Where its condition holds, K-FAC gives **N(L−1) + 1**: the hidden layers N each, the last layer 1, because
    there δ is the same e_c for every sample, so that B_L = I_C has no eigenvalue of order 1/N to invert. The
    published value, N·L, counts the last layer like the others. Unit-wise gives γM(L−1)/C + 1, against
    γM(L−1): a hidden unit moves the C outputs of a sample along one direction only, and the directions of
    many units average to I/C; the last layer adds I. Where the condition fails the response is not a multiple
    of I, and α is the mean of its diagonal: for K-FAC exactly, as long as in each layer only one factor is
    short of rank (with M_0 < N the first layer has the diagonal N × leverages, mean M_0); for unit-wise the
    first layer's value is an upper bound if the number of active samples varies.

    Args:
        structure: one of `STRUCTURES`.
        widths: (M_0, …, M_L); for M_0 take the rank of the inputs where that is lower.
        samples: N, the number of samples that the factors and the loss average over.
        active: γ, the expected share of (unit, sample) pairs with φ' ≠ 0: ½ for ReLU, 1 for smooth
            activations.
        bias: whether layers have a bias, one more input.
        sigma: Σ, for the layer-wise structure only.

    Returns:
        α; `best_step` and `stability_limit` turn it into learning rates.

    Raises:
        ValueError: for an unknown structure, impossible sizes, or a Σ that has no limit, is missing or is not
            used.
    """
    if structure not in STRUCTURES:
        raise ValueError(_unknown(structure))
    if (sigma is not None) != (structure == "layer-wise"):
        raise ValueError(f"sigma: give it for the structure 'layer-wise' and for no other, not for {structure!r}.")
    widths = layer_widths(widths)
    at_least_one("samples", samples)
    _share("active", active)
    depth, outputs = len(widths) - 1, widths[-1]
    fan_in = [width + bias for width in widths[:-1]]
    hidden = list(zip(fan_in, widths[1:-1], strict=False))
    last = min(samples, fan_in[-1]) / samples
    rows = samples * outputs
    match structure:
        case "full":
            return 1.0
        case "block-diagonal":
            return float(depth)
        case "block-tridiagonal":
            return float(-(-depth // 3))
        case "kfac":
            return sum(min(samples, m) * min(rows, width) / rows for m, width in hidden) + last
        case "unit-wise":
            return sum(width * min(m, active * samples) / rows for m, width in hidden) + last
        case _:
            assert sigma is not None
            if len(sigma) != depth:
                raise ValueError(f"sigma: has {len(sigma)} rows but widths describe {depth} layers.")
            return float(layer_coefficients(sigma).sum())


def published_alpha(structure: str, depth: int, width: int, samples: int, *, active: float = 1.0) -> float:
    """Scale α as published by Karakida & Osawa (2020), hidden layers of one width; compare with `alpha`.

    full 1; block-diagonal L; block-tridiagonal s at L = 3s and s+1 at L = 3s+1; K-FAC N·L; unit-wise γ(L−1)M.

    Args:
        structure: one of `STRUCTURES` other than "layer-wise", whose α follows from Σ alone.
        depth: L, the number of weight layers.
        width: M, of every hidden layer (unit-wise only).
        samples: N (K-FAC only).
        active: γ, ½ for ReLU and 1 for other activations (unit-wise only).

    Raises:
        ValueError: for a structure without a published α, impossible sizes, and for the block-tridiagonal
            Fisher at the depths L = 3s+2, which the paper excludes because Σ is singular there.
    """
    for name, value in (("depth", depth), ("width", width), ("samples", samples)):
        at_least_one(name, value)
    _share("active", active)
    match structure:
        case "full":
            return 1.0
        case "block-diagonal":
            return float(depth)
        case "block-tridiagonal":
            if not tridiagonal_covered(depth):
                raise ValueError(
                    f"depth: the paper excludes L = {depth} = 3s+2 for the block-tridiagonal Fisher, where Σ is "
                    "singular; `alpha` gives the limit of the damped response, which exists and is isotropic."
                )
            return float(-(-depth // 3))
        case "kfac":
            return float(samples * depth)
        case "unit-wise":
            return active * (depth - 1) * width
        case _:
            raise ValueError(_unknown(structure))


def best_step(alpha: float) -> float:
    """The learning rate 1/α that interpolates in one step of an isotropic response.

    Raises:
        ValueError: if `alpha` is not above 0: no step size then reduces the loss.
    """
    positive("alpha", alpha)
    return 1 / alpha


def stability_limit(largest: float) -> float:
    """The learning rate 2/λ below which a response with largest eigenvalue λ contracts (λ = α if it is isotropic).

    Raises:
        ValueError: if `largest` is not above 0.
    """
    positive("largest", largest)
    return 2 / largest


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}: a share, above 0 and at most 1, got {value}.")


def _unknown(structure: str) -> str:
    return f"structure: no scale α is known for {structure!r}. {suggestion(structure, STRUCTURES)}"
