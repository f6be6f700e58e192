"""Command line of the benchmark of growth."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.growth import report
from benchmarks.growth.methods import QUANTITIES, AxisName, MethodName, QuantityName
from benchmarks.growth.report import Line
from benchmarks.growth.worker import Measurement, Request
from benchmarks.options import CommonOptions, command
from benchmarks.process import in_own_process
from curvlab.study.environment import environment
from curvlab.study.faults import UsageError


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time Gram matrix and K-FAC fit as samples, outputs, width and depth grow, of a decoder tokens and vocabulary; fit exponents.

    Every method has a process of its own for every axis. Exit code 1 if one fails; one that runs out of memory or time is
    reported as such.
    """

    repeats: int = 5
    """Timed calls at a value."""
    quantities: tuple[QuantityName, ...] = get_args(QuantityName)
    """What is computed."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Libraries; curvlinops has no Gram matrix."""
    axes: tuple[AxisName, ...] = get_args(AxisName)
    """What grows, one at a time."""
    values: int = 6
    """Number of values of each, every one twice the one before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(len(values) for quantity in QUANTITIES.values() for values in quantity.axes.values())
        if not 1 <= self.values <= most:
            raise UsageError(f"--values must be from 1 to {most}, got {self.values}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks.growth", Options, _measure, argv)


def _measure(options: Options, console: Console, progress: Console) -> int:
    found = [lines for quantity in options.quantities if (lines := _run(quantity, options, console, progress))]
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, found, environment(Path(__file__), options.device))
    return int(any(line.measurement.outcome == "failed" for lines in found for line in lines))


def _run(quantity: QuantityName, options: Options, console: Console, progress: Console) -> list[Line]:
    title, lines = QUANTITIES[quantity].title, []
    with progress.status(title) as status:
        for axis in (axis for axis in options.axes if axis in QUANTITIES[quantity].axes):
            for method in QUANTITIES[quantity].methods:
                if method in options.methods:
                    status.update(f"{title}: {axis}, {method}")
                    values = QUANTITIES[quantity].axes[axis][: options.values]
                    request = Request(quantity=quantity, method=method, axis=axis, values=values, **options.machine)
                    with tempfile.TemporaryDirectory() as folder:
                        measured = in_own_process(
                            "benchmarks.growth.worker", request, options.timeout, Path(folder), Measurement
                        )
                    lines.append(Line(request, measured))
    if lines:
        console.print(report.heading(lines), report.table(lines), *report.notes(lines), "", sep="\n", highlight=False)
    return lines


if __name__ == "__main__":
    sys.exit(main())
