"""Progress through cells, or other pieces of work: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from curvlab.tools.text import duration

SECONDS_BETWEEN_LINES = 5.0

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
    else:
        yield _lines(console, costs)


def _lines(console: Console, costs: Mapping[Any, float]) -> Advance:
    """A line for the first and the last cell, for one in trouble, and otherwise one every few seconds.

    The time left follows from the pace since the first cell, before which everything has to get going.
    """
    start = time.monotonic()
    total = sum(costs.values())
    done, spent = 0, 0.0
    first_elapsed, first_spent = 0.0, 0.0
    printed = -SECONDS_BETWEEN_LINES

    def advance(cell: Hashable, outcome: str, trouble: bool) -> None:
        nonlocal done, spent, printed, first_elapsed, first_spent
        done += 1
        spent += costs[cell]
        elapsed = time.monotonic() - start
        if done == 1:
            first_elapsed, first_spent = elapsed, spent
        if done < len(costs) and elapsed - printed < SECONDS_BETWEEN_LINES and not trouble:
            return
        printed = elapsed
        left = ""
        if done < len(costs) and spent > first_spent:
            pace = (elapsed - first_elapsed) / (spent - first_spent)
            left = f"; {duration(pace * (total - spent))} left"
        say(console, f"[{done}/{len(costs)}] {cell}: {outcome}{left}")

    return advance
