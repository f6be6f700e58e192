"""A time by which work is to end."""

from __future__ import annotations

import time

from curvlab.tools.text import duration


class OutOfTime(Exception):
    """The deadline has passed."""


class Deadline:
    """So many seconds from now on; never if None.

    Raises:
        ValueError: they are no number above 0.
    """

    def __init__(self, seconds: float | int | None) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"seconds is a number above 0, or None for no limit, got {seconds}.")
        self.seconds, self._start = seconds, time.monotonic()

    def passed(self, share: float = 1.0) -> bool:
        """Whether the seconds are over, or a share of them."""
        return self.seconds is not None and time.monotonic() - self._start >= share * self.seconds

    def check(self) -> None:
        """Raise `OutOfTime` if the seconds are over."""
        if self.passed():
            raise OutOfTime

    @property
    def over(self) -> str:
        """What to say of work that was not begun for lack of time."""
        return f"no time was left of the {self}"

    def __str__(self) -> str:
        return "no limit" if self.seconds is None else duration(self.seconds)
