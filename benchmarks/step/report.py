"""The steps as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.step.methods import METHODS
from benchmarks.step.runner import Entry
from benchmarks.tasks import TASKS
from curvlab.tools.text import size

LEGEND = (
    "Every: steps from one inversion to the next. Ms: the mean over whole periods of the median of each kind of step. "
    "÷ SGD: over gradient descent with momentum, timed in turns. Counted: the same ratio of the multiply-adds that the "
    "steps need. Share: the first over the second. ÷ curvlab: ÷ SGD over that of curvlab's K-FAC. Memory: the peak of "
    "the first two steps beyond what was held before. Error: for K-FAC the direction after 3 steps with exact rows on 32 "
    "samples, biases frozen, against curvlab's, where both approximate the same; in dual form the residual of the system "
    "that it solves, with exact rows or empirical ones. Loss: before the first and after the last step."
)


def heading(entries: Sequence[Entry]) -> str:
    """Say what was trained, and on what."""
    request = entries[0].request
    return f"Training step of a {TASKS[request.task].title}, {tables.setting(request, request.samples)}"


def table(entries: Sequence[Entry], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out the steps of one task on one batch."""
    numbers = ["every", "ms", "÷ SGD", "counted", "share", "÷ curvlab", "memory", "error", "loss"]
    made = tables.empty(style, ["step"], numbers)
    for entry in entries:
        method = METHODS[entry.request.method]
        made.add_row(method.title, str(entry.request.interval) if method.inverts else "", *_cells(entry))
    return made


def _cells(entry: Entry) -> list[str]:
    measured = entry.measurement
    if measured.outcome != "done":
        return [measured.outcome]
    before, after = measured.losses
    return [
        f"{1000 * measured.seconds:.3g}",
        f"{measured.ratio:.2f}",
        f"{measured.counted:.2f}",
        f"{measured.ratio / measured.counted:.2f}",
        "" if entry.slower is None else f"{entry.slower:.2f}×",
        size(measured.peak_bytes),
        "" if entry.error is None else f"{entry.error:.1e}",
        f"{before:.3f} → {after:.3f}",
    ]


def notes(entries: Sequence[Entry]) -> list[str]:
    """Say what stopped a method."""
    return tables.stopped((METHODS[entry.request.method].title, entry.measurement) for entry in entries)


def save(path: Path, comparisons: Sequence[Sequence[Entry]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [[asdict(entry) for entry in entries] for entries in comparisons]
    sections = ((heading(entries), table(entries, box.MARKDOWN), notes(entries)) for entries in comparisons)
    tables.save(path, environment, measurements, sections, LEGEND)
