"""A race of optimisers in equal times, in rounds after each of which the worse half drops out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import ceil, inf, isfinite, log2

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.advice.candidates import Candidate
from curvlab.compare.batches import Batch
from curvlab.errors import CurvlabError
from curvlab.nn.modes import evaluating
from curvlab.optim import NaturalGradient
from curvlab.rows.sweep import PickOutput, as_arguments, select_output

Clock = Callable[[], float]


@dataclass(frozen=True)
class Look:
    """What was seen of a run: its steps, seconds in them, and the loss of data that it does not train on."""

    steps: int
    seconds: float
    loss: float


@dataclass
class Entrant:
    """A candidate that trains a copy of the model.

    Attributes:
        candidate: the optimiser and its settings.
        model: the copy.
        optimizer: of the copy.
        loss: the loss module.
        output: which tensor of a structured output the loss is called on.
        steps: taken so far.
        seconds: in them, but for the first one, which checks and learns.
        looks: what was seen, after every round.
        trouble: why it is out, if it is for something else than its loss.
    """

    candidate: Candidate
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    output: PickOutput
    steps: int = 0
    seconds: float = 0.0
    looks: list[Look] = field(default_factory=list)
    trouble: str | None = None

    @classmethod
    def of(cls, candidate: Candidate, model: nn.Module, loss: nn.Module, output: PickOutput, *, graph: bool) -> Entrant:
        """Enter a candidate; raises what its optimiser raises."""
        own, criterion = copy.deepcopy((model, loss))
        return cls(candidate, own, candidate.make(own, criterion, output=output, graph=graph), criterion, output)

    @property
    def best(self) -> float:
        """The lowest loss that was seen; infinite if it is in trouble or unseen."""
        return min((look.loss for look in self.looks), default=inf) if self.trouble is None else inf

    @property
    def damping(self) -> float | None:
        """Where the damping of natural gradient has arrived."""
        return self.optimizer.damping if isinstance(self.optimizer, NaturalGradient) and self.steps else None

    def run(self, batches: Sequence[Batch], until: float, clock: Clock) -> None:
        """Train until a time has come, one step at least."""
        while self.trouble is None:
            begun = clock()
            try:
                value = self._step(batches[self.steps % len(batches)])
            except torch.OutOfMemoryError:
                raise
            except (CurvlabError, ArithmeticError, ValueError, RuntimeError) as problem:
                self.trouble = str(problem).strip().splitlines()[0]
                return
            ended = clock()
            self.seconds += ended - begun if self.steps else 0.0
            self.steps += 1
            if not isfinite(value):
                self.trouble = f"its loss was not finite in step {self.steps}"
            if ended >= until:
                return

    def _step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        with self.optimizer.collect() if isinstance(self.optimizer, NaturalGradient) else nullcontext():
            value = self.value(batch)
            value.backward()
        self.optimizer.step()
        return float(value.detach())

    def value(self, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss of a batch at the present weights, in the mode of the model."""
        inputs, targets = batch
        args, kwargs = as_arguments(inputs)
        returned = self.model(*args, **kwargs)
        outputs = returned if self.output is None else select_output(returned, self.output)
        value: Tensor = self.loss(outputs, targets)
        return value

    def look(self, held: Sequence[Batch]) -> float:
        """See the loss of batches that it does not train on, their mean, in evaluation mode."""
        with evaluating(self.model), torch.no_grad():
            found = [float(self.value(batch)) for batch in held]
        loss = sum(found) / len(found)
        self.looks.append(Look(self.steps, self.seconds, loss if isfinite(loss) else inf))
        return loss


def race(
    entrants: Sequence[Entrant],
    batches: Sequence[Batch],
    held: Sequence[Batch],
    seconds: float,
    *,
    clock: Clock = time.perf_counter,
    told: Callable[[Entrant, int], None] = lambda _, __: None,
) -> list[Entrant]:
    """Train all in equal times, in rounds of equal length, after each of which the worse half drops out.

    Args:
        entrants: at least one.
        batches: what they train on, in this order, over and over.
        held: what they are judged on.
        seconds: for all of it.
        clock: tells the time in seconds.
        told: called after each entrant's part of a round, with the number of the round.

    Returns:
        Those that are in no trouble, by rounds that they took part in and then by loss, the best first.

    Source: Jamieson & Talwalkar 2016, *Non-stochastic Best Arm Identification and Hyperparameter Optimization*.
    """
    rounds, alive = max(1, ceil(log2(len(entrants)))), list(entrants)
    end = clock() + seconds
    for number in range(rounds):
        for position, entrant in enumerate(alive):
            rounds_left = (len(alive) - position) / len(alive) + rounds - number - 1
            share = max(0.0, end - clock()) / rounds_left / len(alive)
            entrant.run(batches, clock() + share, clock)
            entrant.look(held)
            told(entrant, number)
        if number < rounds - 1:
            alive = _ranked(entrants)[: max(1, ceil(len(alive) / 2))]
    return _ranked(entrants)


def _ranked(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Return those in no trouble, by rounds and then by loss: one that had dropped out takes the place of a leader that fails."""
    running = [entrant for entrant in entrants if entrant.best < inf]
    return sorted(running, key=lambda entrant: (-len(entrant.looks), entrant.best))
