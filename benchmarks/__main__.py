"""Command line of the Gram matrices' benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks import report
from benchmarks.options import SampledOptions, command
from benchmarks.peers import METHODS, MethodName, PeerName
from benchmarks.runner import compare
from benchmarks.tasks import TASKS, TaskName
from benchmarks.worker import Request
from curvlab.study.environment import environment

OWN: tuple[MethodName, ...] = ("curvlab", "curvlab-autograd", "curvlab-product")


@dataclass(frozen=True)
class Options(SampledOptions):
    """Time the Gram matrix of a network's Jacobian, curvlab's factored form against libraries that compute the same.

    Every method runs in a process of its own, and its matrix is compared with curvlab's. Exit code 1 if one fails or
    disagrees; a method that runs out of memory or time is reported as such.
    """

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Networks."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Libraries to compare with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks", Options, _compare, argv)


def _compare(options: Options, console: Console, progress: Console) -> int:
    comparisons = [_run(task, options, console, progress) for task in options.tasks]
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, comparisons, environment(Path(__file__), options.device))
    return int(any(entry.wrong for entries in comparisons for entry in entries))


def _run(task: TaskName, options: Options, console: Console, progress: Console) -> list[report.Line]:
    with progress.status(task) as status:

        def requests() -> Iterator[Request]:
            for method in (*OWN, *options.peers):
                status.update(f"{TASKS[task].title}: {METHODS[method].title}")
                samples = options.samples or TASKS[task].samples
                yield Request(task=task, method=method, samples=samples, **options.machine)

        entries = list(compare(requests(), options.timeout))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    return entries


if __name__ == "__main__":
    sys.exit(main())
