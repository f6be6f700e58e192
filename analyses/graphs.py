"""Labelled graphs of the analyses of graph networks: their options, and by what a run knows the graphs again."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from curvlab.problems import GRAPHS, LabelledGraph, load_graph
from curvlab.problems.graphs import Split
from curvlab.study import CommonOptions, check_names, check_some


@dataclass(frozen=True, kw_only=True)
class GraphOptions(CommonOptions):
    """Options of an analysis on labelled graphs."""

    problem: str = "karate"
    """Graph: karate, cora, citeseer or pubmed."""
    splits: tuple[str, ...] = ("public",)
    """Splits of its nodes: public, full, complete; what is not about splits uses the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_some(self, "splits")
        check_names("--problem", (self.problem,), GRAPHS)
        check_names("--splits", self.splits, get_args(Split))
        if self.problem == "karate" and set(self.splits) != {"public"}:
            raise ValueError(f"--splits: karate has the split 'public' only, not {self.splits[-1]!r}")


def graph_of(name: str, split: str) -> LabelledGraph:
    """Return a graph of the options.

    Raises:
        DataUnavailable: its files are absent.
    """
    return load_graph(name, split)  # type: ignore[arg-type]  # the options were checked


def described(config: GraphOptions) -> dict[str, object]:
    """Return what the graph of the options is, for the reports of what is measured on it."""
    graph = graph_of(config.problem, config.splits[0])
    nodes, features = graph.features.shape
    parts = {"training": graph.train, "validation": graph.validation, "test": graph.test}
    return {
        "graph": f"{config.problem}, {nodes} nodes, {graph.edge_index.shape[1] // 2} edges, {graph.classes} classes",
        "features": f"{features} a node, rows of sum one",
        "splits": config.splits,
        "nodes": ", ".join(f"{len(indices)} {part}" for part, indices in parts.items()),
    }


def digest_of(graphs: Iterable[LabelledGraph]) -> str:
    """Return a digest of graphs, with their features, classes and splits."""
    digest = hashlib.sha256()
    for graph in graphs:
        for tensor in vars(graph).values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
