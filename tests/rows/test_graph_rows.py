"""Rows on graphs, whose nodes interact: against `torch.func.jacrev` on the model as a whole."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch_geometric.data import Batch, Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import (
    GATConv,
    GCNConv,
    GINConv,
    GINEConv,
    JumpingKnowledge,
    MessagePassing,
    SAGEConv,
    global_add_pool,
    global_mean_pool,
)
from torch_geometric.nn.models import SchNet

from curvlab import compare, jacobian, linearize, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC, STRUCTURES, BlockDiagonal, Diagonal, Full, natural_gradient_step
from curvlab.nn import GraphNetwork, HalfSquaredError, NodesLast, Propagation, gcn
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.testing.oracle import assert_close, dense_ggn, trainable

FEATURES, HIDDEN = 4, 5


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


class Pooled(nn.Module):
    """Molecules: edge features through a layer of their own, pooled and read out."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.kind, self.conv = nn.Embedding(3, HIDDEN), GINEConv(inner, edge_dim=2, train_eps=True)
        self.more, self.last = GCNConv(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.kind(x), edge_index, edge_attr))
        return self.last(global_mean_pool(torch.tanh(self.more(h, edge_index)), batch))


class PooledData(Pooled):
    def forward(self, data: Data) -> Tensor:  # type: ignore[override]
        batch = torch.zeros(len(data.x), dtype=torch.long) if data.batch is None else data.batch
        return super().forward(data.x, data.edge_index, data.edge_attr, batch)


def molecules() -> list[Data]:
    generator = torch.Generator().manual_seed(0)
    return [
        Data(
            x=torch.randint(3, (nodes,), generator=generator),
            edge_index=torch.randint(nodes, (2, edges), generator=generator),
            edge_attr=torch.randn(edges, 2, generator=generator, dtype=DOUBLE),
        )
        for nodes, edges in ((3, 4), (5, 7), (1, 0), (4, 9))
    ]


class TestGraphs:
    def test_rows_of_a_batch(self) -> None:
        torch.manual_seed(0)
        model = PooledData().to(DOUBLE)
        batch = Batch.from_data_list(molecules())
        rows = jacobian(model, batch)
        assert rows.shape == (CLASSES, 4)
        J = reference(model, lambda p: functional_call(model, p, (batch,)))
        assert_close(rows.dense(), J)
        assert_close(rows.gram(), J @ J.T)
        alone = [jacobian(model, data) for data in molecules()]
        assert_close(torch.stack([part.dense() for part in alone], 1).flatten(0, 1), J)
        stacked = alone[0] + alone[1] + alone[2] + alone[3]
        assert_close(stacked.gram(), J @ J.T)
        plain = Pooled().to(DOUBLE)
        plain.load_state_dict(model.state_dict())
        args = (batch.x, batch.edge_index, batch.edge_attr, batch.batch)
        assert_close(jacobian(plain, args).dense(), J)
        names = ("x", "edge_index", "edge_attr", "batch")
        assert_close(jacobian(plain, dict(zip(names, args, strict=True))).dense(), J)
        kinds = {layer.name: type(layer).__name__ for layer in rows.layers}
        assert kinds["conv.nn.0"] == kinds["conv.lin"] == kinds["more.lin"] == kinds["last"] == "KroneckerRows"
        assert kinds["kind"] == "EmbeddingRows"
        assert kinds["conv"] == kinds["more"] == "DenseRows"

    @pytest.mark.parametrize("key", STRUCTURES)
    def test_a_batch_is_its_graphs(self, key: str) -> None:
        torch.manual_seed(0)
        model, loss, y = PooledData().to(DOUBLE), nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0])
        one = (Batch.from_data_list(molecules()), y)
        parts = [(Batch.from_data_list(molecules()[k : k + 2]), y[k : k + 2]) for k in (0, 2)]
        for options in ({}, {"sharing": "reduce"}, {"sharing": "gradient"}) if "kfac" in key else ({},):
            together = STRUCTURES[key].fit(model, loss, one, **options)
            apart = STRUCTURES[key].fit(model, loss, parts, **options)
            assert_close(apart.to_dense(), together.to_dense())

    def test_entries_that_are_neither_nodes_nor_edges_get_dense_rows(self) -> None:
        class Pairs(nn.Module):
            """A layer over all pairs of nodes of a graph."""

            def __init__(self) -> None:
                super().__init__()
                self.pair, self.last = nn.Linear(2 * FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)

            def forward(self, data: Data) -> Tensor:
                i, j = (data.batch[:, None] == data.batch).nonzero().T
                h = torch.tanh(self.pair(torch.cat([data.x[i], data.x[j]], dim=1)))
                return self.last(global_add_pool(h, data.batch[i]))

        model = Pairs().to(DOUBLE)
        graphs = [Data(x=random_graph(n)[0], edge_index=torch.zeros(2, 0, dtype=torch.long)) for n in (2, 3)]
        batch = Batch.from_data_list(graphs)
        rows = jacobian(model, batch)
        assert [type(layer) for layer in rows.layers] == [DenseRows, KroneckerRows]
        assert_close(rows.dense(), reference(model, lambda p: functional_call(model, p, (batch,))))


