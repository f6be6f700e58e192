"""The loss of a model at other weights; the model is left as it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.compare.batches import Batch
from curvlab.nn.functional import holding
from curvlab.nn.hooks import unwatched
from curvlab.nn.modes import as_cast
from curvlab.rows import Rows
from curvlab.rows.loss import flat_outputs
from curvlab.rows.making import rows_of_loss
from curvlab.rows.owners import trainable
from curvlab.rows.passes import ModelInputs, Pass
from curvlab.rows.sweep import left_as_found, select_output

Weights = dict[str, Tensor]
"""Trainable parameters by name."""


@dataclass(frozen=True)
class Slope:
    """The loss and its derivatives at some weights.

    Attributes:
        loss: of the batch.
        gradient: ∂L/∂θ by name.
        at_outputs: ∂L/∂z in the order of rows.
    """

    loss: float
    gradient: Weights
    at_outputs: Float[Tensor, " R"]


@dataclass(frozen=True)
class Landscape:
    """What a loss does as the weights of a model move.

    Attributes:
        model: any module whose samples do not interact; its weights stay where they are.
        loss: called as `loss(outputs, targets)`.
        how: which outputs are meant, and of which rows structures are built.
        here: the present weights.
    """

    model: nn.Module
    loss: nn.Module
    how: Pass
    here: Weights = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "here", {name: p.detach() for name, p in trainable(self.model).items()})

    def _outputs(self, asked: ModelInputs) -> Tensor:
        """Return the outputs that the loss takes, which may be infinite or not numbers, unlike those of `ModelInputs.outputs`."""
        args, kwargs = asked.arguments
        with as_cast():
            z = asked.samples.choose(select_output(self.model(*args, **kwargs), asked.output))
        # A step may change the loss by less than the round-off of half precision.
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def value(self, weights: Mapping[str, Tensor], batch: Batch) -> float:
        """Return the loss of a batch at some weights, which may be infinite or not a number. Cost: one forward pass."""
        inputs, targets = batch
        with torch.no_grad(), left_as_found(self.model), holding(self.model, weights):
            return float(self.loss(self._outputs(self.how.read(self.model, inputs)), targets))

    def slope(self, weights: Mapping[str, Tensor], batch: Batch) -> Slope:
        """Return the loss of a batch and its gradients at some weights. Cost: one forward and one backward pass."""
        inputs, targets = batch
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.enable_grad(), left_as_found(self.model), holding(self.model, leaves), unwatched(self.model):
            asked = self.how.read(self.model, inputs)
            z = self._outputs(asked)
            value = self.loss(z, targets)
            found = torch.autograd.grad(value, [z, *leaves.values()], materialize_grads=True, allow_unused=True)
            laid_out = asked.samples.lay_out(found[0])
        return Slope(
            float(value.detach()),
            dict(zip(leaves, found[1:], strict=True)),
            flat_outputs(laid_out).permute(1, 2, 0).flatten(),
        )

    def rows(self, weights: Mapping[str, Tensor], batch: Batch, how: Pass | None = None) -> Rows:
        """Return the rows of S of a batch at some weights, those of `how` if given. Cost: see `curvlab.sqrt_fisher`."""
        inputs, targets = batch
        held = {name: nn.Parameter(w.detach()) for name, w in weights.items()}
        with holding(self.model, held):
            return rows_of_loss(self.model, self.loss, inputs, targets, how or self.how)


def moved(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor], rate: float) -> Weights:
    """Return `θ − η d`."""
    return {name: w - rate * direction[name].to(w) for name, w in weights.items()}
