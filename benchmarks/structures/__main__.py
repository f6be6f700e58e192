"""Command line of the structures' benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console

from benchmarks.options import SampledOptions, command
from benchmarks.process import Timed
from benchmarks.runner import compared
from benchmarks.structures import report
from benchmarks.structures.kronecker import MethodName
from benchmarks.structures.methods import QUANTITIES, TITLES, QuantityName
from benchmarks.structures.report import Line
from benchmarks.structures.tasks import TASKS, TaskName
from benchmarks.structures.worker import Request
from curvlab.study.environment import environment


@dataclass(frozen=True)
class Options(SampledOptions):
    """Time K-FAC and EKFAC, fit and solve, and the responses of exact blocks, against libraries that compute the same.

    Every method runs in a process of its own, and what it computes is compared with curvlab's. Responses take a quarter of
    a task's own samples. Exit code 1 if curvlab fails or a method disagrees; a library that cannot treat a network, or runs
    out of memory or time, is reported as such.
    """

    repeats: int = 7
    """Timed calls of a method."""
    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Networks."""
    quantities: tuple[QuantityName, ...] = get_args(QuantityName)
    """What is computed."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Ways to compute it, where there are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks.structures", Options, _compare, argv)


def _compare(options: Options, console: Console, progress: Console) -> int:
    pairs = [(task, quantity) for task in options.tasks for quantity in options.quantities]
    comparisons = [lines for task, quantity in pairs if (lines := _run(task, quantity, options, console, progress))]
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, comparisons, environment(Path(__file__), options.device))
    return int(any(_wrong(line) for lines in comparisons for line in lines))


def _wrong(line: Line) -> bool:
    return line.wrong and (line.measurement.outcome == "done" or line.request.method == "curvlab")


def _run(task: TaskName, quantity: QuantityName, options: Options, console: Console, progress: Console) -> list[Line]:
    chosen = QUANTITIES[quantity]
    with progress.status(task) as status:

        def requests() -> Iterator[Request]:
            for method in chosen.methods:
                if method in options.methods:
                    status.update(f"{TASKS[task].title}, {quantity}: {TITLES[method]}")
                    samples = options.samples or max(1, int(TASKS[task].samples * chosen.samples))
                    yield Request(task=task, quantity=quantity, method=method, samples=samples, **options.machine)

        lines = list(compared("benchmarks.structures.worker", requests(), options.timeout, Timed, _found))
    if lines:
        console.print(report.heading(lines), report.table(lines), *report.notes(lines), "", sep="\n", highlight=False)
    return lines


def _found(request: Request, folder: Path) -> np.ndarray | None:
    if QUANTITIES[request.quantity].drawn:
        return None
    loaded: np.ndarray = np.load(folder / "found.npy").astype(np.float64)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
