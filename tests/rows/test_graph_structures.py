"""Structures and steps on graphs, of all nodes or of those that a neighbour sampler gives."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from graph_models import HIDDEN, NODES, OfData, chain, of_nodes, random_graph, sampled
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader

from curvlab import compare, jacobian, sqrt_fisher
from curvlab.fisher import KFAC, STRUCTURES, BlockDiagonal, Diagonal, Full, natural_gradient_step
from curvlab.testing.oracle import assert_close, dense_ggn, trainable


class TestStructures:
    def rows_and_fisher(self) -> tuple[Any, Tensor]:
        x, edge_index = random_graph()
        y = torch.tensor([0, 2, 1])
        rows = sqrt_fisher(chain(x, edge_index), nn.CrossEntropyLoss(), NODES, y)
        return rows, rows.dense().T @ rows.dense()

    def test_masks_of_the_dense_matrix(self) -> None:
        rows, fisher = self.rows_and_fisher()
        block = torch.tensor([k for k, layer in enumerate(rows.layers) for _ in range(layer.size)])
        assert_close(Full().update(rows).to_dense(), fisher)
        assert_close(BlockDiagonal().update(rows).to_dense(), fisher * (block[:, None] == block))
        assert_close(Diagonal().update(rows).to_dense(), fisher.diagonal().diag())

    @pytest.mark.parametrize("key", STRUCTURES)
    def test_every_structure_solves(self, key: str) -> None:
        rows, _ = self.rows_and_fisher()
        structure = STRUCTURES[key]().update(rows)
        g = torch.randn(rows.P, dtype=DOUBLE)
        dense = structure.to_dense()
        damped = dense + 0.1 * torch.eye(rows.P, dtype=DOUBLE)
        assert_close(structure.solve(g, 0.1), torch.linalg.solve(damped, g))
        u = torch.randn(rows.R, dtype=DOUBLE)
        lifted = rows.space.flatten(structure.lift(u, 0.1))
        assert_close(lifted, torch.linalg.solve(damped, rows.dense().T @ u))
        J = rows.jacobian().dense()
        assert_close(structure.response(rows.jacobian(), 0.1), J @ torch.linalg.solve(damped, J.T) / 3)

    @pytest.mark.parametrize("engine", ["auto", "autograd"])
    def test_seed_nodes_of_a_sampled_subgraph(self, engine: Any) -> None:
        """What a neighbour sampler gives: seed nodes first, then their sampled neighbours, edges renumbered."""
        x, edge_index = random_graph(20, 60)
        seeds = torch.tensor([11, 4, 7])
        batch = sampled(x, edge_index, seeds, fan_out=2, hops=2)
        assert len(seeds) < batch.num_nodes < 20
        assert torch.equal(batch.x[: len(seeds)], x[seeds])
        model, y = OfData().to(DOUBLE), torch.tensor([0, 2, 1])
        rows = sqrt_fisher(
            model, nn.CrossEntropyLoss(), batch, y, nodes=lambda data: torch.arange(data.batch_size), engine=engine
        )
        J = of_nodes(model, (batch,), torch.arange(len(seeds)))
        z = model(batch).detach()[: len(seeds)]
        assert_close(rows.dense().T @ rows.dense(), dense_ggn(J, nn.CrossEntropyLoss(), z, y))
        assert_close(jacobian(model, batch, nodes=torch.arange(len(seeds)), engine=engine).dense(), J)

    def test_seed_nodes_of_the_neighbour_loader(self) -> None:
        """The same with torch-geometric's own loader."""
        if not any(find_spec(name) for name in ("pyg_lib", "torch_sparse")):
            pytest.skip("NeighborLoader needs the compiled package pyg-lib or torch-sparse")
        x, edge_index = random_graph(20, 60)
        data = Data(x=x, edge_index=edge_index, y=torch.arange(20) % CLASSES)
        model = OfData().to(DOUBLE)
        for batch in NeighborLoader(data, num_neighbors=[2, 2], batch_size=3, input_nodes=torch.tensor([11, 4, 7, 2])):
            rows = jacobian(model, batch, nodes=lambda one: torch.arange(one.batch_size))
            assert_close(rows.dense(), of_nodes(model, (batch,), torch.arange(batch.batch_size)))

    @pytest.mark.parametrize("sharing", ["expand", "reduce", "gradient"])
    def test_kfac_over_nodes(self, sharing: Any) -> None:
        x, edge_index = random_graph()
        network, y = chain(x, edge_index), torch.tensor([0, 2, 1])
        rows = sqrt_fisher(network, nn.CrossEntropyLoss(), NODES, y, "empirical")
        first = network.network[0](x)
        second = network.network[3](torch.tanh(network.network[1](first))).detach()
        blocks = []
        for layer, seen in zip(rows.layers, (first, second), strict=True):
            a = torch.cat([seen, torch.ones(7, 1, dtype=DOUBLE)], dim=1)
            g = layer.g[:, 0, :, 0]
            if sharing == "expand":
                A, B = a.T @ a / 7, torch.einsum("vto,vtp->op", g, g)
            elif sharing == "reduce":
                A, B = a.mean(0).outer(a.mean(0)), torch.einsum("vo,vp->op", g.sum(1), g.sum(1))
            else:
                A, B = a.T @ a / 3, g.sum(0).T @ g.sum(0)
            blocks.append(torch.kron(B, A))
        structure = KFAC(sharing=sharing).update(rows)
        P = rows.layers[0].layout, rows.layers[1].layout
        joined = torch.cat([layout.join(rows.space.unflatten(torch.eye(rows.P, dtype=DOUBLE))) for layout in P], dim=1)
        assert_close(structure.to_dense(), joined @ torch.block_diag(*blocks) @ joined.T)

    def test_the_form_of_izadi(self) -> None:
        """A and G from unscaled gradients of the total loss at every node, and √ε on each factor."""
        x, edge_index = random_graph()
        network, y, eps = chain(x, edge_index), torch.tensor([0, 2, 1]), 0.01
        loss, layer = nn.CrossEntropyLoss(), network.network[4]
        seen: dict[str, Tensor] = {}
        handle = layer.register_forward_hook(lambda *call: seen.update(a=call[1][0][0], h=call[2]))
        summed = nn.functional.cross_entropy(network(NODES), y, reduction="sum")
        handle.remove()
        g = torch.autograd.grad(summed, seen["h"], retain_graph=True)[0][0]
        gradient = torch.autograd.grad(summed / 3, list(layer.parameters()))
        a = torch.cat([seen["a"].detach(), torch.ones(7, 1, dtype=DOUBLE)], dim=1)
        A, G = a.T @ a / 3, g.T @ g / 3
        joined = torch.cat([gradient[0], gradient[1][:, None]], dim=1)
        eye = torch.eye
        expected = torch.linalg.solve(
            G + eps**0.5 * eye(CLASSES, dtype=DOUBLE),
            torch.linalg.solve(A + eps**0.5 * eye(HIDDEN + 1, dtype=DOUBLE), joined.T).T,
        )
        rows = sqrt_fisher(network, loss, NODES, y, "empirical")
        structure = KFAC(sharing="gradient", factored_damping="equal").update(rows)
        gradients = torch.autograd.grad(loss(network(NODES), y), list(network.parameters()))
        everything = dict(zip(trainable(network), gradients, strict=True))
        step = structure.solve(everything, eps)
        assert_close(step["network.4.weight"], expected[:, :-1])
        assert_close(step["network.4.bias"], expected[:, -1])


def test_steps_and_comparisons_take_nodes() -> None:
    """The step of a graph network is that of the dense Fisher matrix, and `compare` finds it isotropic."""
    from torch_geometric.nn import GCN

    torch.manual_seed(0)
    model, loss = GCN(4, 30, 2, 3).double(), nn.CrossEntropyLoss()
    x, edges, nodes = torch.randn(8, 4, dtype=torch.float64), torch.randint(8, (2, 20)), torch.tensor([1, 4, 6])
    targets = torch.randint(3, (3,))
    step = natural_gradient_step(Full(), model, loss, (x, edges), targets, damping=0.1, nodes=nodes)
    S = sqrt_fisher(model, loss, (x, edges), targets, nodes=nodes).dense()
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss(model(x, edges)[nodes], targets), model.parameters())]
    )
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=S.dtype), gradient)
    assert_close(torch.cat([value.flatten() for value in step.values()]), expected, 1e-8)
    table = compare(model, loss, ((x, edges), targets), ("full",), (0.0,), nodes=nodes, steps=0).table
    assert float(table["anisotropy"][0]) < 1e-6
    assert float(table["cosine"][0]) > 1 - 1e-9
