"""Rows on graphs, whose nodes interact: against `torch.func.jacrev` on the model as a whole."""

from typing import Any

import pytest
import torch
from graph_models import FEATURES, MODELS, NODES, OfData, chain, made, of_nodes, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch_geometric.data import Data

from curvlab import jacobian, linearize, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import STRUCTURES, Full
from curvlab.nn import HalfSquaredError, NodesLast, Propagation
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.testing.oracle import assert_close, dense_ggn


class TestNodes:
    @pytest.mark.parametrize("name", MODELS)
    def test_models_as_users_write_them(self, name: str) -> None:
        model, args = made(name), random_graph()
        rows = jacobian(model, args, nodes=NODES)
        assert rows.shape == (CLASSES * 3, 1)
        J = of_nodes(model, args, NODES)
        assert_close(rows.dense(), J)
        assert_close(rows.gram(), J @ J.T)
        assert {type(layer) for layer in rows.layers} <= {KroneckerRows, DenseRows}
        if name != "jumping":
            assert any(isinstance(layer, KroneckerRows) and layer.positions == 7 for layer in rows.layers)

    def test_edge_weights(self) -> None:
        x, edge_index = random_graph()
        model, args = made("gcn"), (x, edge_index, torch.rand(edge_index.shape[1], dtype=DOUBLE))
        assert_close(jacobian(model, args, nodes=NODES).dense(), of_nodes(model, args, NODES))
        named = dict(zip(("x", "edge_index", "edge_weight"), args, strict=True))
        assert_close(jacobian(model, named, nodes=NODES).dense(), of_nodes(model, args, NODES))

    def test_data_masks_and_seeds_of_a_sampled_batch(self) -> None:
        model, (x, edge_index) = OfData().to(DOUBLE), random_graph()
        data = Data(x=x, edge_index=edge_index, batch_size=2)
        mask = torch.zeros(7, dtype=torch.bool)
        mask[[1, 4]] = True
        assert_close(jacobian(model, data, nodes=mask).dense(), of_nodes(model, (data,), torch.tensor([1, 4])))
        seeds = jacobian(model, data, nodes=lambda batch: torch.arange(batch.batch_size))
        assert_close(seeds.dense(), of_nodes(model, (data,), torch.arange(2)))
        two = [(data, torch.tensor([0, 2])), (data, torch.tensor([1, 2]))]
        fitted = Full.fit(model, nn.CrossEntropyLoss(), two, nodes=lambda batch: torch.arange(batch.batch_size))
        rows = sqrt_fisher(model, nn.CrossEntropyLoss(), data, two[0][1], nodes=torch.arange(2))
        assert_close(fitted.to_dense(), rows.dense().T @ rows.dense())

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), HalfSquaredError()])
    def test_exact_rows_give_the_ggn_of_the_loss(self, loss: nn.Module) -> None:
        model, args = made("gcn"), random_graph()
        z = model(*args)[NODES].detach()
        y = torch.randn_like(z) if isinstance(loss, HalfSquaredError) else torch.tensor([0, 2, 1])
        rows = sqrt_fisher(model, loss, args, y, nodes=NODES)
        J = of_nodes(model, args, NODES)
        assert_close(rows.dense().T @ rows.dense(), dense_ggn(J, loss, z, y))
        u = torch.randn(rows.R, dtype=DOUBLE)
        if isinstance(loss, HalfSquaredError):
            assert rows.count == 3
            assert_close(rows.dense().T @ rows.dual(u), J.T @ u)

    def test_empirical_and_sampled_rows(self) -> None:
        model, args, y = made("gcn"), random_graph(), torch.tensor([0, 2, 1])
        loss, J = nn.CrossEntropyLoss(), of_nodes(model, args, NODES)
        rows = sqrt_fisher(model, loss, args, y, "empirical", nodes=NODES)
        p = model(*args)[NODES].detach().softmax(1)
        errors = p - nn.functional.one_hot(y, CLASSES)
        by_node = J.view(CLASSES, 3, -1).transpose(0, 1)
        assert_close(rows.dense(), (errors[:, :, None] * by_node).sum(1) / 3**0.5)
        source = torch.Generator().manual_seed(0)
        many = sqrt_fisher(model, loss, args, y, "mc", draws=4000, generator=source, nodes=NODES)
        exact = sqrt_fisher(model, loss, args, y, nodes=NODES)
        assert_close(many.dense().T @ many.dense(), exact.dense().T @ exact.dense(), 0.1)

    @pytest.mark.parametrize("engine", ["backpack", "autograd"])
    def test_the_chain_of_a_graph_as_one_sample(self, engine: Any) -> None:
        x, edge_index = random_graph()
        network = chain(x, edge_index)
        J = of_nodes(network, (torch.arange(7),), NODES)
        rows = jacobian(network, NODES, engine=engine)
        assert_close(rows.dense(), J)
        one = nn.Sequential(*network.network, NodesLast())
        assert_close(jacobian(one, x[None], nodes=NODES, engine=engine).dense(), J)
        assert one(x[None]).shape == (1, CLASSES, 7)
        y = torch.tensor([0, 2, 1])
        loss = nn.CrossEntropyLoss()
        for S in (
            sqrt_fisher(network, loss, NODES, y, engine=engine),
            sqrt_fisher(one, loss, x[None], y[None], nodes=NODES, engine=engine),
        ):
            assert S.count == 3
            assert_close(S.dense().T @ S.dense(), dense_ggn(J, loss, network(NODES).detach(), y))
        assert_close(jacobian(linearize(network), NODES).dense(), J)

    def test_the_chain_is_that_of_torch_geometric(self) -> None:
        x, edge_index = random_graph()
        network, model = chain(x, edge_index), made("gcn")
        for layer, conv in zip((network.network[1], network.network[4]), (model.first, model.last), strict=True):
            conv.lin.weight.data, conv.bias.data = layer.weight.data, layer.bias.data
        with torch.no_grad():
            assert_close(network(NODES), model(x, edge_index)[NODES])
        assert_close(jacobian(network, NODES).gram(), jacobian(model, (x, edge_index), nodes=NODES).gram())

    @given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 99))
    @settings(max_examples=25)
    def test_random_graphs(self, nodes: int, edges: int, seed: int) -> None:
        x, edge_index = random_graph(nodes, edges, seed)
        chosen = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))[: (nodes + 1) // 2]
        network, model = chain(x, edge_index), made("gcn")
        J = of_nodes(network, (torch.arange(nodes),), chosen)
        for engine in ("backpack", "autograd"):
            assert_close(jacobian(network, chosen, engine=engine).dense(), J)
        args = (x, edge_index)
        assert_close(jacobian(model, args, nodes=chosen).dense(), of_nodes(model, args, chosen))

    def test_renumbered_nodes_have_the_same_rows(self) -> None:
        x, edge_index = random_graph()
        order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
        place = order.argsort()
        model = made("gat")
        rows = jacobian(model, (x, edge_index), nodes=NODES)
        renumbered = jacobian(model, (x[order], place[edge_index]), nodes=place[NODES])
        assert_close(renumbered.dense(), rows.dense())
        chained = jacobian(chain(x[order], place[edge_index]), place[NODES])
        assert_close(chained.dense(), jacobian(chain(x, edge_index), NODES).dense())

    def test_a_graph_without_edges_is_the_plain_network(self) -> None:
        x, none = random_graph()[0], torch.zeros(2, 0, dtype=torch.long)
        network = chain(x, none)
        mlp = nn.Sequential(*(m for m in network.network if not isinstance(m, Propagation)))
        y, loss = torch.arange(7) % CLASSES, nn.CrossEntropyLoss()
        graph = sqrt_fisher(network, loss, torch.arange(7), y)
        samples = sqrt_fisher(mlp, loss, x, y)
        assert_close(graph.dense(), samples.dense())
        for structure in STRUCTURES.values():
            assert_close(structure().update(graph).to_dense(), structure().update(samples).to_dense())
            assert_close(
                structure().update(graph).response(graph, 0.1), structure().update(samples).response(samples, 0.1)
            )


class TestErrors:
    def test_nodes_are_no_samples(self) -> None:
        args = random_graph()
        for name in MODELS:
            with pytest.raises(UnsupportedModel, match=r"7 output vectors for 1 graph.*nodes=.*mask, or indices"):
                jacobian(made(name), args)

    def test_propagation_by_rows_of_an_argument(self) -> None:
        """The features are an input that all nodes share, a row of the matrix is a sample."""

        class Dense(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(FEATURES, CLASSES)

            def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
                return mixing @ torch.tanh(self.layer(x))

        inputs = (random_graph()[0], torch.rand(7, 7, dtype=DOUBLE))
        model = Dense().to(DOUBLE)
        everywhere = torch.arange(7)
        assert_close(jacobian(model, inputs).dense(), of_nodes(model, inputs, everywhere))
        assert_close(jacobian(model, inputs, nodes=NODES).dense(), of_nodes(model, inputs, NODES))

    @pytest.mark.parametrize(
        ("nodes", "message"),
        [
            (torch.zeros(7, dtype=torch.bool), "chooses no node"),
            (torch.zeros(0, dtype=torch.long), "chooses no node"),
            (torch.ones(6, dtype=torch.bool), "mask nodes= has 6 entries, but the model's output has 7 nodes"),
            (torch.tensor([0, 7]), "chooses nodes 0 to 7, but the model's output has the nodes 0 to 6"),
            (torch.ones(7), r"mask \[N\] of bools or indices"),
        ],
    )
    def test_choices_that_do_not_fit(self, nodes: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            jacobian(made("gcn"), random_graph(), nodes=nodes)

    def test_targets_that_do_not_fit(self) -> None:
        loss = nn.CrossEntropyLoss()
        with pytest.raises(ValueError, match=r"7 targets for 3 chosen nodes; .*targets\[nodes\]"):
            sqrt_fisher(made("gcn"), loss, random_graph(), torch.zeros(7, dtype=torch.long), nodes=NODES)
        with pytest.raises(ValueError, match="Target 3 of sample 1 is neither one of the 3 classes"):
            sqrt_fisher(made("gcn"), loss, random_graph(), torch.tensor([0, 3, 0]), nodes=NODES)

    def test_edges_outside_the_nodes(self) -> None:
        x, edge_index = random_graph()
        edge_index[0, 0] = 7
        with pytest.raises(ValueError, match="edges join nodes 0 to 7, but there are features of 7 nodes"):
            jacobian(OfData().to(DOUBLE), Data(x=x, edge_index=edge_index))
