"""The comparison as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.process import Timed
from benchmarks.runner import Entry
from benchmarks.structures.methods import QUANTITIES, TITLES
from benchmarks.structures.tasks import TASKS
from benchmarks.structures.worker import Request

Line = Entry[Request, Timed]

LEGEND = (
    "Ratio: the time over curvlab's. Memory: the peak beyond what was held before. Error: of the solution or response "
    "against curvlab's; draws differ, so what depends on them is not compared. For K-FAC and EKFAC only Linear and Conv2d "
    "are trained, damping of K-FAC is split over the factors, a bias belongs to its weight. No library has the responses: "
    "curvlinops, nngeometry and torch.func give the rows of J, and plain torch does the rest on the smaller side of every "
    "layer or unit; nngeometry PMatBlockDiag forms [P_l, P_l]."
)


def heading(lines: Sequence[Line]) -> str:
    """Say what was computed, and on what."""
    request = lines[0].request
    title = QUANTITIES[request.quantity].title
    return f"{title}: {TASKS[request.task].title}, {tables.setting(request, request.samples)}"


def table(lines: Sequence[Line], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out one quantity of one task; the first line is what the others are compared with."""
    made = tables.empty(style, ["method"], ["seconds", "ratio", "memory", "error"])
    for line in lines:
        made.add_row(TITLES[line.request.method], *tables.cells(line.measurement, lines[0].measurement, line.error))
    return made


def notes(lines: Sequence[Line]) -> list[str]:
    """Say what stopped a method."""
    return tables.stopped((TITLES[line.request.method], line.measurement) for line in lines)


def save(path: Path, comparisons: Sequence[Sequence[Line]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [[asdict(line) for line in lines] for lines in comparisons]
    sections = ((heading(lines), table(lines, box.MARKDOWN), notes(lines)) for lines in comparisons)
    tables.save(path, environment, measurements, sections, LEGEND)
