"""Command line of the tracking benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.options import CommonOptions, command
from benchmarks.tracking import report
from benchmarks.tracking.methods import METHODS, MethodName
from benchmarks.tracking.runner import compare
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

    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Ways to find eigenpairs."""
    samples: int = 500
    """Training samples N of scikit-learn's digits (unit: samples)."""
    width: int = 256
    """Hidden units of the two hidden layers; 256 make 85 002 parameters."""
    eta: float = 0.5
    """Step size of gradient descent."""
    steps: int = 1000
    """Steps of the run (unit: steps)."""
    every: int = 50
    """Steps from one measurement to the next (unit: steps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "width", "every", "eta"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be positive, got {getattr(self, name)}")
        if not self.methods or self.steps < 0:
            raise UsageError("--methods must name at least one, and --steps must be at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command("python -m benchmarks.tracking", Options, _compare, argv)


def _compare(options: Options, console: Console, progress: Console) -> int:
    with progress.status("") as status:

        def requests() -> Iterator[Request]:
            for method in sorted(options.methods, key=get_args(MethodName).index):
                status.update(METHODS[method].title)
                yield Request(
                    method=method,
                    samples=options.samples,
                    width=options.width,
                    eta=options.eta,
                    steps=options.steps,
                    every=options.every,
                    **options.machine,
                )

        entries = list(compare(requests(), options.timeout))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, entries, environment(Path(__file__), options.device))
    return int(any(entry.wrong for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
