"""One network on one problem as it was initialised, from which analyses derive what they know of it besides."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.descent import Direction, flat, outputs
from analyses.specs import squared
from curvlab.fisher import Structure, natural_gradient_step
from curvlab.problems import ARGUMENTS, Problem, resolve
from curvlab.study import Cell, CommonOptions


@dataclass(frozen=True, eq=False)
class Initialisation:
    """A problem and what follows from its network at initialisation; computed once, shared by cells.

    Attributes:
        problem: With the network.
        arguments: Those that the problem was made with.
    """

    problem: Problem
    arguments: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, config: CommonOptions, **others: object) -> Self:
        """Return that of a cell, or of other arguments than it names; the last is kept, so that neighbouring cells share it."""
        spec = str(cell.coordinates.get("problem", config.problem))
        named = {**cell.coordinates, **others}
        arguments = squared(spec) | {name: named[name] for name in ARGUMENTS if name in named}
        if arguments.get("width") == 0:
            del arguments["width"]
        return cls._kept(spec, config.device, config.dtype, tuple(sorted(arguments.items())))

    @classmethod
    @lru_cache(maxsize=1)
    def _kept(cls, spec: str, device: str, dtype: str, arguments: tuple[tuple[str, Any], ...]) -> Self:
        problem = resolve(spec, **dict(arguments)).to(device, getattr(torch, dtype))
        return cls(problem, dict(arguments))

    @property
    def inputs(self) -> Tensor:
        """Training inputs."""
        return self.problem.train[0]

    @cached_property
    def targets(self) -> Float[Tensor, " R"]:
        """Training targets in row order."""
        return flat(self.problem.train[1])

    @cached_property
    def initial(self) -> Float[Tensor, " R"]:
        """Outputs on the training inputs."""
        return outputs(self.problem.model, self.inputs)

    @property
    def residual(self) -> Float[Tensor, " R"]:
        """Outputs less targets."""
        return self.initial - self.targets

    def network(self) -> nn.Module:
        """A copy of the network, to be trained."""
        return copy.deepcopy(self.problem.model)

    def loss(self, model: nn.Module) -> Tensor:
        """The training loss of a network."""
        inputs, targets = self.problem.train
        loss: Tensor = self.problem.loss(model(inputs), targets)
        return loss

    def natural(self, structure: Structure, loss: nn.Module | None = None, **options: Any) -> Direction:
        """Natural gradient of a loss, the problem's own if None, with options of `natural_gradient_step`."""
        return lambda model: natural_gradient_step(
            structure, model, loss or self.problem.loss, *self.problem.train, **options
        )
