"""A graph with its training nodes, their targets, and the features that each number of propagations gives them."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.gnn_acceleration.config import AGGREGATIONS, Config
from analyses.graphs import graph_of
from curvlab.nn import Propagation
from curvlab.problems import LabelledGraph, data_folder
from curvlab.problems.files import fetch
from curvlab.problems.graphs import PLANETOID
from curvlab.study import Cell, generator, stream

FORMS = ("normalised", "raw")
"""Features with rows of sum one, as graphs are loaded, and as published; karate's identity is both."""

NAMED = 12
"""Nodes that a message names; the measurements hold all."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A graph, an aggregation and training nodes; matrices have the paper's layout, **a column a node**.

    Attributes:
        graph: with its labels.
        features: of all nodes, `[N, F]`.
        propagation: S.
        nodes: I.
    """

    graph: LabelledGraph
    features: Float[Tensor, "N F"]
    propagation: Propagation
    nodes: Int[Tensor, " n"]

    @cached_property
    def targets(self) -> Float[np.ndarray, "C n"]:
        """Y, one-hot and not centred."""
        return np.asarray(np.eye(self.graph.classes)[self.graph.labels[self.nodes].numpy()].T)

    def propagated(self, depth: int) -> list[Float[np.ndarray, "F n"]]:
        """G_0, …, G_depth."""
        return [np.ascontiguousarray(x[self.nodes].numpy().T) for x in powers(self.propagation, self.features, depth)]


def setting_of(cell: Cell, config: Config) -> Setting:
    """Return the setting of a cell: its aggregation, and a `split`, `form` and number of features if it names them."""
    split = str(cell.coordinates.get("split", config.splits[0]))
    form = str(cell.coordinates.get("form", "normalised"))
    graph = graph_of(config.problem, split)
    features = features_of(config.problem, form)
    if "form" not in cell.coordinates:
        features = principal(features, config.components)
    nodes = _nodes(cell, config, graph)
    if cell.coordinates.get("features") == "few":
        features = features @ torch.from_numpy(few(features.shape[1], len(nodes), int(cell["seed"])))
    return Setting(graph, features, _propagation(config.problem, str(cell["aggregation"])), nodes)


def few(features: int, nodes: int, seed: int) -> Float[np.ndarray, "F K"]:
    """Random orthogonal combinations of the features, a quarter as many as nodes, which keep the norm of random features."""
    kept = max(1, min(features, nodes // 4))
    rng = np.random.default_rng(stream(seed, "features"))
    Q, _ = np.linalg.qr(rng.normal(size=(features, kept)))
    return np.asarray(Q * (features / kept) ** 0.5)


def _nodes(cell: Cell, config: Config, graph: LabelledGraph) -> Int[Tensor, " n"]:
    """The training nodes of the split, or as many of all nodes drawn by the cell's seed."""
    if not config.drawn_nodes:
        return graph.train
    if config.drawn_nodes > len(graph.labels):
        raise ValueError(f"--nodes {config.drawn_nodes}: {config.problem} has {len(graph.labels)} nodes.")
    order = torch.randperm(len(graph.labels), generator=generator(int(cell["seed"]), "nodes"))
    return order[: config.drawn_nodes].sort().values


def named(nodes: Int[np.ndarray, " K"]) -> str:
    """Return the first of some nodes in words, and how many more there are."""
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return ", ".join(map(str, nodes[:NAMED])) + more


def forms_of(name: str) -> tuple[str, ...]:
    """The forms of features in which a graph differs."""
    return FORMS[:1] if name == "karate" else FORMS


@lru_cache(maxsize=2)
def features_of(name: str, form: str) -> Float[Tensor, "N F"]:
    """Features of all nodes in one of `FORMS`, float64."""
    normalised = graph_of(name, "public").features.double()
    if form == "normalised" or name == "karate":
        return normalised
    from torch_geometric.io import read_planetoid_data  # its import takes seconds

    paths = [fetch(file, data_folder()) for file in PLANETOID[name]]
    raw: Tensor = read_planetoid_data(str(paths[0].parent), name).x
    return raw.double()


@lru_cache(maxsize=2)
def _propagation(name: str, aggregation: str) -> Propagation:
    graph = graph_of(name, "public")
    return _aggregating(graph.edge_index, len(graph.labels), aggregation)


def _aggregating(edges: Int[Tensor, "2 E"], nodes: int, aggregation: str) -> Propagation:
    return Propagation(edges, nodes, normalisation=AGGREGATIONS[aggregation], dtype=torch.float64)


def random_propagation(rng: np.random.Generator, nodes: int, aggregation: str) -> Propagation:
    """S of a random graph with one to three undirected edges a node."""
    edges = torch.from_numpy(rng.integers(0, nodes, size=(2, int(rng.integers(1, 4)) * nodes)))
    return _aggregating(torch.cat([edges, edges.flip(0)], 1), nodes, aggregation)


def powers(propagation: Propagation, x: Float[Tensor, "N F"], depth: int) -> list[Float[Tensor, "N F"]]:
    """x, Sx, …, S^depth x."""
    found = [x]
    for _ in range(depth):
        found.append(propagation(found[-1]))
    return found


@lru_cache(maxsize=1)
def principal(features: Float[Tensor, "N F"], components: int) -> Float[Tensor, "N K"]:
    """Coordinates along the leading right singular vectors, scaled to a mean squared norm of one over the nodes.

    Features with no more columns stay as they are, such as karate's identity, which has that norm. Without the scale heads
    would have to grow far above the layers' size, and the tangent kernel with them.
    """
    if features.shape[1] <= components:
        return features
    _, vectors = torch.linalg.eigh(features.T @ features)
    coordinates = features @ vectors[:, -components:].flip(1)
    scaled: Tensor = coordinates / coordinates.square().sum(1).mean().sqrt()
    return scaled
