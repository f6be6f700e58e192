"""How far one step may go: the trust region, and the alarm for a loss that explodes nevertheless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.collect import Collector
from curvlab.rows.processes import mean_of_processes

FIRST = 3
"""Steps that say what losses are usual."""
EXPLODED = 1e3
"""How many times the usual loss is an explosion."""
AT_ONCE = 1e6
"""The same before it is known what is usual."""


def unit(passes: Sequence[Collector]) -> Float[Tensor, ""]:
    """Return the unit of a step's squared length in the metric of the Fisher matrix.

    It is the weight of the samples in the loss, 1 for a mean and N for a sum, so that the bound on a step's length is one on
    the mean KL divergence of a sample, whatever the loss is multiplied by. A cross-entropy below 1 nat is its own unit: where
    samples are fitted, their Fisher matrix vanishes, and no bound by it alone keeps steps short. So are squares in units of the
    targets, which know no KL divergence before their noise is known.
    """
    values = [found.value for found in passes if found.value is not None]
    measure = passes[0].measure
    if measure == "squares":
        return _mean(values)
    weight = _mean([found.weight for found in passes])
    return torch.minimum(weight, _mean(values)) if measure == "nats from 0 on" else weight


def _mean(numbers: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the mean, over all processes, in single precision at least."""
    stacked = torch.stack([number.detach() for number in numbers])
    return mean_of_processes(stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mean())


def clip(bound: float, unit: Float[Tensor, ""], squared: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the factor min(1, √(κu/l²)) that brings a step of squared length l² into the trust region; 0 if it is not a number."""
    room = bound * unit.to(squared) / squared.clamp_min(torch.finfo(squared.dtype).tiny)
    return room.sqrt().clamp_max(1.0).nan_to_num(0.0)


@dataclass
class Heard:
    """What is known of the loss along a run; stops it if the loss explodes.

    An explosion is 1000 times the largest of the first three losses, which count as 1 nat at least, and among these 10⁶ times.

    Attributes:
        unit: of the last step's squared length, see `unit`.
        loss: of the last step that had one, its mean over passes.
        usual: the largest loss of the first steps.
        steps: those that were heard, up to three.
    """

    unit: Float[Tensor, ""] = field(default_factory=lambda: torch.ones(()))
    loss: Float[Tensor, ""] | None = None
    usual: float = 0.0
    steps: int = 0

    def hear(self, passes: Sequence[Collector], *, clips: bool, looks: bool) -> None:
        """Take note of a step.

        Args:
            passes: those of the step.
            clips: whether the unit is needed.
            looks: whether the loss may be looked at, for which a GPU waits.

        Raises:
            FloatingPointError: if the loss has exploded.
        """
        values = [found.value for found in passes if found.value is not None]
        if not values:
            return
        if clips:
            self.unit = unit(passes)
        self.loss = _mean(values)
        if looks and isfinite(value := float(self.loss)):
            self._look(value, 0.0 if passes[0].measure == "squares" else float(passes[0].weight))

    def _look(self, value: float, least: float) -> None:
        if value > (EXPLODED if self.steps == FIRST else AT_ONCE) * self.usual > 0:
            raise FloatingPointError(
                f"The loss has exploded to {value:.3g}; it was at most {self.usual:.3g} in the first steps. The model is "
                "far from where its curvature was taken: lower the learning rate or kl_clip, raise the damping, or refresh the "
                "curvature more often, and go on from parameters of before."
            )
        if self.steps < FIRST:
            self.usual = max(self.usual, abs(value), least)
            self.steps += 1

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs."""
        return {"unit": float(self.unit), "usual": self.usual, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        self.unit, self.usual, self.steps = (
            torch.tensor(state["unit"], dtype=torch.float64),
            state["usual"],
            int(state["steps"]),
        )
