"""Training runs with a monitor: at a constant learning rate, and at one that grows until the run is unstable."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import curvlab
from curvlab.monitor import Edge, Monitor
from curvlab.problems import Problem, resolve

CourseName = Literal["digits-mlp", "fashion-lenet", "characters", "karate-gcn"]

SMOOTH = 50
"""Steps whose mean loss is looked at."""
SHOWS = 1.5
"""The loss shows an instability once that mean is so many times the lowest so far, or is not finite."""


SMOOTHING = 0.1
"""Of labels, so that the loss keeps its curvature where all samples are fitted, and a large learning rate makes it unstable."""


@dataclass(frozen=True)
class Course:
    """How a problem is trained.

    Attributes:
        optimiser: made from parameters and a learning rate.
        title: what it is called.
        rate: learning rate at which training is stable.
        batch: samples of a batch, all if None.
    """

    optimiser: Callable[[Iterator[torch.nn.Parameter], float], torch.optim.Optimizer]
    title: str
    rate: float
    batch: int | None


def _sgd(parameters: Iterator[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def _momentum(parameters: Iterator[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def _adam(parameters: Iterator[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate)


COURSES: Mapping[CourseName, Course] = {
    "digits-mlp": Course(_sgd, "SGD", 0.1, 256),
    "fashion-lenet": Course(_momentum, "SGD with momentum 0.9", 0.02, 64),
    "characters": Course(_adam, "Adam", 5e-4, 16),
    "karate-gcn": Course(_sgd, "SGD", 0.3, None),
}
"""Problems and how they are trained."""


@dataclass(frozen=True)
class Followed:
    """What came of a run.

    Attributes:
        steps: that were taken, fewer where the loss was not finite any more.
        seconds: of the steps, without the monitor.
        monitored: seconds of the monitor, by the clock of the loop.
        share: the monitor's own account of its share.
        measured: number of measurements by quantity.
        told: the step of the first event of each name.
        shown: the step at which the loss showed an instability, if any.
        reasons: quantities that the monitor left out, and why.
    """

    steps: int
    seconds: float
    monitored: float
    share: float
    measured: Mapping[str, int]
    told: Mapping[str, int]
    shown: int | None
    reasons: Mapping[str, str]

    @property
    def overhead(self) -> float:
        """Seconds of the monitor a second of training, by the clock of the loop."""
        return self.monitored / self.seconds


class Shown:
    """Looks at the loss alone for an instability."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SMOOTH)
        self._lowest = math.inf

    def at(self, loss: float) -> bool:
        """Whether the losses so far show one."""
        self._recent.append(loss)
        if not math.isfinite(loss):
            return True
        if len(self._recent) < SMOOTH:
            return False
        mean = sum(self._recent) / SMOOTH
        self._lowest = min(self._lowest, mean)
        return mean > SHOWS * self._lowest


def follow(
    name: CourseName, steps: int, budget: float, *, ramp: float = 1.0, seed: int = 0, device: str = "cpu"
) -> Followed:
    """Train with a monitor.

    Args:
        name: of the course.
        steps: to take.
        budget: of the monitor.
        ramp: by how much the learning rate grows over the run, by the same factor a step; the preconditioned sharpness alone is
            measured where it grows, and all quantities where it does not.
        seed: of the initialisation and the order of samples.
        device: torch device.
    """
    course = COURSES[name]
    made = resolve(name, seed=seed).to(device, torch.float32)
    model, loss = made.model.train(), nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    optimiser = course.optimiser(model.parameters(), course.rate)
    monitor = curvlab.monitor(
        model, loss, [Edge(products=3)] if ramp != 1 else None, budget=budget, optimizer=optimiser
    )
    shown, first = Shown(), None
    monitored, taken = 0.0, 0
    started = time.perf_counter()
    for taken, (x, y) in enumerate(_batches(made, course.batch, steps, seed), 1):
        optimiser.param_groups[0]["lr"] = course.rate * ramp ** (taken / steps)
        optimiser.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimiser.step()
        number = float(value.detach())
        stepped = time.perf_counter()
        monitor.after_step(x, y, number)
        monitored += time.perf_counter() - stepped
        if first is None and shown.at(number):
            first = taken
            if ramp != 1:
                break
    seconds = time.perf_counter() - started - monitored
    return _followed(monitor, taken, seconds, monitored, first)


def _followed(monitor: Monitor, taken: int, seconds: float, monitored: float, shown: int | None) -> Followed:
    counts: dict[str, int] = {}
    for measurement in monitor.measurements:
        counts[measurement.quantity] = counts.get(measurement.quantity, 0) + 1
    told: dict[str, int] = {}
    for event in monitor.events:
        told.setdefault(event.name, event.step)
    return Followed(taken, seconds, monitored, monitor.share, counts, told, shown, monitor.dropped)


def _batches(problem: Problem, batch: int | None, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = problem.train
    generator = torch.Generator().manual_seed(seed)
    left: list[Tensor] = []
    for _ in range(steps):
        if batch is None:
            yield inputs, targets
            continue
        if not left:
            order = torch.randperm(len(inputs), generator=generator)
            left = list(order[: len(inputs) // batch * batch].split(batch))
        chosen = left.pop().to(inputs.device)
        yield inputs[chosen], targets[chosen]
