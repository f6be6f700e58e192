"""Propagation against dense matrices and against torch-geometric's convolutions."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DOUBLE
from torch import Tensor
from torch_geometric.nn import GCN, GCNConv, GINConv, SimpleConv

from curvlab.nn import GraphNetwork, Propagation, gcn
from curvlab.testing.oracle import assert_close


def graph(nodes: int, edges: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(nodes, (2, edges), generator=generator)
    x = torch.randn(2, nodes, 3, generator=generator, dtype=DOUBLE)
    return x, edge_index, torch.rand(edges, generator=generator, dtype=DOUBLE)


def dense(propagation: Propagation) -> Tensor:
    return propagation(torch.eye(propagation.nodes, dtype=DOUBLE))


def identity(nodes: int) -> Tensor:
    return torch.eye(nodes, dtype=DOUBLE)


GRAPHS = (st.integers(1, 6), st.integers(0, 12), st.integers(0, 99))


@given(*GRAPHS)
def test_unnormalised_matrix_and_its_transpose(nodes: int, edges: int, seed: int) -> None:
    x, edge_index, weight = graph(nodes, edges, seed)
    W = torch.zeros(nodes, nodes, dtype=DOUBLE).index_put_((edge_index[1], edge_index[0]), weight, accumulate=True)
    propagation = Propagation(edge_index, nodes, weight, normalisation="none", self_loops=1.5, dtype=DOUBLE)
    P = W + 1.5 * identity(nodes)
    assert_close(propagation(x), P @ x)
    assert_close(propagation.transposed(x), P.T @ x)
    assert_close(
        dense(Propagation(edge_index, nodes, weight, "none", 0.0, DOUBLE)) + identity(nodes), W + identity(nodes)
    )


@given(*GRAPHS)
def test_normalised_matrices(nodes: int, edges: int, seed: int) -> None:
    _, edge_index, weight = graph(nodes, edges, seed)
    edge_index[1] = torch.where(edge_index[0] == edge_index[1], (edge_index[1] + 1) % nodes, edge_index[1])
    kept = edge_index[0] != edge_index[1]
    edge_index, weight = edge_index[:, kept], weight[kept]
    W = identity(nodes).index_put_((edge_index[1], edge_index[0]), weight, accumulate=True)
    d = W.sum(1)
    assert_close(dense(Propagation(edge_index, nodes, weight, dtype=DOUBLE)), W / d.sqrt() / d.sqrt()[:, None])
    row = dense(Propagation(edge_index, nodes, weight, normalisation="row", dtype=DOUBLE))
    assert_close(row, W / d[:, None])
    assert_close(row.sum(1), torch.ones(nodes, dtype=DOUBLE))
    bare = dense(Propagation(edge_index, nodes, weight, normalisation="row", self_loops=0.0, dtype=DOUBLE))
    reached = torch.zeros(nodes, dtype=DOUBLE).index_fill_(0, edge_index[1], 1.0)
    assert_close(1 + bare.sum(1), 1 + reached)


@pytest.mark.parametrize("seed", range(4))
def test_convolutions_of_torch_geometric(seed: int) -> None:
    x, edge_index, weight = graph(6, 14, seed)
    conv, gin = GCNConv(3, 2, bias=False).double(), GINConv(torch.nn.Identity(), eps=0.25).double()
    mean = SimpleConv(aggr="mean")
    with torch.no_grad():
        projected = x[0] @ conv.lin.weight.T
        for weights in (None, weight):
            assert_close(Propagation(edge_index, 6, weights, dtype=DOUBLE)(projected), conv(x[0], edge_index, weights))
        assert_close(
            Propagation(edge_index, 6, normalisation="none", self_loops=1.25, dtype=DOUBLE)(x[0]), gin(x[0], edge_index)
        )
        averaged = Propagation(edge_index, 6, normalisation="row", self_loops=0.0, dtype=DOUBLE)(x[0])
        assert_close(averaged, mean(x[0], edge_index))


def test_derivatives() -> None:
    x, edge_index, _ = graph(5, 9, 0)
    propagation = Propagation(edge_index, 5, dtype=DOUBLE)
    x.requires_grad_()
    assert torch.autograd.gradcheck(propagation, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(propagation, x)
    assert_close(torch.func.vmap(propagation)(x).detach(), propagation(x).detach())


def test_the_network_is_that_of_torch_geometric() -> None:
    x, edge_index, weight = graph(6, 14, 0)
    network = gcn(x[0], edge_index, (4, 4, 2), edge_weight=weight, dropout=0.5).eval()
    model = GCN(3, 4, 3, 2).double()
    linear = [module for module in network.network if isinstance(module, torch.nn.Linear)]
    for layer, conv in zip(linear, model.convs, strict=True):
        assert not layer.bias.any()
        layer.bias.data.normal_()
        conv.lin.weight.data, conv.bias.data = layer.weight.data, layer.bias.data
    mask = torch.tensor([True, False, True, True, False, False])
    with torch.no_grad():
        expected = model(x[0], edge_index, weight)
        assert_close(network(torch.tensor([3, 0])), expected[[3, 0]])
        assert_close(network(mask), expected[mask])
    assert isinstance(network, GraphNetwork)
    assert [type(m).__name__ for m in network.network].count("Dropout") == 2


def test_networks_follow_their_generator() -> None:
    x, edge_index, _ = graph(6, 14, 0)

    def weights(seed: int, dtype: torch.dtype) -> list[Tensor]:
        network = gcn(x[0].to(dtype), edge_index, (4, 2), generator=torch.Generator().manual_seed(seed))
        return [p.detach() for p in network.parameters()]

    assert all(torch.equal(a, b.float()) for a, b in zip(weights(0, torch.float32), weights(0, DOUBLE), strict=True))
    assert not torch.equal(weights(0, DOUBLE)[0], weights(1, DOUBLE)[0])
    assert float(weights(0, DOUBLE)[0].abs().max()) <= (6 / 7) ** 0.5


EDGES = torch.tensor([[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 2}, "edges join nodes 0 to 2, but the graph has the nodes 0 to 1"),
        ({"nodes": 0}, "at least one node"),
        ({"nodes": 3, "edge_weight": torch.ones(3)}, "one finite number for each of 2 edges"),
        ({"nodes": 3, "edge_weight": torch.tensor([1.0, float("nan")])}, "one finite number for each of 2 edges"),
        ({"nodes": 3, "edge_weight": torch.tensor([1.0, -3.0])}, "node 2 has the degree -2.*normalisation='none'"),
        ({"nodes": 3, "normalisation": "rows"}, "Did you mean 'row'"),
    ],
)
def test_bad_graphs(arguments: dict[str, Any], message: str, unchecked_types: None) -> None:
    with pytest.raises(ValueError, match=message):
        Propagation(EDGES, **arguments)


def test_features_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"graph of 3 nodes; features \[\*, 3, F\] do not fit \[4, 2\]"):
        Propagation(EDGES, 3)(torch.ones(4, 2))
    with pytest.raises(ValueError, match="edges join nodes"):
        gcn(torch.ones(2, 2), EDGES, (3,))
    with pytest.raises(ValueError, match="sizes are the positive widths"):
        gcn(torch.ones(3, 2), EDGES, ())
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        gcn(torch.ones(3, 2), EDGES, (3,), activation="rele")
