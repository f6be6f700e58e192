"""Costs beside those of a forward and backward pass, as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.language.methods import METHODS
from benchmarks.language.models import SHAPES
from benchmarks.language.worker import Measurement, Request
from curvlab.tools.text import size

LEGEND = (
    "Ratio: the time over that of a forward and backward pass. First: the same of the first call on a model, which looks for "
    "layers that samples share and compares rows with gradients. Memory: the peak of a later call beyond what was held before, and "
    "as a multiple of that of a forward and backward pass."
)


@dataclass(frozen=True)
class Entry:
    """One line: what was asked, and what came of it."""

    request: Request
    measurement: Measurement


def heading(entries: Sequence[Entry]) -> str:
    """Say on what it was measured."""
    request = entries[0].request
    return f"Decoder of {SHAPES[request.model]}, {tables.computed(request)}"


def table(entries: Sequence[Entry], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out one decoder; the first entry is what the others are compared with."""
    made = tables.empty(style, ["method"], ["seconds", "ratio", "first", "memory", "× memory"])
    reference = entries[0].measurement
    for entry in entries:
        made.add_row(METHODS[entry.request.method].title, *_cells(entry.measurement, reference))
    return made


def _cells(measured: Measurement, reference: Measurement) -> list[str]:
    if measured.outcome != "done":
        return [measured.outcome]
    ratios = [seconds / reference.median for seconds in (measured.median, measured.first)] if reference.seconds else []
    shown = [f"{ratio:.2f}×" for ratio in ratios] or ["–", "–"]
    memory = f"{measured.peak_bytes / reference.peak_bytes:.2f}×" if reference.peak_bytes else "–"
    return [f"{measured.median:.4g}", *shown, size(measured.peak_bytes), memory]


def notes(entries: Sequence[Entry]) -> list[str]:
    """Say what stopped a method."""
    return tables.stopped((METHODS[entry.request.method].title, entry.measurement) for entry in entries)


def save(path: Path, models: Sequence[Sequence[Entry]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [[asdict(entry) for entry in entries] for entries in models]
    sections = ((heading(entries), table(entries, box.MARKDOWN), notes(entries)) for entries in models)
    tables.save(path, environment, measurements, sections, LEGEND)
