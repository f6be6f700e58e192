"""The comparison as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.peers import METHODS
from benchmarks.runner import Entry
from benchmarks.tasks import TASKS
from benchmarks.worker import Measurement, Request

Line = Entry[Request, Measurement]

LEGEND = (
    "Ratio: the time over that of the first line. Memory: the peak beyond what was held before. Rate: the multiply-adds of the "
    "factored form a second, relative to matrix products of these sizes. Once: the same without the halves of symmetric "
    "products that mirror the others, which no implementation has to compute."
)


def heading(entries: Sequence[Line]) -> str:
    """Say what one task computed, and on what."""
    request = entries[0].request
    return f"Gram matrix of a {TASKS[request.task].title}, {tables.setting(request, request.samples)}"


def table(entries: Sequence[Line], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out one task; the first entry is what the others are compared with."""
    made = tables.empty(style, ["method"], ["seconds", "ratio", "memory", "error", "rate", "once"])
    for entry in entries:
        measured = entry.measurement
        rates = measured.rates if measured.outcome == "done" else ()
        cells = tables.cells(measured, entries[0].measurement, entry.error)
        made.add_row(METHODS[entry.request.method].title, *cells, *(f"{rate:.0%}" for rate in rates))
    return made


def notes(entries: Sequence[Line]) -> list[str]:
    """Say what stopped a method, and at which rate the machine multiplies matrices."""
    lines = tables.stopped((METHODS[entry.request.method].title, entry.measurement) for entry in entries)
    rates = [entry.measurement.matmul_rate for entry in entries if entry.measurement.matmul_rate is not None]
    if rates:
        lines.append(f"Matrix products ran at {2e-9 * min(rates):.1f} to {2e-9 * max(rates):.1f} GFLOP/s.")
    return lines


def save(path: Path, comparisons: Sequence[Sequence[Line]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [[asdict(entry) for entry in entries] for entries in comparisons]
    sections = ((heading(entries), table(entries, box.MARKDOWN), notes(entries)) for entries in comparisons)
    tables.save(path, environment, measurements, sections, LEGEND)