class TestGraphsWithoutEdges:
    """Point clouds: a graph is known by the argument `batch` alone, its edges are found inside."""

    BATCH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])

    def made(self) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
        def near(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            i, j = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
            return torch.stack([i, j]), (pos[i] - pos[j]).norm(dim=1)

        torch.manual_seed(0)
        model = SchNet(
            hidden_channels=4, num_filters=3, num_interactions=1, num_gaussians=3, cutoff=5.0, interaction_graph=near
        )
        return model.to(DOUBLE), (torch.randint(1, 5, (9,)), torch.randn(9, 3, dtype=DOUBLE), self.BATCH)

    def by_graph(self, model: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        z, pos, batch = args
        parameters = list(model.parameters())
        rows = []
        for n in range(3):
            (out,) = model(z[batch == n], pos[batch == n])[0]
            found = torch.autograd.grad(out, parameters, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(parameters, found, strict=True)
                    ]
                )
            )
        return torch.stack(rows)

    def test_schnet(self) -> None:
        model, args = self.made()
        rows = jacobian(model, args)
        assert rows.shape == (1, 3)
        assert_close(rows.dense(), self.by_graph(model, args))
        kinds = {layer.name: type(layer) for layer in rows.layers}
        assert kinds["lin1"] is kinds["interactions.0.conv.lin1"] is KroneckerRows
        assert kinds["interactions.0.mlp.0"] is DenseRows
        loss, targets = nn.MSELoss(), torch.randn(3, 1, dtype=DOUBLE)
        S = sqrt_fisher(model, loss, dict(zip(("z", "pos", "batch"), args, strict=True)), targets)
        assert_close(S.gram(), 2 / 3 * rows.gram())

    def test_labels_named_batch_are_of_samples(self) -> None:
        class OfLabels(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.shift = nn.Linear(FEATURES, CLASSES), nn.Embedding(3, CLASSES)

            def forward(self, x: Tensor, batch: Tensor) -> Tensor:
                return torch.tanh(self.layer(x) + self.shift(batch))

        model, x = OfLabels().to(DOUBLE), torch.randn(4, FEATURES, dtype=DOUBLE)
        args = (x, torch.tensor([2, 0, 0, 1]))
        assert_close(jacobian(model, args).dense(), reference(model, lambda p: functional_call(model, p, args)))
        with pytest.raises(UnsupportedModel, match=r"4 output vectors for 2 graphs.*give the argument `batch` another"):
            jacobian(model, (x, torch.tensor([0, 0, 1, 1])))


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
    table = compare(model, loss, ((x, edges), targets), ("full",), (0.0,), nodes=nodes)
    assert float(table["anisotropy"][0]) < 1e-6
    assert float(table["cosine"][0]) > 1 - 1e-9
