"""Real steps from the present weights: at which learning rates does the loss fall, once and several times in a row?

    θ ← θ − η d

Directions d come from anywhere: of a structure as in `compare`, or a plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf, isfinite, isnan, nan

from torch import Tensor

from curvlab.compare.batches import Batches
from curvlab.compare.landscape import Landscape, Weights, moved

HALVINGS = 14
"""Learning rates of a trial: from the first one down to 2⁻¹³ of it."""
BEYOND = 2
"""Halvings that a trial goes on for after the loss of the second batch has fallen most."""

Direction = Callable[[Weights], Weights | None]
"""Returns d at some weights; None where there is none, as linear algebra fails there."""


@dataclass(frozen=True)
class RealStep:
    """What one real step did.

    Attributes:
        rate: η.
        batch: loss of the batch after it.
        second: loss of the second batch after it; not a number if there is none.
        predicted: decrease of the batch's loss in the quadratic model, `η g·d − ½ η² dᵀGd`.
    """

    rate: float
    batch: float
    second: float
    predicted: float


@dataclass(frozen=True)
class Trial:
    """Real steps along one direction, each from the same weights.

    Attributes:
        start: loss of the batch before the steps.
        second: loss of the second batch before them; not a number if there is none.
        steps: one a learning rate, from the largest to the smallest, each half of the one before.
    """

    start: float
    second: float
    steps: tuple[RealStep, ...]

    @property
    def eta_batch(self) -> float:
        """Largest rate such that the loss of the batch falls at it and at all smaller ones that were tried; 0 if there is none."""
        return _largest_falling([(step.rate, step.batch < self.start) for step in self.steps])

    @property
    def eta_second(self) -> float:
        """As `eta_batch`, of the second batch; not a number if there is none."""
        if not self.has_second:
            return nan
        return _largest_falling([(step.rate, step.second < self.second) for step in self.steps])

    @property
    def has_second(self) -> bool:
        """Whether there was a second batch."""
        return not isnan(self.second)

    def fall(self, step: RealStep) -> float:
        """Return by how much the loss of the second batch fell in a step, that of the batch itself if there is no second one."""
        after, before = (step.second, self.second) if self.has_second else (step.batch, self.start)
        return before - after if isfinite(after) else -inf

    def best(self, limit: float) -> RealStep | None:
        """Return the step of the largest `fall` at rates up to a limit; None if the loss rises at all of them."""
        falling = [step for step in self.steps if step.rate <= limit and self.fall(step) > 0]
        return max(falling, key=self.fall, default=None)

    def ratio(self, step: RealStep) -> float:
        """Return the real decrease of the batch's loss over the predicted one; not a number if none is predicted."""
        return (self.start - step.batch) / step.predicted if step.predicted > 0 else nan


def trial(
    landscape: Landscape, batches: Batches, direction: Mapping[str, Tensor], slope: float, curvature: float, top: float
) -> Trial:
    """Take one real step at every learning rate of a grid, each from the present weights.

    Args:
        landscape: the loss.
        batches: the batch whose quadratic model is meant, and the second one.
        direction: d, which steps subtract.
        slope: g·d, of the batch's gradient.
        curvature: dᵀGd, of the batch's generalised Gauss-Newton matrix.
        top: the largest rate; the others are halves of it, a quarter, …, until the second batch's loss falls less and less.

    Cost: at most 15 forward passes a batch.
    """
    start = landscape.value(landscape.here, batches.first)
    second = nan if batches.second is None else landscape.value(landscape.here, batches.second)
    found = Trial(start, second, ())
    for k in range(HALVINGS):
        rate = top / 2**k
        there = moved(landscape.here, direction, rate)
        step = RealStep(
            rate,
            landscape.value(there, batches.first),
            nan if batches.second is None else landscape.value(there, batches.second),
            rate * slope - rate**2 * curvature / 2,
        )
        found = replace(found, steps=(*found.steps, step))
        best = found.best(inf)
        if best is not None and found.eta_batch > 0 and rate <= best.rate / 2**BEYOND:
            break
    return found


def repeated(
    landscape: Landscape,
    batches: Batches,
    first: Weights,
    direction: Direction,
    rate: float,
    steps: int,
    momentum: float = 0.0,
) -> tuple[float, ...]:
    """Take real steps in a row on the batch, and return its losses, until one is above the first.

    Args:
        landscape: the loss.
        batches: of which the first is stepped on.
        first: the direction at the present weights, at hand.
        direction: returns it at other weights; the row ends where there is none.
        rate: η.
        steps: how many.
        momentum: β of `v ← β v + d`, `θ ← θ − η v`.

    Cost: a direction and a forward pass a step.
    """
    here, velocity = landscape.here, first
    losses = [landscape.value(here, batches.first)]
    for step in range(steps):
        if step > 0:
            d = direction(here)
            if d is None:
                break
            velocity = {name: momentum * v + d[name] for name, v in velocity.items()} if momentum else d
        here = moved(here, velocity, rate)
        losses.append(landscape.value(here, batches.first))
        if not losses[-1] <= losses[0]:
            break
    return tuple(losses)


def held(losses: tuple[float, ...], steps: int) -> bool:
    """Whether a row of steps went to its end without a loss above the first, and ended below it."""
    return len(losses) == steps + 1 and losses[-1] < losses[0]


def largest(holds: Callable[[float], bool], rates: Iterable[float]) -> float:
    """Return the first rate that holds, 0 if none does."""
    return next((rate for rate in rates if holds(rate)), 0.0)


def _largest_falling(falls: list[tuple[float, bool]]) -> float:
    """Return the largest of the rates at the end of a list that all fall; 0 if the last does not."""
    last = list(takewhile(lambda entry: entry[1], reversed(falls)))
    return last[-1][0] if last else 0.0
