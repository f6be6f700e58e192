"""The spectra of one matrix at one network, whole and per layer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache

import numpy as np
import torch

from analyses.descent import Descent, gradient
from analyses.spectrum.config import GGN, HESSIAN, Config
from curvlab import spectrum
from curvlab.fisher import STRUCTURES
from curvlab.problems import Problem, resolve
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import Operator, StructureOperator
from curvlab.study import Cell, Context, Observations, follow, generator, observed

WHOLE = "all"
"""The layer that stands for all parameters."""
TOLERANCE = 1e-4
GRID = 120
"""Points of a density, evenly spaced in asinh(λ/δ)."""
LINEAR = 1e-3
"""δ over the largest modulus: below it the axis of a density is linear, above logarithmic."""
TRACE_PRODUCTS = 64
BATCH = 512
"""Samples that are swept at a time."""
ROUND_OFF = 1e-9
"""Part of the largest modulus up to which a negative eigenvalue counts as none."""


class Restricted(Operator):
    """The diagonal block of an operator that belongs to one layer."""

    def __init__(self, operator: Operator, names: list[str]) -> None:
        shapes = operator.space.shapes
        self.operator, self.space = operator, ParameterSpace({name: shapes[name] for name in names})
        self.dtype, self.device = operator.dtype, operator.device
        inside = {name: torch.full(shape, float(name in names), device=self.device) for name, shape in shapes.items()}
        self._columns = operator.space.flatten(inside) > 0

    def held(self) -> AbstractContextManager[None]:
        """Hold the whole operator."""
        return self.operator.held()

    def matmat(self, block: torch.Tensor) -> torch.Tensor:
        """Multiply a block of vectors, embedded among zeros."""
        whole = block.new_zeros(len(block), self.operator.size)
        whole[:, self._columns] = block
        return self.operator.matmat(whole)[:, self._columns]


@lru_cache(maxsize=1)
def problem_of(config: Config, seed: int) -> Problem:
    """Return the problem of a seed, trained for the number of steps asked for; the last one is kept."""
    problem = resolve(config.problem, **config.arguments, seed=seed).to(config.device, getattr(torch, config.dtype))
    if config.steps:
        _descend(problem, config.steps)
    return problem


def _descend(problem: Problem, steps: int) -> None:
    """Take full-batch gradient steps with η = 1/λ_max(GGN) at the start, half the stable step size."""
    loss, (inputs, targets) = problem.loss, problem.train
    eta = 1 / float(spectrum.eigenpairs(spectrum.GGN(problem.model, loss, problem.train), 1).values[0])
    direction = gradient(lambda model: loss(model(inputs), targets))
    follow(Descent(problem.model, direction, eta, lambda _: {}), steps)


def operator_of(name: str, problem: Problem) -> Operator:
    """Return the Hessian, the GGN or a structure at a problem's parameters."""
    batches = _batches(problem)
    if name == HESSIAN:
        return spectrum.Hessian(problem.model, problem.loss, batches)
    if name == GGN:
        return spectrum.GGN(problem.model, problem.loss, batches)
    return StructureOperator(STRUCTURES[name].fit(problem.model, problem.loss, batches))


def _batches(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the training samples into batches whose rows fit into memory."""
    inputs, targets = problem.train
    return list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))


def _parts(operator: Operator) -> Iterator[tuple[str, Operator]]:
    """Yield the operator, and its diagonal block of every layer if there are several."""
    yield WHOLE, operator
    layers: dict[str, list[str]] = {}
    for name in operator.space.shapes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if len(layers) > 1:
        for layer, names in layers.items():
            yield layer, Restricted(operator, names)


def measure(cell: Cell, context: Context[Config]) -> Observations:
    """Return top eigenvalues, trace and density of a cell's matrix, whole and per layer; densities of the whole only.

    At a seed all matrices see the same probes, so that what they differ in is not the probes' doing.
    """
    config, seed = context.config, int(cell["seed"])
    problem = problem_of(config, seed)
    whole = operator_of(str(cell["matrix"]), problem)
    rows = []
    for layer, operator in _parts(whole):
        found = spectrum.eigenpairs(operator, min(config.top, operator.size), tolerance=TOLERANCE)
        for index, value in enumerate(found.values.tolist()):
            rows.append(observed("eigenvalue", value, index=index + 1, layer=layer))
        estimate = spectrum.trace(operator, products=TRACE_PRODUCTS, generator=generator(seed, "trace", layer))
        rows.append(observed("trace", estimate.value, error=estimate.standard_error, layer=layer))
    density = spectrum.density(whole, probes=config.probes, steps=config.lanczos, generator=generator(seed, "density"))
    rows += _density_rows(density)
    rows.append(observed("negative_share", float(density.weights[density.nodes < -_scale(density)].sum())))
    return rows


def _scale(density: spectrum.Density) -> float:
    return LINEAR * float(density.nodes.abs().max())


def _density_rows(density: spectrum.Density) -> list[dict[str, object]]:
    """Return the share of eigenvalues a unit of asinh(λ/δ), on an even grid of it, with Gaussian kernels there.

    Of a matrix without negative eigenvalues, but for round-off, nothing is put below 0: what a kernel has there is folded back.
    """
    scale = _scale(density)
    places, weights = np.arcsinh(density.nodes.numpy() / scale), density.weights.numpy()
    positive = float(density.nodes.min()) > -ROUND_OFF * float(density.nodes.abs().max())
    low = 0.0 if positive else float(places.min()) - 0.5
    high = float(places.max()) + 0.5
    grid = np.linspace(low, high, GRID)
    sigma = (high - low) / 60
    if positive:
        places, weights = np.append(places, -places), np.tile(weights, 2)
    kernel = np.exp(-0.5 * ((grid[:, None] - places) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    shares = kernel @ weights
    return [
        observed("density", float(share), eigenvalue=float(scale * np.sinh(x)), place=index)
        for index, (x, share) in enumerate(zip(grid, shares, strict=True))
    ]
