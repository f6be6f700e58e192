"""Command line of the tracking benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from rich.console import Console

from benchmarks import meter
from benchmarks.options import CommonOptions, command
from benchmarks.tracking import report
from benchmarks.tracking.course import RUNS, Run, RunName, record
from benchmarks.tracking.methods import METHODS, MethodName
from benchmarks.tracking.runner import Entry, compare
from benchmarks.tracking.worker import Request
from curvlab.study.environment import environment
from curvlab.study.faults import UsageError


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time the tracking of the two largest Hessian eigenvalues along gradient descent up to the edge of stability.

    Every method runs in a process of its own on the same run; curvlab and eigsh at tolerance 0 bound every eigenvalue's
    error by 1e-3. Exit code 1 if one fails or misses its bound; a method that runs out of memory or time is reported as
    such.
    """

    runs: tuple[RunName, ...] = ("digits",)
    """Training runs; readme is that of the published code's README on cifar10-5k, some half an hour on 2 cores."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Ways to find eigenpairs."""
    samples: int | None = None
    """Training samples N; this and the following are the run's own if not given (unit: samples)."""
    width: int | None = None
    """Hidden units of the two hidden layers; 256 make 85 002 parameters on digits, 200 make 656 810 on cifar10-5k."""
    eta: float | None = None
    """Step size of gradient descent."""
    steps: int | None = None
    """Steps of the run (unit: steps)."""
    every: int | None = None
    """Steps from one measurement to the next (unit: steps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "width", "every", "eta"):
            if name in self.changes and not self.changes[name] > 0:
                raise UsageError(f"--{name} must be positive, got {self.changes[name]}")
        if not self.runs or not self.methods or self.changes.get("steps", 0) < 0:
            raise UsageError("--runs and --methods must name at least one each, and --steps must be at least 0")

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the runs' own settings."""
        given = {name: getattr(self, name) for name in ("samples", "width", "eta", "steps", "every")}
        return {name: value for name, value in given.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command("python -m benchmarks.tracking", Options, _compare, argv)


def _compare(options: Options, console: Console, progress: Console) -> int:
    comparisons = [_follow(replace(RUNS[name], **options.changes), options, console, progress) for name in options.runs]
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, comparisons, environment(Path(__file__), options.device))
    return int(any(entry.wrong for entries in comparisons for entry in entries))


def _follow(run: Run, options: Options, console: Console, progress: Console) -> list[Entry]:
    with progress.status(f"{run.images}: training") as status, TemporaryDirectory() as folder:
        meter.use(options.device, options.threads)
        course = Path(folder) / "course.pt"
        torch.save(record(run, options.device), course)

        def requests() -> Iterator[Request]:
            for method in sorted(options.methods, key=get_args(MethodName).index):
                status.update(f"{run.images}: {METHODS[method].title}")
                yield Request(method=method, course=str(course), **asdict(run), **options.machine)

        entries = list(compare(requests(), options.timeout))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    return entries


if __name__ == "__main__":
    sys.exit(main())
