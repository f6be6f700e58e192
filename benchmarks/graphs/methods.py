"""The graphs, and what is computed on them with a two-layer graph convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.fisher import KFAC
from curvlab.nn import GraphNetwork, gcn
from curvlab.optim import Preconditioner
from curvlab.problems import load_graph

MethodName = Literal["gram", "kfac", "kfac-step"]
GraphName = Literal["random", "pubmed"]

HIDDEN, FEATURES, CLASSES = 16, 64, 4
DAMPING = 0.01


@dataclass(frozen=True)
class Labelled:
    """A network on a graph, with the nodes that carry labels."""

    network: GraphNetwork
    nodes: Tensor
    labels: Tensor
    edges: int


def random_graph(nodes: int, edges: int, labelled: int, device: str) -> Labelled:
    """Return a graph with edges between random nodes, the same numbers in every process and on every device."""
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(nodes, (2, edges), generator=generator)
    features = torch.randn(nodes, FEATURES, generator=generator)
    chosen = torch.randperm(nodes, generator=generator)[:labelled]
    labels = torch.randint(CLASSES, (labelled,), generator=generator)
    network = gcn(features, edge_index, (HIDDEN, CLASSES), generator=generator)
    return Labelled(network.to(device), chosen.to(device), labels.to(device), edges)


def pubmed(device: str) -> Labelled:
    """Return PubMed with the nodes of its public split.

    Raises:
        DataUnavailable: its files are absent.
    """
    graph = load_graph("pubmed")
    generator = torch.Generator().manual_seed(0)
    network = gcn(graph.features, graph.edge_index, (HIDDEN, graph.classes), generator=generator)
    nodes, labels = graph.train.to(device), graph.labels[graph.train].to(device)
    return Labelled(network.to(device), nodes, labels, graph.edge_index.shape[1])


def _gram(graph: Labelled) -> Callable[[], Tensor]:
    loss = nn.CrossEntropyLoss()
    return lambda: sqrt_fisher(graph.network, loss, graph.nodes, graph.labels).gram()


def _kfac(graph: Labelled) -> Callable[[], Tensor]:
    """Factors of exact rows and one solve."""
    loss = nn.CrossEntropyLoss()

    def compute() -> Tensor:
        rows = sqrt_fisher(graph.network, loss, graph.nodes, graph.labels)
        ones = torch.ones(rows.P, dtype=rows.dtype, device=rows.device)
        solution = KFAC(factored_damping=True).update(rows).solve(ones, DAMPING)
        assert isinstance(solution, Tensor)
        return solution

    return compute


def _step(graph: Labelled) -> Callable[[], Tensor]:
    """Forward and backward pass, factors from one row, the whole gradient, and the preconditioned gradient."""
    loss = nn.CrossEntropyLoss()
    structure = KFAC(sharing="gradient", factored_damping="equal")
    preconditioner = Preconditioner(
        graph.network, loss, structure, kind="empirical", damping=DAMPING, decay=0.0, graph=True, kl_clip=None
    )

    def compute() -> Tensor:
        graph.network.zero_grad()
        with preconditioner.collect():
            loss(graph.network(graph.nodes), graph.labels).backward()
        preconditioner.precondition()
        return torch.cat([p.grad.flatten() for p in graph.network.parameters() if p.grad is not None])

    return compute


@dataclass(frozen=True)
class Method:
    """What is computed.

    Attributes:
        title: in words.
        prepare: a graph to the call that is timed.
    """

    title: str
    prepare: Callable[[Labelled], Callable[[], Tensor]]


METHODS: Mapping[MethodName, Method] = {
    "gram": Method("Gram matrix", _gram),
    "kfac": Method("K-FAC, exact rows", _kfac),
    "kfac-step": Method("K-FAC step, empirical", _step),
}
