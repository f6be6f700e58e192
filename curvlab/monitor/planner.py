"""When to measure what, so that at most a given share of the training time goes into it.

    credit of a quantity  =  its part of the budget · seconds of training  −  seconds that it took so far
    balance               =  budget · seconds of training  −  seconds that all of the monitor took so far

A quantity is due when its credit and the balance both cover what it is expected to cost: what it took at most in its last two
measurements. Before the first that is the forward and backward passes that it states, at the present time of a step; the first
one, which allocates and compiles, is paid for, and foretells nothing unless it took less. The credit has to cover that and half
as much again. So the share goes above the budget only where a measurement takes longer still, by what it takes beyond that, and
what was overdrawn is paid back before the next one.

The work of planning is on the balance, too. Most calls pass without a look at the plan, and count at a fixed price; the next look
comes at half of the time until anything may be due, and later where steps are fast: looks at each of them would take all of the
budget, and nothing would ever be due.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol, runtime_checkable

from curvlab.errors import unknown_name

WARM_UP = 2
"""First steps that do not count: they allocate, tune and compile."""
PAUSE = 1.0
"""Steps that take more than twice their mean length, and this longer (unit: seconds), had a validation, a checkpoint or a break
between them, the rest of which does not count."""
MARGIN = 1.5
"""Credit that a measurement needs, over what it is expected to cost."""
UNSEEN = 100
"""Steps that may pass without a look at the plan, at most."""
PASSING = 3e-7
"""Seconds of a call without a look at the plan: counted so, as reading a clock would take longer than the call."""
LOOKS = 0.1
"""Part of the budget that looks at the plan may take, as long as that needs no more than `UNSEEN` steps between them."""


@runtime_checkable
class Plan(Protocol):
    """Says which quantities are due."""

    @property
    def trained(self) -> float:
        """Seconds of training that count."""

    @property
    def spent(self) -> float:
        """Seconds of the monitor."""

    def earn(self, seconds: float, steps: int = 1) -> None:
        """Count training steps of so many seconds together."""

    def rest(self) -> int:
        """Return a number of steps from now on in which nothing will be due."""

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
        taken: seconds of the last measurements, up to two and without the first; that of the first alone before there are others.
        measured: number of measurements.
    """

    weight: float
    passes: float
    spent: float = 0.0
    taken: tuple[float, ...] = ()
    measured: int = 0

    def add(self, seconds: float) -> None:
        """Count a measurement."""
        self.spent += seconds
        self.measured += 1
        self.taken = (*(self.taken[-1:] if self.measured > 2 else ()), seconds)

    def cost(self, step_seconds: float) -> float:
        """Return the seconds that the next measurement is expected to take."""
        stated = self.passes * step_seconds
        if not self.taken:
            return stated
        return min(stated, self.taken[0]) if self.measured == 1 else max(self.taken)


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
        self._look = 0.0  # seconds of the last one

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

    def earn(self, seconds: float, steps: int = 1) -> None:
        """Count training steps; the first ones and long pauses do not count."""
        if self._skipped < WARM_UP:
            self._skipped += steps
            return
        if self.steps:
            usual = steps * self.step_seconds
            seconds = min(seconds, usual + max(usual, PAUSE))
        self._trained += seconds
        self._spent += PASSING * (steps - 1)
        self.steps += steps

    def rest(self) -> int:
        """Return the steps that half of the time until anything may be due will take, or those that pay for a look."""
        if not self._trained:
            return 0
        self._wake = min(map(self._due_at, self._accounts.values()), default=inf)
        seconds = max((self._wake - self._trained) / 2, self._look / (LOOKS * self.share))
        return int(min(UNSEEN, seconds / self.step_seconds))

    def due(self, name: str | None = None, ahead: int = 0) -> bool:  # noqa: ARG002
        """Whether the credit of a quantity and the balance cover its next measurement."""
        if name is None:
            return self.steps > 0 and self._trained >= self._wake
        if name not in self._accounts:
            raise unknown_name("quantity", name, self._accounts)
        return self.steps > 0 and self._trained >= self._due_at(self._accounts[name])

    def spend(self, seconds: float, name: str | None = None) -> None:
        """Count what a measurement took."""
        self._spent += seconds
        if name is None:
            self._look = seconds
        else:
            self._accounts[name].add(seconds)

    def drop(self, name: str) -> None:
        """Leave what a quantity would have had to the others."""
        self._accounts.pop(name, None)
        self._wake = 0.0

    def _due_at(self, account: _Account) -> float:
        """Seconds of training after which a quantity is due."""
        cost = MARGIN * account.cost(self.step_seconds)
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

    def earn(self, seconds: float, steps: int = 1) -> None:
        """Count training steps."""
        self.trained += seconds
        self.steps += steps

    def rest(self) -> int:
        """Return 0: every step is looked at."""
        return 0

    def due(self, name: str | None = None, ahead: int = 0) -> bool:  # noqa: ARG002
        """Whether it is that step."""
        step = self.steps + ahead
        return step > 0 and step % self.every == 0

    def spend(self, seconds: float, name: str | None = None) -> None:  # noqa: ARG002
        """Count what a measurement took."""
        self.spent += seconds

    def drop(self, name: str) -> None:
        """Plan without a quantity, which changes nothing for the others."""
