r"""Responses of K-FAC and of the unit-wise Fisher, layer by layer, from back-propagated rows δ and inputs a.

A dense layer has the Jacobian rows δ_c(n) ⊗ a(n): `delta` `[R, M]` holds δ_c(n) = ∂f_c(n)/∂u(n) for R = C·N
rows, the output index outermost, and `inputs` `[N, m]` the layer's input in the coordinates of its
parameters: (s_w/√m) h, with a further column s_b for a bias. In the last layer δ_c(n) = e_c. Every function
gives

    K(x', X) = (1/N) J_l(x') F_l⁺ J_l(X)ᵀ,

the training response if the test arrays are left out; the whole network's is the sum over its layers.
Conventions: ½ Σ_c (z − y)² averaged over N samples, F_l⁺ the limit of zero damping (source: Karakida & Osawa
2020, claims 4 to 6; the formulas are derived from the definitions of the blocks).
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.typing import ArrayLike

from curvlab.theory._checks import array, length, symmetric

_CHUNK = 1 << 22
"""Entries of a stack of per-unit matrices that are held at a time."""


def kfac_layer_response(
    delta: Float[np.ndarray, "R M"],
    inputs: Float[np.ndarray, "N m"],
    test_delta: Float[np.ndarray, "T M"] | None = None,
    test_inputs: Float[np.ndarray, "K m"] | None = None,
) -> Float[np.ndarray, "... R"]:
    r"""Response of one layer under literal K-FAC, F_l = B ⊗ A, A = (1/N) Σ a aᵀ, B = (1/N) Σ_{n,c} δ δᵀ.

    Both factors are Gram matrices over the samples, so a'ᵀA⁺a is an entry of N H' H⁺, likewise for δ, and the
    response is an element-wise product,

        K(x', X) = N · (Δ' Δ⁺) ∘ (1_C 1_Cᵀ ⊗ H' H⁺),    Δ = delta, H = inputs.

    On the training inputs Δ Δ⁺ and H H⁺ are projectors. Hence N·I in a hidden layer with N ≤ m and NC ≤ M;
    diag(N × `leverages`) with N > m; and I_C ⊗ H H⁺ in the last layer, where Δ Δ⁺ = I_C ⊗ 11ᵀ/N: the
    identity, not N·I, if N ≤ m. Cost O(R² M + N² m).

    Args:
        delta: δ of the training inputs.
        inputs: a of the training inputs.
        test_delta: δ of test inputs, T = C·K rows; given together with `test_inputs`.
        test_inputs: a of test inputs.

    Returns:
        `[R, R]`, or `[T, R]` for test inputs.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or only one of the two test arrays.
    """
    delta, inputs, test_delta, test_inputs = _factors(delta, inputs, test_delta, test_inputs)
    return _product(test_delta @ _pseudo_inverse(delta), test_inputs @ _pseudo_inverse(inputs))


def kfac_kernel_response(
    backward: Float[np.ndarray, "R R"],
    forward: Float[np.ndarray, "N N"],
    test_backward: Float[np.ndarray, "T R"] | None = None,
    test_forward: Float[np.ndarray, "K N"] | None = None,
) -> Float[np.ndarray, "... R"]:
    r"""The same response from kernels: N · (B' B⁺) ∘ (1_C 1_Cᵀ ⊗ Q' Q⁺), B = Δ Δᵀ, Q = H Hᵀ, up to factors.

    With `infinite_width_kernels` (and `per_output` for the backward part if C > 1) it is the limit of wide
    layers. The average over layers of K/N for the hidden ones and K for the last one is the published test
    response of K-FAC, which weighs all layers alike; literal K-FAC has Σ_l K_l / (N(L−1) + 1). Cost O(R³ +
    N³).

    Args:
        backward: inner products of δ over the training inputs, all ones within an output in the last layer.
        forward: inner products of the layer's inputs.
        test_backward: those of test rows with training rows; given together with `test_forward`.
        test_forward: those of test inputs with training inputs.

    Returns:
        `[R, R]`, or `[T, R]` for test inputs.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or only one of the two test arrays.
    """
    backward, forward = symmetric("backward", backward), symmetric("forward", forward)
    names = ("backward", "forward", "test_backward", "test_forward")
    backward, forward, test_backward, test_forward = _factors(backward, forward, test_backward, test_forward, names)
    return _product(test_backward @ scipy.linalg.pinvh(backward), test_forward @ scipy.linalg.pinvh(forward))


def unit_wise_layer_response(
    delta: Float[np.ndarray, "R M"],
    inputs: Float[np.ndarray, "N m"],
    test_delta: Float[np.ndarray, "T M"] | None = None,
    test_inputs: Float[np.ndarray, "K m"] | None = None,
) -> Float[np.ndarray, "... R"]:
    r"""Response of one layer under the unit-wise Fisher, the sum of J_i(x') J_i⁺ over its units i.

    Unit i has the rows δ_{c,i}(n) a(n); with d_n = ‖δ_{·,i}(n)‖ over the outputs, its Fisher is HᵀD²H/N, and

        K_i(x', X) [(c', x'), (c, n)] = δ'_{c',i}(x') · [H'(D H)⁺](x', n) · δ_{c,i}(n)/d_n.

    If the inputs of the samples that are active at the unit (d_n ≠ 0) are linearly independent, this is on
    the training inputs the projector Σ_n v vᵀ with v = δ_{·,i}(n)/d_n, of rank one per active sample: for C =
    1 the layer's response is the diagonal matrix of the numbers of active units. Otherwise, as in a first
    layer with fewer inputs than active samples, the rank of a unit is only m and the response has an
    off-diagonal part. The last layer's is I_C ⊗ H H⁺. Cost O(M N³ + C² T N M).

    Args:
        delta: δ of the training inputs.
        inputs: a of the training inputs.
        test_delta: δ of test inputs, T = C·K rows; given together with `test_inputs`.
        test_inputs: a of test inputs.

    Returns:
        `[R, R]`, or `[T, R]` for test inputs.

    Raises:
        ValueError: for wrong shapes, entries that are not finite, or only one of the two test arrays.
    """
    delta, inputs, test_delta, test_inputs = _factors(delta, inputs, test_delta, test_inputs)
    samples, outputs = len(inputs), len(delta) // len(inputs)
    backward = delta.reshape(outputs, samples, -1)
    test_backward = test_delta.reshape(outputs, len(test_inputs), -1)
    scale = np.linalg.norm(backward, axis=0).T
    direction = np.divide(backward, scale.T, out=np.zeros_like(backward), where=scale.T > 0)
    left, values, axes = _thin_svd(inputs)
    coordinates, test_coordinates = left * values, test_inputs @ axes
    response = np.zeros((outputs, len(test_inputs), outputs, samples))
    for units in np.array_split(np.arange(len(scale)), -(-len(scale) * samples**2 // _CHUNK)):
        weights = test_coordinates @ _weighted_inverses(coordinates, scale[units])
        response += np.einsum(
            "cki,ikn,dni->ckdn", test_backward[..., units], weights, direction[..., units], optimize=True
        )
    return response.reshape(len(test_delta), len(delta))


def leverages(inputs: Float[np.ndarray, "N m"]) -> Float[np.ndarray, "N"]:
    """The leverage a_nᵀ(HᵀH)⁺a_n of every sample: the diagonal of the projector on the inputs' column space.

    Leverages lie in [0, 1] and sum to the rank of the inputs. Under K-FAC a layer with N > m inputs (and NC ≤
    M) answers with diag(N × leverages); `forster_transform` makes them all m/N. Cost O(N m min(N, m)).

    Raises:
        ValueError: if `inputs` is not a finite matrix.
    """
    left, _, _ = _thin_svd(array("inputs", inputs, 2))
    return np.asarray((left**2).sum(axis=1))


def _thin_svd(
    inputs: Float[np.ndarray, "N m"],
) -> tuple[Float[np.ndarray, "N r"], Float[np.ndarray, "r"], Float[np.ndarray, "m r"]]:
    """Singular value decomposition cut at the numerical rank r."""
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    rank = int((values > max(inputs.shape) * np.finfo(np.float64).eps * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank].T


def _pseudo_inverse(matrix: Float[np.ndarray, "N m"]) -> Float[np.ndarray, "m N"]:
    left, values, right = _thin_svd(matrix)
    return np.asarray(right / values @ left.T)


def _weighted_inverses(
    coordinates: Float[np.ndarray, "N r"], scale: Float[np.ndarray, "u N"]
) -> Float[np.ndarray, "u r N"]:
    """(D X)⁺ for every unit, D the diagonal matrix of its scales and X the coordinates of the inputs."""
    samples, rank = coordinates.shape
    if rank < samples:
        return np.asarray(np.linalg.pinv(scale[:, :, None] * coordinates, samples * np.finfo(np.float64).eps))
    # The active rows X_a are independent, so (D X)⁺ = X_aᵀ (X_a X_aᵀ)⁻¹ D_a⁻¹, with zero columns elsewhere.
    active = (scale > 0).astype(np.float64)
    both = active[:, :, None] * active[:, None, :]
    gram = both * (coordinates @ coordinates.T) + np.eye(samples) * (1 - active)[:, :, None]
    weights = np.divide(active, scale, out=np.zeros_like(scale), where=scale > 0)
    masked = active[:, :, None] * np.linalg.inv(gram) * weights[:, None, :]
    return np.asarray(coordinates.T @ masked)


def _product(backward: Float[np.ndarray, "T R"], forward: Float[np.ndarray, "K N"]) -> Float[np.ndarray, "T R"]:
    outputs = len(backward) // len(forward)
    return np.asarray(forward.shape[1] * backward * np.tile(forward, (outputs, outputs)))


def _factors(
    delta: ArrayLike,
    inputs: ArrayLike,
    test_delta: ArrayLike | None,
    test_inputs: ArrayLike | None,
    names: tuple[str, str, str, str] = ("delta", "inputs", "test_delta", "test_inputs"),
) -> tuple[Float[np.ndarray, "R M"], Float[np.ndarray, "N m"], Float[np.ndarray, "T M"], Float[np.ndarray, "K m"]]:
    """The validated backward and forward factors of a layer, the training ones standing in for the test ones."""
    delta, inputs = array(names[0], delta, 2), array(names[1], inputs, 2)
    if len(delta) % len(inputs):
        raise ValueError(
            f"{names[0]}: has {len(delta)} rows, which is not a multiple of the {len(inputs)} samples of {names[1]}; "
            "it needs one row per (output, sample), outputs outermost."
        )
    if (test_delta is None) != (test_inputs is None):
        raise ValueError(f"{names[2]}, {names[3]}: give both for a test response, or neither.")
    if test_delta is None or test_inputs is None:
        return delta, inputs, delta, inputs
    test_delta, test_inputs = array(names[2], test_delta, 2), array(names[3], test_inputs, 2)
    length(names[2], test_delta, delta.shape[1], f"like {names[0]}", axis=1)
    length(names[3], test_inputs, inputs.shape[1], f"like {names[1]}", axis=1)
    outputs = len(delta) // len(inputs)
    length(names[2], test_delta, outputs * len(test_inputs), f"one per (output, sample) of {names[3]}")
    return delta, inputs, test_delta, test_inputs
