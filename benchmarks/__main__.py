"""Command line of the benchmarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
import tyro
from rich.console import Console

from benchmarks import report
from benchmarks.peers import METHODS, MethodName, PeerName
from benchmarks.runner import Entry, compare
from benchmarks.tasks import TASKS, TaskName
from benchmarks.worker import Request
from curvlab.study.environment import available_memory, check_device, environment
from curvlab.study.faults import StudyError, UsageError

OWN: tuple[MethodName, ...] = ("curvlab", "curvlab-autograd", "curvlab-product")


@dataclass(frozen=True)
class Options:
    """Time the Gram matrix of a network's Jacobian, curvlab's factored form against libraries that compute the same.

    Every method runs in a process of its own, and its matrix is compared with curvlab's. Exit code 1 if one fails or
    disagrees; a method that runs out of memory or time is reported as such.
    """

    tasks: tuple[TaskName, ...] = get_args(TaskName)
    """Networks."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Libraries to compare with."""
    samples: int | None = None
    """Number of samples N; the task's own if not given (128 for mlp, 64 for lenet)."""
    repeats: int = 15
    """Timed calls of a method; their median counts."""
    seconds: float = 30.0
    """No further call of a method starts after this much timed work (unit: seconds)."""
    timeout: float = 1800.0
    """A method's process is stopped after this time (unit: seconds)."""
    threads: int = os.cpu_count() or 1
    """Threads of each process."""
    device: str = "cpu"
    """Torch device, such as cpu, cuda or cuda:1."""
    output: Path | None = None
    """File for the comparison: .md or .json."""

    def __post_init__(self) -> None:
        for name in ("repeats", "threads", "seconds", "timeout"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples must be at least 1, got {self.samples}")
        if self.output is not None and self.output.suffix not in report.FORMATS:
            raise UsageError(f"--output {self.output} must end in one of: {', '.join(report.FORMATS)}")
        check_device(self.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    console, progress = Console(), Console(stderr=True)
    try:
        options = tyro.cli(Options, prog="python -m benchmarks", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
        comparisons = [_run(task, options, console, progress) for task in options.tasks]
        console.print(report.LEGEND)
        if options.output is not None:
            report.save(options.output, comparisons, environment(Path(__file__), options.device))
    except StudyError as error:
        progress.print(f"error: {error}", style="red", highlight=False)
        return error.exit_code
    return int(any(entry.wrong for entries in comparisons for entry in entries))


def _run(task: TaskName, options: Options, console: Console, progress: Console) -> list[Entry]:
    with progress.status(task) as status:

        def requests() -> Iterator[Request]:
            for method in (*OWN, *options.peers):
                status.update(f"{TASKS[task].title}: {METHODS[method].title}")
                yield Request(
                    task=task,
                    method=method,
                    samples=options.samples or TASKS[task].samples,
                    repeats=options.repeats,
                    seconds=options.seconds,
                    threads=options.threads,
                    device=options.device,
                    memory=_allowance(options.device),
                )

        entries = list(compare(requests(), options.timeout))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    return entries


def _allowance(device: str) -> int | None:
    """Bytes that a process may allocate: what is free now; a GPU keeps its own account."""
    free = available_memory(device)
    return None if free is None or torch.device(device).type == "cuda" else int(free)


if __name__ == "__main__":
    sys.exit(main())
