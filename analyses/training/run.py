"""One training run: real steps, and what is seen of the loss between them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from analyses.training.races import Race
from curvlab.integrations.attaching import preconditioner_of
from curvlab.problems import Problem
from curvlab.study import Diverged, generator

EVALUATED = 2000
"""Training samples, the first ones, on which the loss is evaluated."""
PORTION = 500
"""Samples that are evaluated at once."""
BLOWN_UP = 10.0
"""A run has diverged when its loss exceeds this many times that before training."""


@dataclass(eq=False)
class Training:
    """A model in training.

    Attributes:
        problem: With the model.
        optimisers: One, or several that share its parameters out among them.
        autocast: Whether forward passes are under autocast, with a scaled loss.
    """

    problem: Problem
    optimisers: Sequence[torch.optim.Optimizer]
    autocast: bool = field(default=False, kw_only=True)

    @cached_property
    def _scaler(self) -> torch.amp.GradScaler:
        """Of the loss; one that is not enabled leaves it, and steps, as they are."""
        return torch.amp.GradScaler(self.problem.train[0].device.type, enabled=self.autocast)

    def _collecting(self) -> AbstractContextManager[None]:
        """Context of a forward and a backward pass."""
        found = preconditioner_of(self.optimisers[0])
        return nullcontext() if found is None else found.collect()

    def take(self, batches: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Take one step on the means over batches, and return whether all outputs and losses before it were finite."""
        model = self.problem.model
        model.zero_grad()
        try:
            for x, y in batches:
                with self._collecting():
                    with torch.autocast(x.device.type, enabled=self.autocast):
                        outputs = model(x)
                        loss: Tensor = self.problem.loss(outputs, y)
                    if not bool(outputs.isfinite().all() and loss.isfinite()):
                        raise FloatingPointError
                    self._scaler.scale(loss).backward()
            if len(batches) > 1:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= len(batches)
            for optimiser in self.optimisers:
                self._scaler.step(optimiser)
        except FloatingPointError:
            return False
        self._scaler.update()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.problem.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same model."""
        self.problem.model.load_state_dict(state["model"])
        for optimiser, own in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)
        self._scaler.load_state_dict(state["scaler"])


@dataclass(eq=False)
class Run(Training):
    """A run of a race, for `curvlab.study.follow`; its problem is one of classification.

    Attributes:
        label: Method and configuration; a checkpoint of another is not taken up.
        race: Batch, steps and evaluations.
        seed: Of the batches; their order is that of every other run with this seed.
        passes: Batches of a step.
        start: Loss before training, once it was seen.
    """

    label: str
    race: Race
    seed: int
    passes: int = 1
    start: float = inf

    def look(self, step: int) -> Mapping[str, float] | None:
        """Evaluate the model where the race asks for it; the run has diverged if its loss is not finite, or has blown up."""
        if step % self.race.every and step != self.race.steps:
            return None
        seen = evaluate(self.problem)
        if step == 0:
            self.start = seen["loss"]
        elif not seen["loss"] < BLOWN_UP * self.start:
            raise Diverged
        return seen

    def step(self, step: int) -> None:
        """Take a step; the run has diverged if an output or the loss before it is not finite."""
        if not self.take(self.batches(step)):
            raise Diverged

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return the batches of a step, which follow on those of the step before it."""
        return [self._batch(index) for index in range(step * self.passes, (step + 1) * self.passes)]

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one batch; every epoch has its own order, and leaves out what fills no batch."""
        x, y = self.problem.train
        size = min(self.race.batch, len(x))
        epoch, place = divmod(index, len(x) // size)
        chosen = order(len(x), self.seed, epoch)[place * size : (place + 1) * size].to(x.device)
        return x[chosen], y[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {**super().state_dict(), "label": self.label, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same method and configuration."""
        if state["label"] != self.label:
            raise ValueError(f"it is of {state['label']}, not of {self.label}")
        super().load_state_dict(state)
        self.start = float(state["start"])


def order(samples: int, seed: int, epoch: int) -> Int64[Tensor, " N"]:
    """Return the order of the samples in an epoch."""
    return torch.randperm(samples, generator=generator(seed, "batches", epoch))


@torch.no_grad()
def evaluate(problem: Problem) -> dict[str, float]:
    """Return the loss on training samples and the accuracy on test samples of a model that trains."""
    problem.model.eval()
    x, y = (part[:EVALUATED] for part in problem.train)
    pieces = list(zip(x.split(PORTION), y.split(PORTION), strict=True))
    loss = sum(float(problem.loss(problem.model(a), b)) * len(a) for a, b in pieces) / len(x)
    right, of = 0, 0
    for a, b in zip(*(part.split(PORTION) for part in problem.test), strict=True):
        right += int((problem.model(a).argmax(1) == b).sum())
        of += b.numel()
    problem.model.train()
    return {"loss": loss, "accuracy": right / of}


class FullBatch(Training):
    """Steps on the whole training set, for `curvlab.study.follow`; the problem is one of regression."""

    def look(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        """See ‖f − y‖² of the outputs f."""
        x, y = self.problem.train
        with torch.no_grad():
            return {"squared": float((self.problem.model(x) - y).square().sum())}

    def step(self, step: int) -> None:  # noqa: ARG002
        """Take a step; the run has diverged if an output or the loss before it is not finite."""
        if not self.take([self.problem.train]):
            raise Diverged
