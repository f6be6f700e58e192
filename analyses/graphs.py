"""What the analyses of graph networks ask of labelled graphs: that they exist, and by what a run knows them again."""

import hashlib
from collections.abc import Iterable
from typing import get_args

from curvlab.problems import GRAPHS, LabelledGraph, load_graph
from curvlab.problems.graphs import Split
from curvlab.study import check_names


def check_graph(name: str, splits: tuple[str, ...]) -> None:
    """Refuse the options ``--problem`` and ``--splits`` where there is no such graph.

    Raises:
        ValueError: names the option.
    """
    check_names("--problem", (name,), GRAPHS)
    check_names("--splits", splits, get_args(Split))
    if name == "karate" and set(splits) != {"public"}:
        raise ValueError(f"--splits: karate has the split 'public' only, not {splits[-1]!r}")


def graph_of(name: str, split: str) -> LabelledGraph:
    """Return a graph of the options.

    Raises:
        DataUnavailable: its files are absent.
    """
    return load_graph(name, split)  # type: ignore[arg-type]  # `check_graph` has seen it


def digest_of(graphs: Iterable[LabelledGraph]) -> str:
    """Return a digest of graphs, with their features, classes and splits."""
    digest = hashlib.sha256()
    for graph in graphs:
        for tensor in vars(graph).values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
