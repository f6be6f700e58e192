"""Linear graph networks on propagated features: their start, and their paths by gradient flow and by gradient descent.

Heads, layers and features are those of `curvlab.theory.graph_dynamics`; the loss is ‖f − Y‖_F².
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.integrate import solve_ivp

from curvlab.theory import graph_dynamics as theory

RTOL = 1e-11
"""Relative tolerance of a step of the flow."""

Heads = dict[int, Float[np.ndarray, "C _"]]
Layers = list[Float[np.ndarray, "_ _"]]
Weights = Float[np.ndarray, " P"]


def _orthogonal(rng: np.random.Generator, width: int) -> Float[np.ndarray, "_ _"]:
    Q, R = np.linalg.qr(rng.normal(size=(width, width)))
    return np.asarray(Q * np.sign(np.diag(R)))


INITS: Mapping[str, Callable[[np.random.Generator, int], Float[np.ndarray, "_ _"]]] = {
    "orthogonal": _orthogonal,
    "glorot": lambda rng, width: rng.uniform(-1, 1, size=(width, width)) * np.sqrt(3 / width),
    "uniform": lambda rng, width: rng.uniform(-1, 1, size=(width, width)) / np.sqrt(width),
}
"""Square layers: orthogonal, Glorot's uniform, and torch's default for a linear layer, uniform in ±1/√width."""


def _squares(parts: Iterable[Float[np.ndarray, "_ _"]]) -> float:
    return float(sum(np.square(part).sum() for part in parts))


def initial(
    features: Sequence[Float[np.ndarray, "F n"]],
    targets: Float[np.ndarray, "C n"],
    scales: Sequence[int],
    rng: np.random.Generator,
    init: str = "orthogonal",
    head_norm: float = 0.0,
) -> Model:
    """Return a model as deep as its largest scale, with layers as wide as the features and heads of a spectral norm."""
    width = len(features[0])
    layers = [INITS[init](rng, width) for _ in range(max(scales))]
    drawn = {scale: rng.normal(size=(len(targets), width)) for scale in scales}
    heads = {scale: head_norm / np.linalg.norm(head, 2) * head for scale, head in drawn.items()}
    return Model(features, targets, heads, layers)


@dataclass(frozen=True, eq=False)
class Model:
    """A linear graph network at its present weights.

    Attributes:
        features: G_0, …, G_H.
        targets: Y.
        heads: scale to W_l.
        layers: B_1, …, B_H.
    """

    features: Sequence[Float[np.ndarray, "F n"]]
    targets: Float[np.ndarray, "C n"]
    heads: Heads
    layers: Layers

    @cached_property
    def products(self) -> list[Float[np.ndarray, "_ F"]]:
        """B^(1:0), …, B^(1:H)."""
        return theory.layer_products(self.layers, len(self.features[0]))

    def outputs(self, scales: Iterable[int]) -> Float[np.ndarray, "C n"]:
        """What some of the scales add to f."""
        found = np.zeros_like(self.targets)
        for scale in scales:
            found = found + self.heads[scale] @ self.products[scale] @ self.features[scale]
        return found

    @cached_property
    def residual(self) -> Float[np.ndarray, "C n"]:
        """The difference f − Y."""
        return np.asarray(self.outputs(self.heads) - self.targets)

    @property
    def loss(self) -> float:
        """L = ‖f − Y‖²."""
        return float(np.square(self.residual).sum())

    def gradient(self, only: Collection[int] | None = None) -> tuple[Heads, Layers]:
        """∂L/∂W_l and ∂L/∂B_i; with `only`, what these scales contribute at the outputs of all."""
        products = self.products
        scales = self.heads if only is None else only
        signals = {scale: 2 * self.residual @ self.features[scale].T for scale in scales}
        heads = {scale: signal @ products[scale].T for scale, signal in signals.items()}
        layers: Layers = []
        # Σ_{l ≥ i} (W_l B_l ⋯ B_{i+1})ᵀ V G_lᵀ, from the last layer down.
        above = np.zeros_like(products[-1])
        for i in range(len(self.layers), 0, -1):
            if i in signals:
                above = above + self.heads[i].T @ signals[i]
            layers.insert(0, above @ products[i - 1].T)
            above = self.layers[i - 1].T @ above
        return heads, layers

    def gain(self, reference: Collection[int]) -> tuple[float, float, float]:
        """Speed of a model with only some of the scales at the same outputs, and what the others add: heads and layers."""
        (heads, layers), (old_heads, old_layers) = self.gradient(), self.gradient(reference)
        added = _squares(part for scale, part in heads.items() if scale not in reference)
        before = _squares(old_layers)
        return _squares(old_heads.values()) + before, added, _squares(layers) - before

    @cached_property
    def weights(self) -> Weights:
        """All layers, then all heads, as one vector."""
        return np.concatenate([part.ravel() for part in (*self.layers, *self.heads.values())])

    def at(self, weights: Weights) -> Model:
        """Return the model with other weights."""
        parts, start = [], 0
        for part in (*self.layers, *self.heads.values()):
            parts.append(weights[start : start + part.size].reshape(part.shape))
            start += part.size
        depth = len(self.layers)
        return Model(self.features, self.targets, dict(zip(self.heads, parts[depth:], strict=True)), parts[:depth])

    def slope(self, weights: Weights) -> Weights:
        """−∇L at some weights."""
        heads, layers = self.at(weights).gradient()
        return -np.concatenate([part.ravel() for part in (*layers, *heads.values())])

    def floors(self) -> Float[np.ndarray, " _"]:
        """λ_min(B^(1:l)ᵀ B^(1:l)), l = 0, …, H."""
        return np.array([float(np.linalg.svd(product, compute_uv=False)[-1]) ** 2 for product in self.products])

    def sharpness(self) -> float:
        """Largest eigenvalue of the tangent kernel of the training outputs, from its Kronecker terms (`[C n, C n]`)."""
        products = self.products
        C, n = self.targets.shape
        kernel = np.zeros((C, n, C, n))
        for scale in self.heads:
            reached = products[scale] @ self.features[scale]
            kernel += np.einsum("cd,nm->cndm", np.eye(C), reached.T @ reached)
        for i in range(1, len(self.layers) + 1):
            columns = np.zeros((C, n, *self.layers[i - 1].shape))
            for scale, head in self.heads.items():
                if scale < i:
                    continue
                for layer in reversed(self.layers[i:scale]):
                    head = head @ layer
                columns += np.einsum("ca,bn->cnab", head, products[i - 1] @ self.features[scale])
            flat = columns.reshape(C * n, -1)
            kernel += (flat @ flat.T).reshape(C, n, C, n)
        return float(np.linalg.eigvalsh(kernel.reshape(C * n, C * n))[-1])


@dataclass(frozen=True, eq=False)
class Path:
    """Models along a run.

    Attributes:
        times: T, from 0.
        models: at the times.
        energy: |∫ ‖∇L‖² dt − (L(0) − L(T))|/L(0) at the end, the error of the integration; 0 where nothing was integrated.
    """

    times: Float[np.ndarray, " T"]
    models: list[Model]
    energy: float = 0.0

    @cached_property
    def losses(self) -> Float[np.ndarray, " T"]:
        """L at the times."""
        return np.array([model.loss for model in self.models])

    @cached_property
    def floors(self) -> Float[np.ndarray, "T _"]:
        """λ_min(B^(1:l)ᵀ B^(1:l)) by time and scale."""
        return np.stack([model.floors() for model in self.models])

    def bounded(
        self, floors: Float[np.ndarray, " T"], features: Float[np.ndarray, "_ n"]
    ) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
        """L − L⋆ at the times and the bound on it, for the λ and the features of a scale or of all."""
        excess = self.losses - theory.optimal_loss(features, self.models[0].targets)
        return excess, theory.loss_bound(excess[0], floors, theory.least_singular_value(features), self.times)


def flow(model: Model, times: Float[np.ndarray, " T"]) -> Path:
    """Follow gradient flow, an explicit Runge-Kutta method of order 8, with ∫‖∇L‖² beside it as a check.

    Raises:
        ArithmeticError: the solver gave up.
    """

    def slope(_: float, state: Weights) -> Weights:
        move = model.slope(state[:-1])
        return np.append(move, move @ move)

    start = np.append(model.weights, 0.0)
    solved = solve_ivp(slope, (0, times[-1]), start, "DOP853", times, rtol=RTOL, atol=RTOL * 1e-2)
    if not solved.success:
        raise ArithmeticError(f"gradient flow: {solved.message}")
    models = [model.at(state[:-1]) for state in solved.y.T]
    energy = abs(model.loss - models[-1].loss - float(solved.y[-1, -1])) / model.loss
    return Path(times, models, energy)


def descend(model: Model, times: Float[np.ndarray, " T"], steps: int) -> Path:
    """Follow gradient descent with so many steps from each of the equidistant times to the next."""
    eta = float(times[1] - times[0]) / steps
    weights, models = model.weights, [model]
    for _ in times[1:]:
        for _ in range(steps):
            weights = weights + eta * model.slope(weights)
        models.append(model.at(weights))
    return Path(times, models)
