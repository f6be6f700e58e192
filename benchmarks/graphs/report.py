"""Costs against sizes as a table with fitted exponents, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import fits, tables
from benchmarks.graphs.methods import CLASSES, FEATURES, HIDDEN, METHODS
from benchmarks.graphs.worker import Measurement, Request
from curvlab.tools.text import size

LEGEND = (
    "Memory: the peak of a call beyond what was held before. Exponent: the slope of log cost against log size over the "
    "larger half of the sizes, at least three; 0 where a cost does not grow, below the order where a constant part is left."
)


@dataclass(frozen=True)
class Entry:
    """One line: what was asked, and what came of it."""

    request: Request
    measurement: Measurement


@dataclass(frozen=True)
class Sweep:
    """A method at several values of one size; no size for a published graph.

    Attributes:
        title: what varies.
        size: the field of the request that varies, "" for none.
        entries: by method and value.
    """

    title: str
    size: str
    entries: tuple[Entry, ...]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """Return the slope of log cost over log size; see `fits.exponent`."""
    fitted = fits.exponent(sizes, costs)
    return None if fitted is None else fitted.slope


def heading(sweep: Sweep) -> str:
    """Say what varies, and on what it was measured."""
    request = sweep.entries[0].request
    network = f"{FEATURES}-{HIDDEN}-{CLASSES}" if sweep.size else f"500-{HIDDEN}-3"
    return f"{sweep.title}: graph convolutional network {network}, {tables.computed(request)}"


def table(sweep: Sweep, style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out one sweep; a method's last line has its exponents."""
    made = tables.empty(style, ["method"], ["nodes", "edges", "labelled", "seconds", "memory"])
    for name, method in METHODS.items():
        entries = [entry for entry in sweep.entries if entry.request.method == name]
        for entry in entries:
            made.add_row(method.title, *_cells(entry.measurement))
        done = [entry for entry in entries if entry.measurement.outcome == "done"]
        if sweep.size and done:
            made.add_row(f"{method.title}, exponent", "", "", "", *exponents(sweep.size, done))
    return made


def exponents(size: str, entries: Sequence[Entry]) -> list[str]:
    """Return the exponents of time and memory in words."""
    costs: tuple[Callable[[Measurement], float], ...] = (lambda m: m.median, lambda m: float(m.peak_bytes))
    sizes = [float(getattr(entry.request, size)) for entry in entries]
    fitted = [exponent(sizes, [cost(entry.measurement) for entry in entries]) for cost in costs]
    return ["–" if value is None else f"{value:.2f}" for value in fitted]


def _cells(measured: Measurement) -> list[str]:
    if measured.outcome != "done":
        return ["", "", "", measured.outcome, ""]
    return [*(str(number) for number in measured.sizes), f"{measured.median:.4g}", size(measured.peak_bytes)]


def notes(sweep: Sweep) -> list[str]:
    """Say what stopped a method."""
    return tables.stopped((METHODS[entry.request.method].title, entry.measurement) for entry in sweep.entries)


def save(path: Path, sweeps: Sequence[Sweep], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    measurements = [asdict(sweep) for sweep in sweeps]
    sections = ((heading(sweep), table(sweep, box.MARKDOWN), notes(sweep)) for sweep in sweeps)
    tables.save(path, environment, measurements, sections, LEGEND)
