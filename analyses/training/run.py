"""One training run: real steps, and what is seen of the loss between them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from analyses.training.optimisers import Optimiser
from analyses.training.tasks import Task
from curvlab.optim import NaturalGradient
from curvlab.problems import Problem
from curvlab.study import Diverged

EVALUATED = 2000
"""Training samples, the first ones, on which the loss is evaluated."""
PORTION = 500
"""Samples that are evaluated at once."""
BLOWN_UP = 10.0
"""A run has diverged when its loss exceeds this many times that before training."""


@dataclass(eq=False)
class Training:
    """A model that an optimiser trains.

    Attributes:
        problem: With the model.
        optimiser: Of the model's parameters.
    """

    problem: Problem
    optimiser: Optimiser

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"model": self.problem.model.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RuntimeError: it is of another model.
        """
        self.problem.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])


@dataclass(eq=False)
class Run(Training):
    """A run of a race, for `curvlab.study.follow`; its problem is one of classification.

    Attributes:
        label: Method and configuration; a checkpoint of another is not taken up.
        task: Batch, steps and evaluations.
        seed: Of the batches; their order is that of every other run with this seed.
        passes: Batches of a step.
        start: Loss before training, once it was seen.
    """

    label: str
    task: Task
    seed: int
    passes: int = 1
    start: float = inf

    def look(self, step: int) -> Mapping[str, float] | None:
        """Evaluate the model where the task asks for it.

        Raises:
            Diverged: the loss is not finite, or has blown up.
        """
        if step % self.task.every and step != self.task.steps:
            return None
        seen = evaluate(self.problem)
        if step == 0:
            self.start = seen["loss"]
        elif not seen["loss"] < BLOWN_UP * self.start:
            raise Diverged
        return seen

    def step(self, step: int) -> None:
        """Take a step.

        Raises:
            Diverged: an output or the loss before it is not finite.
        """
        if not self.take(self.batches(step)):
            raise Diverged

    def take(self, data: list[tuple[Tensor, Tensor]]) -> bool:
        """Take one step on some batches, and return whether the outputs and the loss before it were finite."""

        def closure(x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
            with torch.autocast(x.device.type, enabled=scaler is not None):
                outputs = self.problem.model(x)
                loss: Tensor = self.problem.loss(outputs, y)
            if not bool(outputs.isfinite().all()):
                raise FloatingPointError
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        self.problem.model.zero_grad()
        try:
            return bool(self.optimiser.step(*(partial(closure, x, y) for x, y in data)).isfinite())
        except FloatingPointError:
            return False

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return the batches of a step, which follow on those of the step before it."""
        return [self._batch(index) for index in range(step * self.passes, (step + 1) * self.passes)]

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one batch; every epoch has its own order, and leaves out what fills no batch."""
        x, y = self.problem.train
        size = min(self.task.batch, len(x))
        epoch, place = divmod(index, len(x) // size)
        chosen = order(len(x), self.seed, epoch)[place * size : (place + 1) * size].to(x.device)
        return x[chosen], y[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {**super().state_dict(), "label": self.label, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another method or configuration.
        """
        if state["label"] != self.label:
            raise ValueError(f"it is of {state['label']}, not of {self.label}")
        super().load_state_dict(state)
        self.start = float(state["start"])


def order(samples: int, seed: int, epoch: int) -> Int64[Tensor, " N"]:
    """Return the order of the samples in an epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(samples, generator=generator)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model that trains is in evaluation mode and keeps no graph."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def evaluate(problem: Problem) -> dict[str, float]:
    """Return the loss on training samples and the accuracy on test samples of the model as it is."""
    with evaluating(problem.model):
        x, y = (part[:EVALUATED] for part in problem.train)
        pieces = list(zip(x.split(PORTION), y.split(PORTION), strict=True))
        loss = sum(float(problem.loss(problem.model(a), b)) * len(a) for a, b in pieces) / len(x)
        right, of = 0, 0
        for a, b in zip(*(part.split(PORTION) for part in problem.test), strict=True):
            right += int((problem.model(a).argmax(1) == b).sum())
            of += b.numel()
    return {"loss": loss, "accuracy": right / of}


@dataclass(eq=False)
class FullBatch(Training):
    """Steps on the whole training set, for `curvlab.study.follow`; the problem is one of regression."""

    optimiser: NaturalGradient

    def look(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        """See ‖f − y‖² of the outputs f."""
        x, y = self.problem.train
        with torch.no_grad():
            return {"squared": float((self.problem.model(x) - y).square().sum())}

    def step(self, step: int) -> None:  # noqa: ARG002
        """Take a step."""
        x, y = self.problem.train
        self.optimiser.zero_grad()
        with self.optimiser.collect():
            self.problem.loss(self.problem.model(x), y).backward()
        self.optimiser.step()
