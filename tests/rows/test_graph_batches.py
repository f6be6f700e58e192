"""Batches of graphs, which are samples again; some have no edges."""

import pytest
import torch
from graph_models import FEATURES, HIDDEN, random_graph, reference
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Batch, Data
from torch_geometric.nn import (
    GCNConv,
    GINEConv,
    global_add_pool,
    global_mean_pool,
)
from torch_geometric.nn.models import SchNet

from curvlab import jacobian, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import STRUCTURES
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows
from curvlab.testing.oracle import assert_close


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
