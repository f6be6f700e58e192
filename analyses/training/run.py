"""One training run: real steps on batches, what the loss and the accuracy do, divergence, and a checkpoint to go on from."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from analyses.checkpoints import take_up
from analyses.training.methods import Optimiser
from analyses.training.tasks import Task
from curvlab.problems import Problem

EVALUATED = 2000
"""Training samples, the first ones, on which the loss is evaluated."""
PORTION = 500
"""Samples that are evaluated at once."""
BLOWN_UP = 10.0
"""A run has diverged when its loss exceeds this many times that before training."""
CHECKPOINT_SECONDS = 60.0
"""Time between checkpoints; a run that is shorter leaves none."""


@dataclass(frozen=True)
class Evaluation:
    """Loss on training samples and accuracy on test samples after some steps."""

    step: int
    loss: float
    accuracy: float


@dataclass
class Trace:
    """What a run has shown so far.

    Attributes:
        points: evaluations in order, the first before any step.
        diverged_at: step after which the loss was not finite or had blown up; None for none.
    """

    points: list[Evaluation] = field(default_factory=list)
    diverged_at: int | None = None

    @property
    def final_loss(self) -> float:
        """Loss at the end, infinite after divergence."""
        return inf if self.diverged_at is not None else self.points[-1].loss

    @property
    def status(self) -> str:
        """Whether the run diverged, as measurements say it."""
        return "ok" if self.diverged_at is None else "diverged"

    def steps_to(self, reached: Callable[[Evaluation], bool]) -> int | None:
        """Return the step of the first evaluation that has reached something, None if none has."""
        return next((point.step for point in self.points if reached(point)), None)


@dataclass(frozen=True)
class Checkpoint:
    """A file with everything that a run needs to go on; None keeps nothing."""

    path: Path | None

    def load(
        self, problem: Problem, optimiser: Optimiser, go_on: Callable[[Problem, Optimiser, int], object]
    ) -> tuple[int, Trace]:
        """Restore a run and return the steps taken and its trace; nothing, if the file cannot be taken up.

        Args:
            problem: what the run trains.
            optimiser: of the model's parameters.
            go_on: takes a step, by its number from 0; tried on copies first.
        """

        def rehearse(state: dict[str, Any]) -> None:
            model, loss, trial = copy.deepcopy((problem.model, problem.loss, optimiser))
            step, _ = _restore(state, model, trial)
            go_on(replace(problem, model=model, loss=loss), trial, step)

        return take_up(self.path, rehearse, lambda state: _restore(state, problem.model, optimiser)) or (0, Trace())

    def save(self, model: nn.Module, optimiser: Optimiser, step: int, trace: Trace) -> None:
        """Keep a run, atomically."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        points = [asdict(point) for point in trace.points]
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "points": points}
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def remove(self) -> None:
        """Forget the run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _restore(state: dict[str, Any], model: nn.Module, optimiser: Optimiser) -> tuple[int, Trace]:
    """Take up the content of a checkpoint and return the steps taken and the trace."""
    points = [Evaluation(int(at["step"]), float(at["loss"]), float(at["accuracy"])) for at in state["points"]]
    step = int(state["step"])
    if not points or step < points[-1].step:
        raise ValueError(f"{len(points)} evaluations do not lead to step {step}")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return step, Trace(points)


def train(
    problem: Problem,
    optimiser: Optimiser,
    task: Task,
    seed: int,
    checkpoint: Checkpoint | None = None,
    *,
    passes: int = 1,
) -> Trace:
    """Train a problem's model in place.

    Args:
        problem: classification; its model is trained.
        optimiser: of the model's parameters.
        task: batch, steps and evaluations.
        seed: of the batches; their order is that of every other run with this seed.
        checkpoint: where an interrupted run goes on, and where this one is kept meanwhile.
        passes: batches of a step.
    """
    checkpoint = checkpoint or Checkpoint(None)
    model = problem.model

    def go_on(trained: Problem, stepper: Optimiser, step: int) -> object:
        return take_step(trained, stepper, *batches(problem, task, seed, step, passes))

    done, trace = checkpoint.load(problem, optimiser, go_on)
    if not trace.points:
        trace.points.append(evaluate(problem, 0))
    saved = time.monotonic()
    for step in range(done + 1, task.steps + 1):
        if not take_step(problem, optimiser, *batches(problem, task, seed, step - 1, passes)):
            trace.diverged_at = step
        elif step % task.every == 0 or step == task.steps:
            now = evaluate(problem, step)
            if isfinite(now.loss) and now.loss < BLOWN_UP * trace.points[0].loss:
                trace.points.append(now)
            else:
                trace.diverged_at = step
        if trace.diverged_at is not None:
            break
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint.save(model, optimiser, step, trace)
            saved = time.monotonic()
    checkpoint.remove()
    return trace


def take_step(problem: Problem, optimiser: Optimiser, *data: tuple[Tensor, Tensor]) -> bool:
    """Take one step on some batches, and return whether the outputs and the loss before it were finite."""

    def closure(x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=scaler is not None):
            outputs = problem.model(x)
            loss: Tensor = problem.loss(outputs, y)
        if not bool(outputs.isfinite().all()):
            raise FloatingPointError
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    problem.model.zero_grad()
    try:
        return bool(optimiser.step(*(partial(closure, x, y) for x, y in data)).isfinite())
    except FloatingPointError:
        return False


def batches(problem: Problem, task: Task, seed: int, step: int, passes: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a step, which follow on those of the step before it."""
    return [batch(problem, task, seed, index) for index in range(step * passes, (step + 1) * passes)]


def batch(problem: Problem, task: Task, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Return one batch of a run; every epoch has its own order, and leaves out what fills no batch."""
    x, y = problem.train
    size = min(task.batch, len(x))
    epoch, place = divmod(index, len(x) // size)
    chosen = order(len(x), seed, epoch)[place * size : (place + 1) * size].to(x.device)
    return x[chosen], y[chosen]


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


def evaluate(problem: Problem, step: int) -> Evaluation:
    """Evaluate the model as it is."""
    with evaluating(problem.model):
        x, y = (part[:EVALUATED] for part in problem.train)
        pieces = list(zip(x.split(PORTION), y.split(PORTION), strict=True))
        loss = sum(float(problem.loss(problem.model(a), b)) * len(a) for a, b in pieces) / len(x)
        right, of = 0, 0
        for a, b in zip(*(part.split(PORTION) for part in problem.test), strict=True):
            right += int((problem.model(a).argmax(1) == b).sum())
            of += b.numel()
    return Evaluation(step, loss, right / of)
