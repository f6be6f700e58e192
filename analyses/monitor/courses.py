"""Training with a monitor, at a constant learning rate or at one that grows until the run is unstable."""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import curvlab
from analyses.clock import now
from analyses.specs import classifies_nodes
from curvlab.monitor import Monitor, Quantity
from curvlab.problems import Problem
from curvlab.study import generator

SMOOTH = 50
"""Steps whose mean loss is looked at."""
SHOWS = 1.5
"""The loss shows an instability once that mean is so many times the lowest so far, or is not finite."""
SMOOTHING = 0.1
"""Of labels, so that the loss keeps its curvature where all samples are fitted, and a large learning rate makes it unstable."""
Optimiser = Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Course:
    """How a problem is trained.

    Attributes:
        optimiser: made from parameters and a learning rate.
        title: what it is called.
        rate: learning rate at which training is stable.
        batch: samples of a batch; a graph is one.
    """

    optimiser: Optimiser
    title: str
    rate: float
    batch: int = 1


def _sgd(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def _momentum(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def _adam(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate)


COURSES: Mapping[str, Course] = {
    "digits-mlp": Course(_sgd, "SGD", 0.1, 256),
    "karate-gcn": Course(_sgd, "gradient descent", 0.3),
    "fashion-lenet": Course(_momentum, "SGD with momentum 0.9", 0.02, 64),
    "characters": Course(_adam, "Adam", 5e-4, 16),
}
"""How problems are trained, in an order that fixes the seeds of each."""
OTHERWISE = Course(_sgd, "SGD", 0.02, 64)
"""How problems of one's own are."""


@dataclass(frozen=True)
class Followed:
    """What came of a run.

    Attributes:
        steps: that were taken, fewer where the loss showed an instability as the learning rate grew.
        seconds: of the steps, without the monitor.
        monitored: seconds of the monitor, by the clock of the loop and without what its readings take.
        measured: number of measurements by quantity.
        told: the step of the first event "at the edge", if any.
        shown: the step at which the loss showed an instability, if any.
        dropped: quantities that the monitor left out.
    """

    steps: int
    seconds: float
    monitored: float
    measured: Mapping[str, int]
    told: int | None
    shown: int | None
    dropped: tuple[str, ...]

    @property
    def share(self) -> float:
        """Seconds of the monitor a second of training."""
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
    problem: Problem,
    name: str,
    steps: int,
    budget: float,
    *,
    ramp: float = 1.0,
    quantities: Sequence[Quantity] | None = None,
    seed: int = 0,
) -> Followed:
    """Train with a monitor, for as long as the loss shows no instability where the learning rate grows.

    What a reading of the clock takes is no time of the monitor.

    Args:
        problem: at its initialisation; it is trained.
        name: of the problem, by which its course is known.
        steps: to take.
        budget: of the monitor.
        ramp: by how much the learning rate grows over the steps, by the same factor in each.
        quantities: of the monitor; all if None.
        seed: of the order of samples.
    """
    course = COURSES.get(name, OTHERWISE)
    model, loss = problem.model.train(), smoothed(problem.loss)
    clock = partial(now, problem.train[0].device.type)
    optimiser = course.optimiser(model.parameters(), course.rate)
    shown, first, monitored, taken = Shown(), None, 0.0, 0
    with curvlab.monitor(model, loss, quantities, budget, optimizer=optimiser, clock=clock) as monitor:
        begun = clock()
        for taken, (x, y) in enumerate(_batches(problem, course.batch, steps, seed, classifies_nodes(name)), 1):
            optimiser.param_groups[0]["lr"] = course.rate * ramp ** (taken / steps)
            optimiser.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimiser.step()
            number = float(value.detach())
            clock()  # the first reading after a step takes longer
            idle, stepped = clock(), clock()
            monitor.after_step(x, y, number)
            monitored += (clock() - stepped) - (stepped - idle)
            if first is None and shown.at(number):
                first = taken
                if ramp != 1:
                    break
        seconds = clock() - begun - monitored
    return _followed(monitor, taken, seconds, monitored, first)


def smoothed(loss: nn.Module) -> nn.Module:
    """Return a cross-entropy with smooth labels, and any other loss as it is."""
    if not isinstance(loss, nn.CrossEntropyLoss):
        return loss
    found = copy.deepcopy(loss)
    found.label_smoothing = SMOOTHING
    return found


def _followed(monitor: Monitor, taken: int, seconds: float, monitored: float, shown: int | None) -> Followed:
    counts = Counter(measurement.quantity for measurement in monitor.measurements)
    told = min((event.step for event in monitor.events if event.name == "at the edge"), default=None)
    return Followed(taken, seconds, monitored, counts, told, shown, tuple(monitor.dropped))


def _batches(problem: Problem, batch: int, steps: int, seed: int, graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of samples in an order of a seed, each sample once an epoch; a graph whole."""
    inputs, targets = problem.train
    order = generator(seed, "batches")
    size = min(batch, len(inputs))
    left: list[Tensor] = []
    for _ in range(steps):
        if graph:
            yield inputs, targets
            continue
        if not left:
            left = list(torch.randperm(len(inputs), generator=order)[: len(inputs) // size * size].split(size))
        chosen = left.pop().to(inputs.device)
        yield inputs[chosen], targets[chosen]
