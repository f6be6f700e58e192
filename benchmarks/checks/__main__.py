"""Command line of the checks' benchmark."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.checks import report
from benchmarks.checks.networks import NETWORKS, NetworkName
from benchmarks.checks.report import Entry
from benchmarks.checks.worker import Measurement, Request
from benchmarks.options import SampledOptions, command
from benchmarks.process import in_own_process
from curvlab.study.environment import environment


@dataclass(frozen=True)
class Options(SampledOptions):
    """Time which share of a training step checks its rows, of networks that are known again and of such as are compared.

    Every network runs in a process of its own. Exit code 1 if one fails.
    """

    repeats: int = 100
    """Timed steps of each kind."""
    threads: int = 1
    """Threads of each process; the processor's time is that of all."""
    networks: tuple[NetworkName, ...] = get_args(NetworkName)
    """Networks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return command("python -m benchmarks.checks", Options, _measure, argv)


def _measure(options: Options, console: Console, progress: Console) -> int:
    entries = []
    with progress.status("checks") as status:
        for name in options.networks:
            status.update(NETWORKS[name].title)
            request = Request(network=name, samples=options.samples or NETWORKS[name].samples, **options.machine)
            with tempfile.TemporaryDirectory() as folder:
                found = in_own_process("benchmarks.checks.worker", request, options.timeout, Path(folder), Measurement)
            entries.append(Entry(request, found))
    console.print(report.heading(entries), report.table(entries), *report.notes(entries), "", sep="\n", highlight=False)
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, entries, environment(Path(__file__), options.device))
    return int(any(entry.measurement.outcome == "failed" for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
