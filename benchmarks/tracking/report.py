"""The ways of tracking as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.tracking.methods import BLOCK, METHODS
from benchmarks.tracking.runner import Entry
from benchmarks.tracking.worker import TOP
from curvlab.tools.text import size

LEGEND = (
    "Seconds: all measurements of the run. Ratio: over the first line. Products: with single vectors. Residual: the largest "
    "‖Hx − θx‖/θ of any measurement, a bound on the relative error of θ. Error: the largest relative deviation of an "
    "eigenvalue from the first line's. Memory: the peak of the first measurement beyond what was held before."
)


def heading(entries: Sequence[Entry]) -> str:
    """Say what was followed, and on what."""
    request = entries[0].request
    return (
        f"Top {TOP} Hessian eigenvalues every {request.every} steps of gradient descent, η = {request.eta:g}, {request.steps} "
        f"steps, {request.images}, tanh MLP with two layers of {request.width}, {tables.setting(request, request.samples)}"
    )


def table(entries: Sequence[Entry], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out the methods; the first entry is what the others are compared with."""
    made = tables.empty(style, ["method"], ["seconds", "ratio", "products", "residual", "error", "memory"])
    for entry in entries:
        made.add_row(METHODS[entry.request.method].title, *_cells(entry, entries[0]))
    return made


def _cells(entry: Entry, reference: Entry) -> list[str]:
    measured = entry.measurement
    if measured.outcome != "done":
        return [measured.outcome]
    known = reference.measurement.outcome == "done"
    return [
        f"{measured.seconds:.3g}",
        f"{measured.seconds / reference.measurement.seconds:.2f}×" if known else "–",
        str(measured.products),
        f"{measured.residual:.1e}",
        "–" if entry.error is None else f"{entry.error:.1e}",
        size(measured.peak_bytes),
    ]


def notes(entries: Sequence[Entry]) -> list[str]:
    """Say what stopped a method, how close eigenvalues came, and what a block of products gains."""
    lines = tables.stopped((METHODS[entry.request.method].title, entry.measurement) for entry in entries)
    done = [entry.measurement for entry in entries if entry.measurement.outcome == "done"]
    if done:
        first = done[0]
        lines.append(
            f"P = {first.parameters}; {first.measurements} measurements; the two eigenvalues come as close as "
            f"{first.gap:.1%}. A block of {BLOCK} products took {1000 * first.block_seconds:.3g} ms, {BLOCK} single ones "
            f"{1000 * first.single_seconds:.3g} ms ({first.single_seconds / first.block_seconds:.2f}×)."
        )
    return lines


def save(path: Path, comparisons: Sequence[Sequence[Entry]], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    sections = [(heading(entries), table(entries, box.MARKDOWN), notes(entries)) for entries in comparisons]
    tables.save(path, environment, [asdict(entry) for entries in comparisons for entry in entries], sections, LEGEND)
