"""One network on one problem: its rows, kernels and the theory's predictions for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import curvlab
from analyses.initialisation import Initialisation
from curvlab import fisher, theory
from curvlab.fisher import BlockDiagonal, BlockTridiagonal, Full, LayerWise, Structure
from curvlab.nn import ACTIVATIONS, HalfSquaredError, ntk_mlp
from curvlab.problems import Problem
from curvlab.rows import Rows
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.rows import gram
from curvlab.study import generator, round_off

SMOOTH = frozenset(ACTIVATIONS) - {"relu"}
"""Activations whose derivative is almost nowhere zero, γ = 1; γ = ½ for ReLU."""

PUBLISHED = ("full", "block-diagonal", "block-tridiagonal", "kfac", "unit-wise")
"""Structures whose α is published."""

SHORT_OF_RANK = "a K-FAC factor of a layer is short of rank on the samples"
"""Why a network is outside the assumptions of what the theory says of K-FAC."""


@dataclass(frozen=True, eq=False)
class Setting(Initialisation):
    """A problem with the rows and kernels of its network at initialisation, and the theory's predictions from them."""

    _predicted: dict[str, Float[np.ndarray, "T R"] | None] = field(default_factory=dict)

    @property
    def activation(self) -> str:
        """Activation of the hidden layers."""
        return str(self.arguments.get("activation") or "relu")

    @cached_property
    def rows(self) -> Rows:
        """Exact rows of S on the training inputs."""
        return curvlab.sqrt_fisher(self.problem.model, self.problem.loss, *self.problem.train)

    @property
    def jacobian(self) -> Rows:
        """Rows of J on the training inputs."""
        return self.rows.jacobian()

    @cached_property
    def test_jacobian(self) -> Rows:
        """Rows of J on the test inputs."""
        return curvlab.jacobian(self.problem.model, self.problem.test[0])

    @property
    def samples(self) -> int:
        """N, nodes of a graph included, although they are one sample of its rows."""
        return len(self.inputs)

    @property
    def depth(self) -> int:
        """Number of layers with parameters."""
        return len(self.jacobian.layers)

    @cached_property
    def kernels(self) -> Float[np.ndarray, "L R R"]:
        """Θ_l = J_l J_lᵀ/N of every layer."""
        layers = self.jacobian.layers
        return np.stack([gram([layer], [layer]).numpy(force=True) for layer in layers]) / self.samples

    @cached_property
    def test_kernels(self) -> Float[np.ndarray, "L T R"]:
        """J_l(x') J_lᵀ/N of every layer."""
        pairs = zip(self.test_jacobian.layers, self.jacobian.layers, strict=True)
        return np.stack([gram([a], [b]).numpy(force=True) for a, b in pairs]) / self.samples

    @cached_property
    def plain(self) -> bool:
        """Whether all layers are dense on vectors and the last one gives the outputs, as the theory of K-FAC and units assumes."""
        *_, last = layers = self.jacobian.layers
        if not all(isinstance(layer, KroneckerRows) and layer.positions == 1 for layer in layers):
            return False
        rows = last.factors[-1][:, :, 0, 0]
        return rows.shape[0] == rows.shape[2] and torch.equal(
            rows, torch.eye(len(rows)).to(rows)[:, None].expand_as(rows)
        )

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """(M_0, …, M_L), with the rank of the inputs for M_0."""
        layers = [layer for layer in self.jacobian.layers if isinstance(layer, KroneckerRows)]
        rank = int(torch.linalg.matrix_rank(layers[0].a[:, 0, 0]))
        return (rank, *(layer.g.shape[-1] for layer in layers))

    def full_rank(self, index: int) -> bool:
        """Whether both K-FAC factors of a layer tell all samples (and outputs) apart; units that never fire do not help."""
        delta, inputs = factors(self.jacobian.layers[index])
        return (index == self.depth - 1 or independent(delta)) and independent(inputs)

    def tolerance(self, condition: float) -> float:
        """Relative error that round-off explains, given the condition number of what was solved."""
        return round_off(self.jacobian.R, condition, self.jacobian.dtype)

    @property
    def active(self) -> float:
        """γ."""
        return 1.0 if self.activation in SMOOTH else 0.5

    def sigma(self, structure: str) -> Float[np.ndarray, "L L"] | None:
        """Σ of a structure of the layer-wise family; None outside it."""
        return SIGMAS[structure](self.depth) if structure in SIGMAS else None

    def alpha(self, structure: str) -> float | None:
        """The derived α, None where no theory gives one."""
        sigma = self.sigma(structure)
        if sigma is not None:
            return float(np.sum(theory.layer_coefficients(sigma)))
        if structure in ("kfac", "unit-wise") and self.plain:
            return theory.alpha(structure, self.widths, self.samples, active=self.active)
        return None

    def published_alpha(self, structure: str) -> float | None:
        """α as published, None where the paper has none."""
        excluded = structure == "block-tridiagonal" and not theory.tridiagonal_covered(self.depth)
        if structure not in PUBLISHED or excluded or not self.plain:
            return None
        return theory.published_alpha(structure, self.depth, self.widths[1], self.samples, active=self.active)

    def predicted_test_response(self, structure: str) -> Float[np.ndarray, "T R"] | None:
        """K(x', X) of claim 8, from kernels or from back-propagated rows; None where there is no formula."""
        if structure not in self._predicted:
            self._predicted[structure] = self._predict_test_response(structure)
        return self._predicted[structure]

    def _predict_test_response(self, structure: str) -> Float[np.ndarray, "T R"] | None:
        sigma = self.sigma(structure)
        if structure == "full":
            return theory.exact_response(self.kernels.sum(0), test_kernel=self.test_kernels.sum(0))
        if sigma is not None:
            return theory.layer_wise_response(sigma, self.kernels, test_kernels=self.test_kernels)
        if structure not in ("kfac", "unit-wise") or not self.plain:
            return None
        formula = theory.kfac_layer_response if structure == "kfac" else theory.unit_wise_layer_response
        total = np.zeros((self.test_jacobian.R, self.jacobian.R))
        for train, test in zip(self.jacobian.layers, self.test_jacobian.layers, strict=True):
            total += formula(*(factor.numpy(force=True) for layer in (train, test) for factor in factors(layer)))
        return total


