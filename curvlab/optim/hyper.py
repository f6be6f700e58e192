"""Hyper-parameters: a number, or a function of the step; checked when they are set and whenever they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, isnan

Schedule = float | Callable[[int], float]
"""A value, or a function of the number of steps taken."""

Interval = int | Callable[[int], int]
"""A number of steps, or a function of the number of steps taken that returns one."""


@dataclass
class Present:
    """A schedule that is set from outside; 0 before that."""

    value: float

    def __call__(self, step: int) -> float:  # noqa: ARG002, D102
        return 0.0 if isnan(self.value) else self.value


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter and the range that it must lie in.

    Attributes:
        name: as the user writes it.
        value: the number or the schedule.
        low: smallest value.
        high: largest value.
        open_low: whether `low` itself is excluded.
    """

    name: str
    value: Schedule
    low: float = 0.0
    high: float = inf
    open_low: bool = False

    def __post_init__(self) -> None:
        if not callable(self.value):
            self._check(self.value)

    def at(self, step: int) -> float:
        """Return the value at a step.

        Raises:
            ValueError: if it is out of range; names the hyper-parameter.
        """
        if not callable(self.value):
            return float(self.value)
        value = self.value(step)
        self._check(value, f" at step {step}")
        return float(value)

    def _check(self, value: object, when: str = "") -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not number or not self.low <= value <= self.high or (self.open_low and value == self.low):  # type: ignore[operator]
            bracket = "(" if self.open_low else "["
            raise ValueError(
                f"{self.name} is a number in {bracket}{self.low:g}, {self.high:g}], or a function of the step that "
                f"returns one, got {value!r}{when}."
            )


@dataclass(frozen=True)
class Every:
    """A hyper-parameter that is a number of steps."""

    name: str
    value: Interval

    def __post_init__(self) -> None:
        if not callable(self.value):
            whole(self.name, self.value)

    def at(self, step: int) -> int:
        """Return the value at a step.

        Raises:
            ValueError: if it is no whole number ≥ 1; names the hyper-parameter.
        """
        return whole(self.name, self.value(step), f" at step {step}") if callable(self.value) else self.value


def whole(name: str, value: object, when: str = "") -> int:
    """Return a whole number ≥ 1; raises `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number ≥ 1, got {value!r}{when}.")
    return value
