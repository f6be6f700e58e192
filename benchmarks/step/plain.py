"""K-FAC in plain torch, for factors from any library.

Running averages with bias correction, damping split over the factors, inverses by Cholesky that layers make anew in
turns, and the gradient multiplied on both sides: what a user of a library of factors would write.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Factors = tuple[Float[Tensor, "O O"], Float[Tensor, "I I"]]
"""B over outputs, and A over inputs, with or without the bias' one."""


def due(layer: int, layers: int, step: int, interval: int) -> bool:
    """Whether a layer's inverses are made anew: all in step 0, then each once an interval, spread over it."""
    return step == 0 or (layer * interval // layers + step + 1) % interval == 0


class PlainKFAC:
    """Preconditions `.grad` of a chain's dense layers and convolutions.

    Args:
        network: the chain.
        interval: steps after which inverses are made anew.
        damping: ρ.
        decay: weight of the average so far.
    """

    def __init__(self, network: nn.Module, interval: int, damping: float, decay: float) -> None:
        modules = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.layers = [_PlainLayer(module) for module in modules]
        self.interval, self.damping, self.decay = interval, damping, decay
        self.steps = 0

    def precondition(self, factors: Iterable[Factors]) -> None:
        """Take the factors of this step, in the order of the layers, and precondition the gradients."""
        for position, (layer, (outputs, inputs)) in enumerate(zip(self.layers, factors, strict=True)):
            layer.average(outputs, inputs, self.decay)
            if due(position, len(self.layers), self.steps, self.interval):
                layer.invert(self.damping)
            layer.precondition()
        self.steps += 1


class _PlainLayer:
    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self.parameters = [p for p in (module.weight, module.bias) if p is not None and p.requires_grad]
        outputs, inputs = len(module.weight), sum(p[0].numel() for p in self.parameters)
        self.outputs = module.weight.new_zeros(outputs, outputs)
        self.inputs = torch.eye(inputs, dtype=module.weight.dtype, device=module.weight.device)
        self.inverses: tuple[Tensor, Tensor] | None = None
        self.weight = 0.0

    def average(self, outputs: Tensor, inputs: Tensor, decay: float) -> None:
        """Add a step's factors. Where A knows no bias, the bias' input is taken as uncorrelated with the others."""
        self.weight = decay * self.weight + 1
        self.outputs.lerp_(outputs, 1 / self.weight)
        self.inputs[: len(inputs), : len(inputs)].lerp_(inputs, 1 / self.weight)

    def invert(self, damping: float) -> None:
        ratio = (self.inputs.diagonal().mean() / self.outputs.diagonal().mean()).sqrt()
        self.inverses = (
            _damped_inverse(self.outputs, damping**0.5 / ratio),
            _damped_inverse(self.inputs, damping**0.5 * ratio),
        )

    def precondition(self) -> None:
        assert self.inverses is not None
        matrix = torch.cat([_gradient(p).view(len(p), -1) for p in self.parameters], dim=1)
        outputs, inputs = self.inverses
        found = (outputs @ matrix @ inputs).split([p[0].numel() for p in self.parameters], dim=1)
        for parameter, part in zip(self.parameters, found, strict=True):
            _gradient(parameter).copy_(part.view_as(parameter))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _damped_inverse(matrix: Float[Tensor, "d d"], damping: Float[Tensor, ""]) -> Float[Tensor, "d d"]:
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
