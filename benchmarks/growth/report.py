"""Exponents of growth as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.fits import exponent
from benchmarks.growth.methods import QUANTITIES
from benchmarks.growth.worker import Measurement, Request

LEGEND = (
    "Exponents: slopes of log cost against log size over the larger half of the values, at least three, ± standard error. "
    "Counted: that of the multiply-adds that the factored form needs, at the same values. Rows of the ReLU network are R = N·C, so "
    "that both samples and outputs make R grow; parameters grow as width² and as depth."
)


@dataclass(frozen=True)
class Line:
    """What was asked, and what came of it."""

    request: Request
    measurement: Measurement


def heading(lines: Sequence[Line]) -> str:
    """Say what grew, and on what it was measured."""
    request = lines[0].request
    quantity = QUANTITIES[request.quantity]
    return f"{quantity.title} of {quantity.size}; {tables.computed(request)}"


def table(lines: Sequence[Line], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out one quantity, by axis and method."""
    made = tables.empty(style, ["grows", "method"], ["values", "ms", "exponent", "counted", "of memory"])
    for axis in QUANTITIES[lines[0].request.quantity].axes:
        for line in lines:
            if line.request.axis == axis:
                made.add_row(axis, line.request.method, *_cells(line))
    return made


def _cells(line: Line) -> list[str]:
    measured = line.measurement
    if measured.outcome != "done":
        return [measured.outcome]
    values = [float(value) for value in line.request.values[: len(measured.seconds)]]
    ms = [f"{1000 * s:.3g}" for s in (measured.seconds[0], measured.seconds[-1])]
    return [
        f"{values[0]:g} … {values[-1]:g}",
        " … ".join(ms),
        _fitted(values, measured.seconds, error=True),
        _fitted(values, measured.counted),
        _fitted(values, measured.peak_bytes),
    ]


def _fitted(values: Sequence[float], costs: Sequence[float], *, error: bool = False) -> str:
    found = exponent(values, costs)
    if found is None:
        return "–"
    return f"{found.slope:.2f} ± {found.error:.2f}" if error else f"{found.slope:.2f}"


def notes(lines: Sequence[Line]) -> list[str]:
    """Say what stopped a method."""
    return tables.stopped((f"{line.request.method}, {line.request.axis}", line.measurement) for line in lines)


def save(path: Path, quantities: Sequence[Sequence[Line]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [[asdict(line) for line in lines] for lines in quantities]
    sections = ((heading(lines), table(lines, box.MARKDOWN), notes(lines)) for lines in quantities)
    tables.save(path, environment, measurements, sections, LEGEND)