def factors(layer: LayerRows) -> tuple[Float[Tensor, "R M"], Float[Tensor, "N m"]]:
    """δ and the inputs of a dense layer."""
    assert isinstance(layer, KroneckerRows)
    return layer.g[:, :, 0, 0].flatten(0, 1), layer.a[:, 0, 0]


def independent(rows: Float[Tensor, "K M"]) -> bool:
    """Whether rows are linearly independent."""
    return int(torch.linalg.matrix_rank(rows)) == len(rows)


def random_sigma(depth: int) -> Float[np.ndarray, "L L"]:
    """Return a random positive definite Σ, the same in every run: a member of the family that nobody chose."""
    half = np.random.default_rng(depth).standard_normal((depth, depth))
    return np.asarray(half @ half.T / depth + np.eye(depth))


SIGMAS: Mapping[str, Callable[[int], Float[np.ndarray, "L L"]]] = {
    Full.key: lambda depth: np.ones((depth, depth)),
    BlockDiagonal.key: np.eye,
    BlockTridiagonal.key: theory.tridiagonal_sigma,
    LayerWise.key: random_sigma,
}
"""The layer-wise family: Σ of its structures, from the number of layers."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    LayerWise.key: {"sigma": lambda depth: torch.from_numpy(random_sigma(depth))}
}
"""Of structures that are not measured as they are by default."""


def make(structure: str) -> Structure:
    """Return a structure by its key, with its `OPTIONS`."""
    return fisher.make(structure, **OPTIONS.get(structure, {}))


def on_inputs(setting: Setting, inputs: Float[Tensor, "N d"], width: int, seed: int) -> Setting:
    """Return the setting of a perceptron of the same depth and activation on other inputs of the training samples."""
    targets = setting.problem.train[1]
    sizes = (inputs.shape[1], *(width,) * max(setting.depth - 1, 1), targets.shape[1])
    model = ntk_mlp(
        sizes, setting.activation, generator=generator(seed, "perceptron"), dtype=inputs.dtype, device=inputs.device
    )
    data = (inputs, targets)
    return Setting(Problem("perceptron", model, HalfSquaredError(), data, data), setting.arguments)
