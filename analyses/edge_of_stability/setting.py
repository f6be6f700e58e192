"""One network and its data, as a run sees them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from analyses.edge_of_stability.config import Config
from curvlab.problems import Problem, resolve
from curvlab.problems.chebyshev import chebyshev_problem
from curvlab.problems.full_batch import full_batch_problem
from curvlab.problems.images import IMAGE_SETS
from curvlab.spectrum import Hessian
from curvlab.study import Cell

CHUNK = 1000
"""Samples that pass the network together, as in the published code; their gradients add up to the full batch's."""

ARGUMENTS = ("network", "width", "depth", "samples", "scaling", "loss", "degree", "seed")
"""Arguments of a problem: those of an image set that are no coordinates of a cell come from the options."""

PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    **{images: partial(full_batch_problem, images) for images in IMAGE_SETS},
    "chebyshev": chebyshev_problem,
}
"""Problems in the paper's setting; other names are those of `curvlab.problems`."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem and how the whole training set is gone through."""

    problem: Problem

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The training data in chunks."""
        inputs, targets = self.problem.train
        return list(zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True))

    @property
    def data(self) -> Any:
        """The training data as an operator takes them."""
        return self.batches if len(self.batches) > 1 else self.problem.train

    def network(self) -> nn.Module:
        """A copy of the network at its initialisation."""
        return copy.deepcopy(self.problem.model)

    def hessian(self, model: nn.Module) -> Hessian:
        """The Hessian of the training loss at the parameters that a model has.

        On a CPU products go by double backward: on 64-64-64-10 with 256 samples a block of 4 took 10.6 ms in float64, the
        batched forward mode 23 ms.
        """
        return Hessian(model, self.problem.loss, self.data, batched=self.problem.train[0].device.type != "cpu")

    def gradient(self, model: nn.Module, chosen: Tensor | None = None) -> tuple[float, Float[Tensor, " P"]]:
        """Return loss and flat gradient, of the whole training set or of the samples chosen; fills `.grad`, too."""
        model.zero_grad()
        inputs, targets = self.problem.train
        batches = self.batches if chosen is None else [(inputs[chosen], targets[chosen])]
        count = sum(len(x) for x, _ in batches)
        total = 0.0
        for x, y in batches:
            loss = self.problem.loss(model(x), y) * (len(x) / count)
            loss.backward()
            total += float(loss.detach())
        return total, parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])

    def accuracy(self, model: nn.Module) -> float:
        """Share of the training samples whose largest output is that of their class."""
        inputs, targets = self.problem.train
        classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
        with torch.no_grad():
            return float((model(inputs).argmax(dim=1) == classes).double().mean())


def flat(model: nn.Module) -> Float[Tensor, " P"]:
    """A copy of the parameters as one vector."""
    return parameters_to_vector(model.parameters()).detach().clone()


def setting_of(cell: Cell, config: Config) -> Setting:
    """Return the setting of a cell; the last one is kept, so that neighbouring cells share it."""
    spec = str(cell["problem"])
    options = vars(config) if spec in IMAGE_SETS else {}
    wanted = {name: cell.coordinates.get(name, options.get(name)) for name in ARGUMENTS}
    arguments = tuple(sorted((name, value) for name, value in wanted.items() if value is not None))
    return _setting(spec, config.device, config.dtype, arguments)


@lru_cache(maxsize=1)
def _setting(spec: str, device: str, dtype: str, arguments: tuple[tuple[str, Any], ...]) -> Setting:
    make = PROBLEMS.get(spec) or partial(resolve, spec)
    return Setting(make(**dict(arguments)).to(device, getattr(torch, dtype)))
