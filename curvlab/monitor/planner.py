"""When to measure what, so that at most a given share of the training time goes into it.

    credit of a quantity  =  its part of the budget · seconds of training  −  seconds that it took so far
    balance               =  budget · seconds of training  −  seconds that all of the monitor took so far

A quantity is due when its credit and the balance both cover what it is expected to cost: what it took at most in its last two
measurements or, before the first, the forward and backward passes that it states, at the present time of a step. So the share
goes above the budget by at most what a measurement takes beyond that, and what was overdrawn is paid back before the
next one. The work of planning is on the balance, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol, runtime_checkable

from curvlab.errors import unknown_name

WARM_UP = 2
"""First steps that do not count: they allocate, tune and compile."""
PAUSE = 10.0
"""A step that takes so many times the mean counts as one of mean length: it was a validation, a checkpoint or a break."""


@runtime_checkable
class Plan(Protocol):
    """Says which quantities are due."""

    @property
    def trained(self) -> float:
        """Seconds of training that count."""

    @property
    def spent(self) -> float:
        """Seconds of the monitor."""

    def earn(self, seconds: float) -> None:
        """Count a training step of so many seconds."""

    def due(self, name: str | None = None, ahead: int = 0) -> bool:
        """Whether a quantity is to be measured in this step, or so many steps ahead; whether any may be, if None."""

    def spend(self, seconds: float, name: str | None = None) -> None:
        """Count what a measurement of a quantity took, or what was not for any."""

    def drop(self, name: str) -> None:
        """Plan without a quantity."""


@dataclass
class _Account:
    """What a quantity may take and has taken.

    Attributes:
        weight: its part of the budget, beside the weights of others.
        passes: forward and backward passes that its first measurement takes at most.
        spent: seconds of all measurements.
        last: seconds of the last measurement, None before the first.
        cost: seconds that the next one is expected to take, once there was one.
    """

    weight: float
    passes: float
    spent: float = 0.0
    last: float | None = None
    cost: float = 0.0


class Budget:
    """The plan that keeps measurements within a share of the training time.

    Args:
        share: seconds of measurements a second of training, above 0 and at most 1.
        weights: each quantity's part of the budget, by name.
        passes: forward and backward passes that the first measurement of each takes at most.

    Raises:
        ValueError: for a share or a weight out of range.
    """

    def __init__(self, share: float, weights: Mapping[str, float], passes: Mapping[str, float]) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"budget is a share of the training time, above 0 and at most 1, got {share!r}.")
        for name, weight in weights.items():
            if not 0 < weight < inf:
                raise ValueError(f"The weight of the quantity {name!r} is a number above 0, got {weight!r}.")
        self.share = share
        self._trained = self._spent = 0.0
        self.steps = 0
        self._skipped = 0
        self._accounts = {name: _Account(weights[name], passes[name]) for name in weights}
        self._wake = 0.0

    @property
    def trained(self) -> float:
        """Seconds of training that count."""
        return self._trained

    @property
    def spent(self) -> float:
        """Seconds of the monitor."""
        return self._spent

    @property
    def step_seconds(self) -> float:
        """Mean time of a training step so far."""
        return self.trained / self.steps if self.steps else 0.0

    def earn(self, seconds: float) -> None:
        """Count a training step; the first ones and the length of pauses do not count."""
        if self._skipped < WARM_UP:
            self._skipped += 1
            return
        if self.steps and seconds > PAUSE * self.step_seconds:
            seconds = self.step_seconds
        self._trained += seconds
        self.steps += 1

    def due(self, name: str | None = None, ahead: int = 0) -> bool:  # noqa: ARG002
        """Whether the credit of a quantity and the balance cover its next measurement."""
        if name is None:
            return self.steps > 0 and self._trained >= self._wake
        if name not in self._accounts:
            raise unknown_name("quantity", name, self._accounts)
        due = self.steps > 0 and self.trained >= self._due_at(self._accounts[name])
        if not due:
            self._wake = min(map(self._due_at, self._accounts.values()), default=inf)
        return due

    def spend(self, seconds: float, name: str | None = None) -> None:
        """Count what a measurement took."""
        self._spent += seconds
        if name is not None:
            account = self._accounts[name]
            account.spent += seconds
            account.cost = seconds if account.last is None else max(seconds, account.last)
            account.last = seconds

    def drop(self, name: str) -> None:
        """Leave what a quantity would have had to the others."""
        self._accounts.pop(name, None)
        self._wake = 0.0

    def _due_at(self, account: _Account) -> float:
        """Seconds of training after which a quantity is due."""
        cost = account.passes * self.step_seconds if account.last is None else account.cost
        part = self.share * account.weight / sum(other.weight for other in self._accounts.values())
        return max((account.spent + cost) / part, (self.spent + cost) / self.share)


class Every:
    """The plan that measures everything after every so many steps, whatever it takes."""

    def __init__(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"every is a whole number of steps ≥ 1, got {steps!r}.")
        self.every = steps
        self.trained = self.spent = 0.0
        self.steps = 0

    def earn(self, seconds: float) -> None:
        """Count a training step."""
        self.trained += seconds
        self.steps += 1

    def due(self, name: str | None = None, ahead: int = 0) -> bool:  # noqa: ARG002
        """Whether it is that step."""
        step = self.steps + ahead
        return step > 0 and step % self.every == 0

    def spend(self, seconds: float, name: str | None = None) -> None:  # noqa: ARG002
        """Count what a measurement took."""
        self.spent += seconds

    def drop(self, name: str) -> None:
        """Plan without a quantity, which changes nothing for the others."""
