"""Command line of the graphs' benchmark."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console

from benchmarks.graphs import report
from benchmarks.graphs.methods import GraphName, MethodName
from benchmarks.graphs.report import Entry, Sweep
from benchmarks.graphs.worker import Measurement, Request
from benchmarks.options import CommonOptions, command
from benchmarks.process import in_own_process
from curvlab.study.environment import environment
from curvlab.study.faults import UsageError

SIZES = {"nodes": "Nodes", "edges": "Edges", "labelled": "Labelled nodes"}
"""What varies, one at a time around the middle of the other lists."""


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time Gram matrix and K-FAC of a graph network against nodes, edges and labelled nodes, and on PubMed.

    Every measurement runs in a process of its own. Exit code 1 if one fails; one that runs out of memory or time is
    reported as such.
    """

    repeats: int = 5
    """Timed calls of a method."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """What is computed: the Gram matrix of exact rows, K-FAC of exact rows, and a training step with Izadi et al.'s K-FAC."""
    graphs: tuple[GraphName, ...] = get_args(GraphName)
    """Random graphs, and PubMed's public split."""
    nodes: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 16000)
    """Numbers of nodes N."""
    edges: tuple[int, ...] = (2000, 8000, 32000, 128000, 512000)
    """Numbers of edges E."""
    labelled: tuple[int, ...] = (20, 40, 80, 160, 320)
    """Numbers of labelled nodes L; there are 4 rows a node."""
    limit: float = 8.0
    """Memory that PubMed may take (unit: GiB)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SIZES:
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UsageError(f"--{name} must be at least 1 each, got {getattr(self, name)}")
        if max(self.labelled) > min(self.middle("nodes"), *self.nodes) and "random" in self.graphs:
            raise UsageError(f"--labelled {max(self.labelled)} exceeds the fewest --nodes, {min(self.nodes)}")
        if not self.limit > 0:
            raise UsageError(f"--limit must be positive, got {self.limit}")

    def middle(self, name: str) -> int:
        """Return the value of a size while others vary."""
        values: tuple[int, ...] = tuple(sorted(getattr(self, name)))
        return values[len(values) // 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit code."""
    return command("python -m benchmarks.graphs", Options, _measure, argv)


def _requests(options: Options) -> Iterator[tuple[str, str, list[Request]]]:
    """Yield every sweep: its title, what varies and what to measure."""
    base = {name: options.middle(name) for name in SIZES}
    if "random" in options.graphs:
        for name, title in SIZES.items():
            values = sorted(getattr(options, name))
            yield (
                title,
                name,
                [
                    Request(method=method, **base | {name: value}, **options.machine)
                    for method in options.methods
                    for value in values
                ],
            )
    if "pubmed" in options.graphs:
        machine = options.machine
        machine["memory"] = int(options.limit * 2**30)
        yield "PubMed", "", [Request(method=method, graph="pubmed", **machine) for method in options.methods]


def _measure(options: Options, console: Console, progress: Console) -> int:
    sweeps = []
    for title, size, requests in _requests(options):
        with progress.status(title) as status:
            entries = []
            for request in requests:
                status.update(f"{title}: {request.method}")
                with tempfile.TemporaryDirectory() as folder:
                    found = in_own_process(
                        "benchmarks.graphs.worker", request, options.timeout, Path(folder), Measurement
                    )
                entries.append(Entry(request, found))
        sweep = Sweep(title, size, tuple(entries))
        console.print(report.heading(sweep), report.table(sweep), *report.notes(sweep), "", sep="\n", highlight=False)
        sweeps.append(sweep)
    console.print(report.LEGEND)
    if options.output is not None:
        report.save(options.output, sweeps, environment(Path(__file__), options.device))
    return int(any(entry.measurement.outcome == "failed" for sweep in sweeps for entry in sweep.entries))


if __name__ == "__main__":
    sys.exit(main())
