"""A small network in NTK parameterisation with its back-propagated rows, and Fisher matrices built entry by entry."""

from dataclasses import dataclass

import numpy as np
from scipy.special import erf

ACTIVATIONS = {
    "relu": (lambda u: np.maximum(u, 0), lambda u: (u > 0).astype(float)),
    "erf": (erf, lambda u: 2 / np.sqrt(np.pi) * np.exp(-(u**2))),
}


@dataclass
class Network:
    widths: tuple[int, ...]
    activation: str
    rng: np.random.Generator
    weight_std: float = np.sqrt(2)
    bias_std: float = 0.0

    def __post_init__(self):
        pairs = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        self.weights = [self.rng.normal(size=(out, fan_in)) for fan_in, out in pairs]
        self.biases = [self.rng.normal(size=out) for _, out in pairs]

    def rows(self, x):
        """Outputs [N, C], and for each layer δ [C·N, M] and the inputs in NTK coordinates [N, m (+1)]."""
        phi, slope = ACTIVATIONS[self.activation]
        h, inputs, slopes = x, [], []
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            scaled = self.weight_std / np.sqrt(w.shape[1]) * h
            u = scaled @ w.T + self.bias_std * b
            bias = [np.full((len(x), 1), self.bias_std)] if self.bias_std else []
            inputs.append(np.concatenate([scaled, *bias], axis=1))
            if layer < len(self.weights) - 1:
                h, slopes = phi(u), [*slopes, slope(u)]
        outputs = self.widths[-1]
        delta = np.kron(np.eye(outputs), np.ones((len(x), 1)))
        deltas = [delta]
        for w, s in zip(self.weights[:0:-1], slopes[::-1], strict=True):
            delta = self.weight_std / np.sqrt(w.shape[1]) * delta @ w * np.tile(s, (outputs, 1))
            deltas.insert(0, delta)
        return u, deltas, inputs


def jacobian(delta, inputs):
    """Rows δ_c(n) ⊗ a(n) of one layer [C·N, M·m], outputs outermost, and within it units outermost."""
    repeated = np.tile(inputs, (len(delta) // len(inputs), 1))
    return np.einsum("ri,rj->rij", delta, repeated).reshape(len(delta), -1)


def unit_sphere(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def dense_response(jacobian, fisher, samples, damping=0.0, test=None):
    """(1/N) J' (F + ρI)⁻¹ Jᵀ from the matrices themselves; the pseudo-inverse at zero damping."""
    test = jacobian if test is None else test
    if damping:
        return test @ np.linalg.solve(fisher + damping * np.eye(len(fisher)), jacobian.T) / samples
    return test @ np.linalg.pinv(fisher, rcond=1e-11, hermitian=True) @ jacobian.T / samples
