"""Progress through cells, or other pieces of work: a bar on a terminal or in a notebook, lines elsewhere, none when quiet."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from math import inf
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from curvlab.tools.text import duration

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_PAGES = 0.2

Advance = Callable[[Hashable, str, bool], None]
"""Called after each cell, shown by its `str`, with what became of it and whether that is trouble, which is always shown."""


def say(console: Console, text: str) -> None:
    """Print a line as it is, without markup, colours or wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console, costs: Mapping[Any, float], quiet: bool, *, unit: str = "cells") -> Iterator[Advance]:
    """Report the progress on ``console`` through cells that are expected to take ``costs`` (in any unit).

    Whatever can be told apart and shown by its `str` will do for a cell; ``unit`` says what they are called.
    """
    if quiet:
        yield lambda cell, outcome, trouble: None  # noqa: ARG005
    elif console.is_terminal:
        columns = (
            BarColumn(),
            TextColumn("{task.fields[done]} of {task.fields[cells]} " + unit + ","),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.description}", markup=False),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=sum(costs.values()), done=0, cells=len(costs))

            def advance(cell: Hashable, outcome: str, trouble: bool) -> None:
                bar.update(task, advance=costs[cell], description=str(cell), done=bar.tasks[0].fields["done"] + 1)
                if trouble:
                    say(console, f"{cell}: {outcome}")

            yield advance
    elif console.is_jupyter:
        yield _page(console, costs, unit)
    else:
        yield _lines(console, costs)


class _Pace:
    """What is done, and how long the rest takes at the pace since the first cell, before which everything has to get going."""

    def __init__(self, costs: Mapping[Any, float]) -> None:
        self.costs, self.total = costs, sum(costs.values())
        self.done, self.spent, self.elapsed = 0, 0.0, 0.0
        self._start, self._reported = time.monotonic(), -inf
        self._first = (0.0, 0.0)

    def add(self, cell: Hashable, every: float, *, at_once: bool = False) -> bool:
        """Count a cell as done; returns whether to report that: of the last one, if asked, and once in so many seconds."""
        self.done += 1
        self.spent += self.costs[cell]
        self.elapsed = time.monotonic() - self._start
        if self.done == 1:
            self._first = (self.elapsed, self.spent)
        reports = at_once or self.done == len(self.costs) or self.elapsed - self._reported >= every
        if reports:
            self._reported = self.elapsed
        return reports

    @property
    def left(self) -> str:
        """The time left, after a semicolon; empty where there is none, and where it is not known."""
        elapsed, spent = self._first
        if self.done == len(self.costs) or self.spent <= spent:
            return ""
        return f"; {duration((self.elapsed - elapsed) / (self.spent - spent) * (self.total - self.spent))} left"


def _lines(console: Console, costs: Mapping[Any, float]) -> Advance:
    """A line for the first and the last cell, for one in trouble, and otherwise one every few seconds."""
    pace = _Pace(costs)

    def advance(cell: Hashable, outcome: str, trouble: bool) -> None:
        if pace.add(cell, SECONDS_BETWEEN_LINES, at_once=trouble):
            say(console, f"[{pace.done}/{len(costs)}] {cell}: {outcome}{pace.left}")

    return advance


def _page(console: Console, costs: Mapping[Any, float], unit: str) -> Advance:
    """A bar below the cell of a notebook, drawn anew in its place; rich's own needs widgets."""
    from IPython.display import HTML, display  # IPython is there in notebooks alone

    pace = _Pace(costs)
    bar = display(HTML(""), display_id=True)

    def advance(cell: Hashable, outcome: str, trouble: bool) -> None:
        if trouble:
            say(console, f"{cell}: {outcome}")
        if pace.add(cell, SECONDS_BETWEEN_PAGES):
            text = escape(f"{pace.done} of {len(costs)} {unit}{pace.left}: {cell}")
            bar.update(HTML(f'<progress value="{pace.spent}" max="{pace.total}"></progress> {text}'))

    return advance
