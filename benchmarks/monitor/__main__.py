"""Command line of the monitor's benchmark."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console

from benchmarks import meter, tables
from benchmarks.monitor import report
from benchmarks.monitor.courses import CourseName, follow
from benchmarks.options import PlaceOptions, command
from curvlab.study.environment import environment
from curvlab.study.faults import UsageError


@dataclass(frozen=True)
class Options(PlaceOptions):
    """Train with a monitor: what it takes of the time, and when it tells that a growing learning rate is too large.

    Exit code 1 if it takes more than its budget, or tells later than the loss shows.
    """

    problems: tuple[CourseName, ...] = get_args(CourseName)
    """Problems; fashion-lenet needs the images of Fashion-MNIST."""
    steps: int = 8000
    """Steps of a run, at least 3000 where claims are judged (unit: steps)."""
    budget: float = 0.02
    """Share of the time that the monitor may take."""
    ramp: float = 30.0
    """Factor by which the learning rate grows over a run."""
    seeds: int = 1
    """Runs with a growing learning rate of each problem."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("steps", "budget", "seeds")
        if not self.ramp > 1:
            raise UsageError(f"--ramp must be above 1, got {self.ramp}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command("python -m benchmarks.monitor", Options, _run, argv)


def _run(options: Options, console: Console, progress: Console) -> int:
    meter.use(options.device, options.threads)
    logging.getLogger("curvlab").setLevel(logging.ERROR)  # events are in the table
    constant, ramped = [], []
    with progress.status("") as status:
        for name in options.problems:
            status.update(f"{name}: constant learning rate")
            constant.append(_line(name, options))
            for seed in range(options.seeds):
                status.update(f"{name}: growing learning rate, seed {seed}")
                ramped.append(_line(name, options, ramp=options.ramp, seed=seed))
    sections = (
        ("A constant learning rate, all quantities", constant, report.shares),
        (f"A learning rate that grows {options.ramp:g}-fold, the edge alone", ramped, report.detections),
    )
    for heading, lines, table in sections:
        console.print(heading, table(lines), *report.notes(lines), "", sep="\n", highlight=False)
    console.print(report.LEGEND)
    if options.output is not None:
        written = [(heading, table(lines, box.MARKDOWN), report.notes(lines)) for heading, lines, table in sections]
        rows = [asdict(line) for line in (*constant, *ramped)]
        tables.save(options.output, environment(Path(__file__), options.device), rows, written, report.LEGEND)
    return int(any(line.wrong for line in (*constant, *ramped)))


def _line(name: CourseName, options: Options, ramp: float = 1.0, seed: int = 0) -> report.Line:
    found = follow(name, options.steps, options.budget, ramp=ramp, seed=seed, device=options.device)
    return report.Line(name, seed, ramp, options.budget, found)


if __name__ == "__main__":
    sys.exit(main())
