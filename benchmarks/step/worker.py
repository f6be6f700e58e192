"""Training steps in a process of their own: `python -m benchmarks.step.worker REQUEST FOLDER`.

First the method is checked on a small batch, its curvature without draws: K-FAC's direction goes to `direction.npy`, to
be compared with that of the others; the dual form's has to solve its system. Then every round times one step of the
method and one of gradient descent, so that both see the same machine. Whole periods of inversions are timed, and steps
that make the same layers' inverses are of one kind: a step's cost is the mean over the kinds, by their frequency, of the
median of each.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import meter
from benchmarks.operations import Layer, layers_of
from benchmarks.process import Machine, Result, serve
from benchmarks.step.methods import METHODS, Batch, Method, MethodName, Rows, residual
from benchmarks.step.plain import due
from benchmarks.tasks import TASKS, Task, TaskName, random_labels

CHECKED_SAMPLES = 32
"""Samples of the batch on which directions are compared."""

CHECKED_STEPS = 3
"""Steps after which directions are compared, so that averages and old inverses enter."""


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        task: the network.
        method: the kind of training step.
        samples: number of samples N.
        interval: steps from one inversion to the next.
    """

    task: TaskName
    method: MethodName
    samples: int
    interval: int


@dataclass(frozen=True)
class Measurement(Result):
    """What came of it.

    Attributes:
        seconds: mean cost of a step.
        plain_seconds: that of gradient descent.
        steps: how many were timed.
        count: multiply-adds of a step.
        plain_count: those of gradient descent.
        peak_bytes: peak memory of the first two steps, and so of the state, too.
        losses: loss before the first and after the last step.
        residual: relative residual of the damped system that a direction in dual form should solve.
    """

    seconds: float = 0.0
    plain_seconds: float = 0.0
    steps: int = 0
    count: float = 0.0
    plain_count: float = 0.0
    peak_bytes: int = 0
    losses: tuple[float, ...] = ()
    residual: float | None = None

    @property
    def ratio(self) -> float:
        """Time of a step over that of gradient descent."""
        return self.seconds / self.plain_seconds

    @property
    def counted(self) -> float:
        """Multiply-adds of a step over those of gradient descent."""
        return self.count / self.plain_count


class Training:
    """Steps of one method on one batch."""

    def __init__(self, method: Method, batch: Batch, rows: Rows, interval: int) -> None:
        self.batch = batch
        self.steps = 0
        self.compute = method.prepare(batch, rows, interval)
        trained = [p for p in batch.network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=method.lr, momentum=0.9)

    def warm_up(self) -> None:
        """Take the first steps, in which memory is allocated and all inverses are made."""
        for _ in range(2):
            self.step()

    def step(self) -> None:
        """Take a step."""
        self.compute()
        self._optimizer.step()
        self.steps += 1


def measure(request: Request) -> tuple[Measurement, Tensor]:
    """Measure in this process; returns the direction of the check, too."""
    meter.use(request.device, request.threads)
    task, method, interval = TASKS[request.task], METHODS[request.method], request.interval
    direction, missed = check(task, method, interval, min(request.samples, CHECKED_SAMPLES), request.device)
    batch = build(task, request.samples, request.device)
    layers, C = layers_of(batch.network, batch.inputs)
    count, plain_count = (METHODS[name].operations(layers, len(batch.inputs), C) for name in (request.method, "sgd"))
    with torch.no_grad():
        first = float(batch.loss())
    training = Training(method, batch, method.rows, interval)
    peak = meter.growth(training.warm_up, request.device)
    plain = Training(METHODS["sgd"], build(task, request.samples, request.device), "mc", 1)
    plain.warm_up()
    taken = training.steps
    seconds, plain_seconds = _rounds(training, plain, layers, interval if method.inverts else 1, request)
    with torch.no_grad():
        last = float(batch.loss())
    done = Measurement(
        outcome="done",
        seconds=seconds,
        plain_seconds=plain_seconds,
        steps=training.steps - taken,
        count=count.mean(interval),
        plain_count=plain_count.mean(interval),
        peak_bytes=peak,
        losses=(first, last),
        residual=missed,
    )
    return done, direction


def build(task: Task[nn.Sequential], samples: int, device: str) -> Batch:
    """Return a network and a batch with random labels, the same in every process."""
    return Batch(*task.build(samples, device), random_labels(samples, device))


def check(
    task: Task[nn.Sequential], method: Method, interval: int, samples: int, device: str
) -> tuple[Tensor, float | None]:
    """Take some steps and return the last direction; in dual form with its residual.

    K-FAC's have the biases frozen: libraries differ in whether a bias shares its weight's block.
    """
    batch = build(task, samples, device)
    if method.inverts:
        for module in batch.network:
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.requires_grad_(False)
    training = Training(method, batch, method.checked, interval)
    for _ in range(CHECKED_STEPS - 1):
        training.step()
    training.compute()
    direction = torch.cat([p.grad.flatten() for p in batch.network.parameters() if p.grad is not None])
    return direction, residual(batch, method.checked) if method.solves else None


def _rounds(
    training: Training, plain: Training, layers: Sequence[Layer], period: int, request: Request
) -> tuple[float, float]:
    """Time steps in turns, over whole periods, and return the mean costs."""
    timings: dict[tuple[bool, ...], list[float]] = defaultdict(list)
    of_plain: list[float] = []
    spent = 0.0
    while len(of_plain) % period or not of_plain or (len(of_plain) < request.repeats and spent < request.seconds):
        kind = tuple(due(layer, len(layers), training.steps, period) for layer in range(len(layers)))
        of_plain.append(meter.timed(plain.step, request.device))
        timings[kind].append(meter.timed(training.step, request.device))
        spent += timings[kind][-1] + of_plain[-1]
    total = sum(len(taken) * statistics.median(taken) for taken in timings.values())
    return total / len(of_plain), statistics.median(of_plain)


def _measure_and_save(request: Request, folder: Path) -> Measurement:
    measurement, direction = measure(request)
    np.save(folder / "direction.npy", direction.cpu().numpy())
    return measurement


if __name__ == "__main__":
    serve(sys.argv[1:], Request, _measure_and_save, Measurement)
