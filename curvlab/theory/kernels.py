r"""Infinite-width kernels of a multilayer perceptron in NTK parameterisation, layer by layer.

The network is h_0 = x, u_l = (s_w/√M_{l−1}) w_l h_{l−1} + s_b b_l, h_l = φ(u_l), f = u_L, all w and b ~ N(0,
1). As the hidden widths grow, with q_l(x) = Q_l(x, x),

    forward    Q_1 = s_w² x·x'/M_0 + s_b²,    Q_{l+1} = s_w² E[φ(u)φ(u')] + s_b²,    (u, u') ~ N(0, Q_l)
    backward   B_L = 1,                       B_l = s_w² B_{l+1} ∘ E[φ'(u)φ'(u')]
    layers     Θ_l = B_l ∘ Q_l,               Θ = Σ_l Θ_l

Q_l is the covariance of the pre-activations u_l, and of the outputs for l = L; B_l is the limit of δ_l·δ_l'.
The recursion of Karakida & Osawa (2020) is the case s_b = 0, ‖x‖ = 1; the expectations are those of Cho &
Saul (2009) for ReLU and Williams (1997) for erf. **Nothing here is divided by the number of samples N**,
whereas the kernels of `curvlab.theory.responses` and `dynamics` are. Kernels are those of one output; C
outputs have I_C ⊗ Θ (`per_output`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
from jaxtyping import Float

from curvlab.theory._checks import array, at_least_one, length, non_negative, positive
from curvlab.tools.text import suggestion

Moments = tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K"]]
"""E[φ(u)φ(u')] and E[φ'(u)φ'(u')] of a Gaussian pair."""

SNAP = 16 * float(np.finfo(np.float64).eps)
"""Distance of a correlation from ±1 that counts as round-off: arcsin would turn it into an error of its square root."""


def _relu(
    covariance: Float[np.ndarray, "N K"],
    variance: Float[np.ndarray, "N"],
    other: Float[np.ndarray, "K"],
) -> Moments:
    scale = np.sqrt(np.outer(variance, other))
    correlation = covariance / scale
    correlation = np.where(1 - np.abs(correlation) <= SNAP, np.sign(correlation), correlation)
    angle = np.arcsin(correlation) + pi / 2
    value = scale / (2 * pi) * (np.sqrt(1 - correlation**2) + correlation * angle)
    return value, angle / (2 * pi)


def _erf(
    covariance: Float[np.ndarray, "N K"],
    variance: Float[np.ndarray, "N"],
    other: Float[np.ndarray, "K"],
) -> Moments:
    product = np.outer(1 + 2 * variance, 1 + 2 * other)
    value = 2 / pi * np.arcsin(2 * covariance / np.sqrt(product))
    return value, 4 / pi / np.sqrt(product - 4 * covariance**2)


_MOMENTS: dict[str, Callable[..., Moments]] = {"relu": _relu, "erf": _erf}
_SECOND_MOMENTS: dict[str, Callable[[Float[np.ndarray, "N"]], Float[np.ndarray, "N"]]] = {
    "relu": lambda variance: variance / 2,
    "erf": lambda variance: np.asarray(2 / pi * np.arcsin(2 * variance / (1 + 2 * variance))),
}


@dataclass(frozen=True)
class InfiniteWidthKernels:
    """Limit kernels between inputs [N] and other inputs [K], one output, not divided by the number of samples."""

    forward: Float[np.ndarray, "L N K"]
    """Q_l, the covariance of the pre-activations of layer l; the last is the covariance of the outputs (NNGP)."""
    backward: Float[np.ndarray, "L N K"]
    """B_l, the inner products of the back-propagated rows δ_l; ones in the last layer."""

    @property
    def layers(self) -> Float[np.ndarray, "L N K"]:
        """Θ_l = B_l ∘ Q_l, the part of the tangent kernel that layer l's weights and biases contribute."""
        return np.asarray(self.backward * self.forward)

    @property
    def ntk(self) -> Float[np.ndarray, "N K"]:
        """Θ = Σ_l Θ_l."""
        return np.asarray(self.layers.sum(axis=0))


def infinite_width_kernels(
    inputs: Float[np.ndarray, "N D"],
    other: Float[np.ndarray, "K D"] | None = None,
    *,
    depth: int,
    activation: str = "relu",
    weight_std: float = sqrt(2),
    bias_std: float = 0.0,
) -> InfiniteWidthKernels:
    """The layers' limit kernels of an MLP with `depth` weight layers; recursion in the module's docstring.

    Args:
        inputs: x, of any norm.
        other: the inputs of the second axis (training inputs for a test kernel); `inputs` if left out.
        depth: L, the number of weight layers.
        activation: "relu" or "erf" (φ(u) = erf(u), without a scale).
        weight_std: s_w.
        bias_std: s_b; 0 means no bias.

    Returns:
        The kernels, not divided by the number of samples. Cost O(N K (D + L)).

    Raises:
        ValueError: for wrong shapes, entries that are not finite, an unknown activation, impossible
            constants, or, with ReLU and no bias, an input of norm zero, whose gradient is undefined.
    """
    first = array("inputs", inputs, 2)
    second = first if other is None else array("other", other, 2)
    length("other", second, first.shape[1], "the dimension of inputs", axis=1)
    at_least_one("depth", depth)
    positive("weight_std", weight_std)
    non_negative("bias_std", bias_std)
    if activation not in _MOMENTS:
        raise ValueError(f"activation: no closed form for {activation!r}. {suggestion(activation, _MOMENTS)}")
    for name, points in (("inputs", first), ("other", second)):
        zero = np.flatnonzero(~points.any(axis=1))
        if activation == "relu" and bias_std == 0 and depth > 1 and len(zero):
            raise ValueError(
                f"{name}: row {zero[0]} is zero, where a ReLU network without bias has no gradient; drop it, or set "
                "bias_std above 0."
            )
    second_moment = _SECOND_MOMENTS[activation]

    def affine(moment: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return np.asarray(weight_std**2 * moment + bias_std**2)

    dimension = first.shape[1]
    forward = [affine(first @ second.T / dimension)]
    variance, variance_other = (affine((points**2).sum(axis=1) / dimension) for points in (first, second))
    slopes = []
    for _ in range(depth - 1):
        value, slope = _MOMENTS[activation](forward[-1], variance, variance_other)
        forward.append(affine(value))
        slopes.append(slope)
        variance, variance_other = affine(second_moment(variance)), affine(second_moment(variance_other))
    backward = [np.ones_like(forward[0])]
    for slope in reversed(slopes):
        backward.append(weight_std**2 * backward[-1] * slope)
    return InfiniteWidthKernels(np.stack(forward), np.stack(backward[::-1]))


def per_output(kernel: Float[np.ndarray, "N K"], outputs: int) -> Float[np.ndarray, "CN CK"]:
    """The kernel of C independent outputs, I_C ⊗ Θ, in the row order (output, sample), outputs outermost.

    Raises:
        ValueError: if `kernel` is not a finite matrix or `outputs` is below 1.
    """
    at_least_one("outputs", outputs)
    return np.asarray(np.kron(np.eye(outputs), array("kernel", kernel, 2)))
