"""Shares of checks as a table, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks import tables
from benchmarks.checks.networks import NETWORKS
from benchmarks.checks.worker import Measurement, Request

LEGEND = (
    "A step: forward and backward pass, a draw's sweep, K-FAC with inversions every 10 steps, SGD. Checks: what of it only sees to "
    "it that rows are those of the model; most models are known again (docs/checks.md). Compared: the same where the graph cannot "
    "tell, and rows are compared with another backward pass. Medians of the processor's time, in turns."
)


@dataclass(frozen=True)
class Entry:
    """One line: what was asked, and what came of it."""

    request: Request
    measurement: Measurement


def heading(entries: Sequence[Entry]) -> str:
    """Say on what it was measured."""
    request = entries[0].request
    return f"Checks of training steps, {tables.setting(request, request.samples)}"


def table(entries: Sequence[Entry], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Lay out the networks."""
    made = tables.empty(style, ["network"], ["step ms", "checks ms", "share", "compared ms", "checks ms", "share"])
    for entry in entries:
        made.add_row(NETWORKS[entry.request.network].title, *_cells(entry.measurement))
    return made


def _cells(measured: Measurement) -> list[str]:
    if measured.outcome != "done":
        return [measured.outcome]
    pairs = ((measured.seconds, measured.checks), (measured.compared_seconds, measured.compared_checks))
    return [
        cell for step, checks in pairs for cell in (f"{1e3 * step:.2f}", f"{1e3 * checks:.3f}", f"{checks / step:.1%}")
    ]


def notes(entries: Sequence[Entry]) -> list[str]:
    """Say what stopped a network."""
    return tables.stopped((NETWORKS[entry.request.network].title, entry.measurement) for entry in entries)


def save(path: Path, entries: Sequence[Entry], environment: dict[str, object]) -> None:
    """Write markdown or JSON, by the suffix of the path."""
    section = heading(entries), table(entries, box.MARKDOWN), notes(entries)
    tables.save(path, environment, [asdict(entry) for entry in entries], [section], LEGEND)
