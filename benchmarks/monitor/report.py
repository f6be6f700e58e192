"""Shares of time and steps of detection as tables, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.monitor.courses import COURSES, SHOWS, SMOOTH, CourseName, Followed

LEGEND = (
    "Share: seconds of the monitor a second of training, by the clock of the loop. Told: the step of the first event 'at the "
    f"edge'. Shown: the step at which the mean loss of {SMOOTH} steps is {SHOWS:g} times its lowest so far, or is not finite."
)


@dataclass(frozen=True)
class Line:
    """A run, with what was asked for.

    Attributes:
        course: which problem.
        seed: of the run.
        ramp: by how much the learning rate grew, 1 for a constant one.
        budget: of the monitor.
        found: what came of it.
    """

    course: CourseName
    seed: int
    ramp: float
    budget: float
    found: Followed

    @property
    def wrong(self) -> bool:
        """Whether the share is above the budget, or an instability that the loss shows was not told before."""
        told = self.found.told.get("at the edge")
        late = self.ramp != 1 and self.found.shown is not None and (told is None or told >= self.found.shown)
        return self.found.overhead > self.budget or late


def shares(lines: Sequence[Line], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out the runs at a constant learning rate."""
    made = tables.empty(style, ["problem", "optimiser"], ["steps", "ms a step", "share", "measurements", "at the edge"])
    made.add_column("of each quantity")
    for line in lines:
        found = line.found
        made.add_row(
            line.course,
            COURSES[line.course].title,
            str(found.steps),
            f"{1000 * found.seconds / found.steps:.3g}",
            f"{found.overhead:.2%}",
            str(sum(found.measured.values())),
            _step(found.told.get("at the edge")),
            ", ".join(f"{name} {number}" for name, number in found.measured.items()),
        )
    return made


def detections(lines: Sequence[Line], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out the runs at a growing learning rate."""
    made = tables.empty(style, ["problem", "seed"], ["steps", "share", "measurements", "told", "shown", "before"])
    for line in lines:
        found = line.found
        told, shown = found.told.get("at the edge"), found.shown
        made.add_row(
            line.course,
            str(line.seed),
            str(found.steps),
            f"{found.overhead:.2%}",
            str(sum(found.measured.values())),
            _step(told),
            _step(shown),
            str(shown - told) if told is not None and shown is not None else "–",
        )
    return made


def notes(lines: Sequence[Line]) -> list[str]:
    """Say what was left out."""
    left = {f"{line.course}: {name} ({why})" for line in lines for name, why in line.found.reasons.items()}
    return sorted(left)


def _step(step: int | None) -> str:
    return "–" if step is None else str(step)
