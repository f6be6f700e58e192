"""What costs next to nothing: the step beside the gradient, and layer by layer norms and dead units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.monitor.events import Condition
from curvlab.monitor.quantity import Quantity
from curvlab.monitor.training import Training
from curvlab.rows.owners import owners_of

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Layers of which a batch uses some units only."""


class Alignment(
    Quantity, key="alignment", summary="cosine of the step and the negative gradient, and the step's length"
):
    """The cosine of what a step added to the parameters and the negative gradient before it, and the length of the step."""

    passes = 1.0
    of_optimizer = of_step = True

    def measure(self, training: Training) -> dict[str, float]:
        """Return both; a step of length 0 has no cosine."""
        if training.change is None:
            raise UnsupportedModel("The monitor was given no optimiser: call curvlab.monitor(…, optimizer=optimizer).")
        space = training.space
        step, gradient = space.flatten(training.change), space.flatten(training.gradient_before())
        length, slope = float(step.norm()), float(gradient.norm())
        found = {"step_norm": length}
        return found | {"cosine": -float(step @ gradient) / (length * slope)} if length * slope > 0 else found


class Layers(Quantity, key="layers", summary="by layer: norms of weights and gradient, and the share of dead units"):
    """Norms of each layer's weights and gradient, and the share of its units that are dead.

    A unit, an output channel, is dead on a batch if the gradient of its weights is zero: no sample moves it. A layer whose units
    are all dead in two measurements is an event. Embeddings have no such share, as a batch looks up some of their rows only.
    """

    passes = 1.0

    def __init__(self) -> None:
        self._dead: dict[str, float] = {}

    def measure(self, training: Training) -> dict[str, float]:
        """Return the numbers of all layers, ``layer/number`` each."""
        weights = {name: p.detach() for name, p in training.model.named_parameters()}
        gradient = training.gradient()
        numbers: dict[str, Tensor] = {}
        for owner in owners_of(training.model, fixed=False):
            names = owner.layout.names
            label = owner.name or type(owner.module).__name__
            numbers[f"{label}/weight_norm"] = _norm([weights[name] for name in names])
            numbers[f"{label}/gradient_norm"] = _norm([gradient[name] for name in names])
            if max(weights[name].ndim for name in names) > 1 and not isinstance(owner.module, TABLES):
                matrix = owner.layout.join({name: gradient[name][None] for name in names}).view(owner.layout.units, -1)
                numbers[f"{label}/dead"] = (matrix == 0).all(1).double().mean()
        return dict(zip(numbers, torch.stack([n.double() for n in numbers.values()]).tolist(), strict=True))

    def conditions(self, values: Mapping[str, float]) -> Iterable[Condition]:
        """Watch for layers that are dead."""
        shares = {name.removesuffix("/dead"): share for name, share in values.items() if name.endswith("/dead")}
        before, self._dead = self._dead, shares
        for layer, share in shares.items():
            yield Condition(
                "layer dead",
                min(share, before.get(layer, 0.0)),
                f"no sample of the batch moves any unit of {layer}: its outputs are cut off, or do not reach the loss. Lower the "
                "learning rate and begin anew from before, or change activation or initialisation.",
                where=layer,
            )


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()
