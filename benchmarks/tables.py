"""Tables as markdown, and the files that a comparison can be written to."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.process import Machine, Result, Timed
from curvlab.tools.storage import write, write_json
from curvlab.tools.text import size

FORMATS = (".md", ".json")
"""Suffixes of files that a comparison can be written to."""

WIDTH = 240
"""Columns of tables that no terminal shows."""

Section = tuple[str, Table, Sequence[str]]
"""A heading, a table in the style `box.MARKDOWN` and notes."""


def setting(machine: Machine, samples: int) -> str:
    """Say on how many samples, and on what, a method was timed."""
    return f"N = {samples}, {computed(machine)}"


def computed(machine: Machine) -> str:
    """Say in which precision, and on what, a method was timed."""
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    return f"float32, {machine.device}, {threads}"


def empty(style: box.Box, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Return a table without rows: columns of words, then columns of numbers."""
    made = Table(box=style, pad_edge=style is not box.SIMPLE_HEAD)
    for header in words:
        made.add_column(header)
    for header in numbers:
        made.add_column(header, justify="right")
    return made


def cells(measured: Timed, reference: Timed, error: float | None) -> list[str]:
    """Write down seconds, their ratio to those of a reference, memory and error, or what stopped the method."""
    if measured.outcome != "done":
        return [measured.outcome]
    ratio = measured.median / reference.median if reference.seconds else None
    return [
        f"{measured.median:.4g}",
        "–" if ratio is None else f"{ratio:.3g}×",
        size(measured.peak_bytes),
        "–" if error is None else f"{error:.1e}",
    ]


def stopped(results: Iterable[tuple[str, Result]]) -> list[str]:
    """Say what stopped methods, given by their titles."""
    return [f"{title}: {result.outcome} ({result.note})." for title, result in results if result.outcome != "done"]


def save(
    path: Path,
    environment: dict[str, object],
    measurements: Sequence[object],
    sections: Iterable[Section],
    legend: str,
) -> None:
    """Write sections as markdown, or measurements as JSON, by the suffix of the path."""
    if path.suffix == ".json":
        write_json(path, {"environment": environment, "measurements": measurements})
    else:
        written = ["\n\n".join((f"## {title}", _markdown(table), " ".join(notes))) for title, table, notes in sections]
        write(path, "\n\n".join([*written, legend, ""]).encode())


def _markdown(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table)
    return "\n".join(line for line in text.getvalue().splitlines() if line.strip())
