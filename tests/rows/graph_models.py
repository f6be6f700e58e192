"""Graph networks, a random graph, and the dense Jacobian that tests of graphs share."""

from collections.abc import Callable
from typing import Any

import torch
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch_geometric.data import Data
from torch_geometric.nn import (
    GATConv,
    GCNConv,
    GINConv,
    JumpingKnowledge,
    MessagePassing,
    SAGEConv,
)

from curvlab.nn import GraphNetwork, gcn
from curvlab.testing.oracle import trainable

FEATURES = 4
HIDDEN = 5


def reference(model: nn.Module, of: Callable[[Any], Tensor]) -> Tensor:
    """Return J of `of(parameters)`, `[N, C, …]`, with rows `(c, x, n)`."""
    by_name = jacrev(lambda p: of(p).permute(*range(1, of(p).ndim), 0).flatten())(trainable(model))
    return torch.cat([by_name[name].flatten(1) for name in trainable(model)], dim=1)


def of_nodes(model: nn.Module, args: tuple[Any, ...], nodes: Tensor) -> Tensor:
    return reference(model, lambda p: functional_call(model, p, args)[nodes])


def random_graph(nodes: int = 7, edges: int = 15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features and directed edges, with self loops, double edges and an isolated node where there is room."""
    generator = torch.Generator().manual_seed(seed)
    joined = max(1, nodes - 1)
    edge_index = torch.randint(joined, (2, edges), generator=generator)
    edge_index[:, -1:] = edge_index[:, :1]
    return torch.randn(nodes, FEATURES, generator=generator, dtype=DOUBLE), edge_index


class Two(nn.Module):
    """Two convolutions as users write them."""

    def __init__(self, make: Callable[[int, int], MessagePassing]) -> None:
        super().__init__()
        self.first, self.last = make(FEATURES, HIDDEN), make(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        weights = () if edge_weight is None else (edge_weight,)
        return self.last(torch.tanh(self.first(x, edge_index, *weights)), edge_index, *weights)


class Jumping(nn.Module):
    """A skip connection, jumping knowledge and a convolution that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = GCNConv(FEATURES, HIDDEN), SAGEConv(HIDDEN, HIDDEN)
        self.jump, self.last = JumpingKnowledge("cat"), nn.Linear(3 * HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = [torch.tanh(self.first(x, edge_index))]
        for _ in range(2):
            h.append(h[-1] + torch.tanh(self.again(h[-1], edge_index)))
        return self.last(self.jump(h))


def sampled(x: Tensor, edge_index: Tensor, seeds: Tensor, *, fan_out: int, hops: int) -> Data:
    """Sample up to `fan_out` incoming edges of every node that is reached, hop by hop, as neighbour samplers do."""
    generator, nodes, kept = torch.Generator().manual_seed(0), seeds.tolist(), []
    front = list(nodes)
    for _ in range(hops):
        reached = []
        for node in front:
            edges = (edge_index[1] == node).nonzero()[:, 0]
            edges = edges[torch.randperm(len(edges), generator=generator)[:fan_out]]
            kept += edges.tolist()
            reached += [int(source) for source in edge_index[0, edges] if int(source) not in nodes + reached]
        nodes += dict.fromkeys(reached)
        front = list(dict.fromkeys(reached))
    local = torch.full((len(x),), -1)
    local[torch.tensor(nodes)] = torch.arange(len(nodes))
    return Data(x=x[nodes], edge_index=local[edge_index[:, kept]], batch_size=len(seeds))


class OfData(nn.Module):
    """A model that takes `Data`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = GCNConv(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, data: Data) -> Tensor:
        return self.last(torch.tanh(self.conv(data.x, data.edge_index)))


def gin(fan_in: int, fan_out: int) -> GINConv:
    inner = nn.Sequential(nn.Linear(fan_in, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, fan_out))
    return GINConv(inner, train_eps=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gcn": lambda: Two(GCNConv),
    "gcn-cached": lambda: Two(lambda i, o: GCNConv(i, o, cached=True)),
    "gin": lambda: Two(gin),
    "sage": lambda: Two(SAGEConv),
    "sage-max": lambda: Two(lambda i, o: SAGEConv(i, o, aggr="max")),
    "gat": lambda: Two(lambda i, o: GATConv(i, o, heads=2, concat=False)),
    "jumping": Jumping,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(DOUBLE).eval()


def chain(x: Tensor, edge_index: Tensor, seed: int = 0) -> GraphNetwork:
    return gcn(x, edge_index, (HIDDEN, CLASSES), activation="tanh", generator=torch.Generator().manual_seed(seed))


NODES = torch.tensor([5, 1, 2])
