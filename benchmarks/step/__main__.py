"""Command line of the training steps' benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.options import CommonOptions, command
from benchmarks.step import report
from benchmarks.step.methods import METHODS, MethodName
from benchmarks.step.runner import Entry, compare
from benchmarks.step.worker import Request
from benchmarks.tasks import TASKS, TaskName
from curvlab.study.environment import environment
from curvlab.study.faults import UsageError


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time training steps of second order as multiples of a step of SGD with momentum on the same network.

    Every method runs in a process of its own, in turns with SGD, for whole periods of inversions. Exit code 1 if one
    fails, disagrees or does not learn; a method that runs out of memory or time is reported as such.
    """

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Networks."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Kinds of steps; K-FAC of the libraries is compared with curvlab's."""
    batches: tuple[int, ...] = (256, 2048)
    """Numbers of samples."""
    intervals: tuple[int, ...] = (1, 10, 100)
    """Steps from one inversion of K-FAC's factors to the next."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batches", "intervals"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UsageError(f"--{name} must be at least 1 each, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks.step", Options, _compare, argv)


def _compare(options: Options, console: Console, progress: Console) -> int:
    pairs = [(task, samples) for task in options.tasks for samples in options.batches]
    comparisons = [_run(task, samples, options, console, progress) for task, samples in pairs]
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, comparisons, environment(Path(__file__), options.device))
    return int(any(entry.wrong for entries in comparisons for entry in entries))


def _run(task: TaskName, samples: int, options: Options, console: Console, progress: Console) -> list[Entry]:
    with progress.status(task) as status:

        def requests() -> Iterator[Request]:
            for method in sorted(options.methods, key=get_args(MethodName).index):
                for interval in options.intervals if METHODS[method].inverts else (1,):
                    status.update(f"{TASKS[task].title}: {METHODS[method].title}, every {interval}")
                    yield Request(task=task, method=method, samples=samples, interval=interval, **options.machine)

        entries = list(compare(requests(), options.timeout))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    return entries


if __name__ == "__main__":
    sys.exit(main())
