"""One method on one graph in a process of its own: `python -m benchmarks.graphs.worker REQUEST FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import meter
from benchmarks.graphs.methods import METHODS, GraphName, MethodName, pubmed, random_graph
from benchmarks.process import Machine, Timed, serve

WARM_UP = (8, 16, 4)
"""Nodes, edges and labels of a graph on which is loaded what is loaded late."""


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        method: what is computed.
        graph: where; sizes are those of a random one.
        nodes: number of nodes N.
        edges: number of edges E.
        labelled: number of labelled nodes L; rows are C·L.
    """

    method: MethodName
    graph: GraphName = "random"
    nodes: int = 0
    edges: int = 0
    labelled: int = 0


@dataclass(frozen=True)
class Measurement(Timed):
    """What came of it.

    Attributes:
        sizes: nodes, edges and labelled nodes.
    """

    sizes: tuple[int, ...] = ()


def measure(request: Request, _: Path) -> Measurement:
    """Measure in this process."""
    meter.use(request.device, request.threads)
    prepare = METHODS[request.method].prepare
    prepare(random_graph(*WARM_UP, request.device))()
    if request.graph == "pubmed":
        graph = pubmed(request.device)
    else:
        graph = random_graph(request.nodes, request.edges, request.labelled, request.device)
    compute = prepare(graph)
    peak = meter.growth(compute, request.device)
    seconds = meter.repeated(compute, request)
    sizes = (len(graph.network.features), graph.edges, len(graph.nodes))
    return Measurement(outcome="done", seconds=seconds, peak_bytes=peak, sizes=sizes)


if __name__ == "__main__":
    serve(sys.argv[1:], Request, measure, Measurement)
