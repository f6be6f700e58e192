"""Node classification on one graph, in which nodes are the samples of a problem although they interact."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import unknown_name
from curvlab.nn import HalfSquaredError, gcn
from curvlab.problems.files import RemoteFile, data_folder, fetch
from curvlab.problems.problem import Problem

Split = Literal["public", "full", "complete"]

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")


def _published(name: str, hashes: tuple[str, ...]) -> tuple[RemoteFile, ...]:
    """Return the files of a Planetoid data set, in torch-geometric's layout."""
    names = [f"ind.{name.lower()}.{part}" for part in PARTS]
    return tuple(
        RemoteFile(
            path=f"planetoid/{name}/raw/{file}",
            urls=(f"https://github.com/kimiyoung/planetoid/raw/master/data/{file}",),
            sha256=sha256,
        )
        for file, sha256 in zip(names, hashes, strict=True)
    )


PLANETOID: Mapping[str, tuple[RemoteFile, ...]] = {
    "cora": _published(
        "Cora",
        (
            "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
            "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
            "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
            "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
            "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
            "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
            "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
            "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
        ),
    ),
    "citeseer": _published(
        "CiteSeer",
        (
            "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
            "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
            "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
            "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
            "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
            "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
            "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
            "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
        ),
    ),
    "pubmed": _published(
        "PubMed",
        (
            "fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33",
            "4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d",
            "508e538e2abdccdd54c4d3e9f49d638b4af7107d85845f66ddea5a5152658b7e",
            "e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3",
            "ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd",
            "0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e",
            "5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9",
            "b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5",
        ),
    ),
}

GRAPHS = ("karate", *PLANETOID)
"""Graphs by name."""


@dataclass(frozen=True, eq=False)
class LabelledGraph:
    """A graph whose nodes have features and classes.

    Attributes:
        features: X, rows of sum one.
        edge_index: (source, target) of every edge, both directions of an undirected one.
        labels: classes, counted from 0.
        train: indices of the training nodes.
        validation: of the validation nodes.
        test: of the test nodes.
    """

    features: Float[Tensor, "N F"]
    edge_index: Int[Tensor, "2 E"]
    labels: Int[Tensor, " N"]
    train: Int[Tensor, " _"]
    validation: Int[Tensor, " _"]
    test: Int[Tensor, " _"]

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return int(self.labels.max()) + 1


def load_graph(name: str, split: Split = "public") -> LabelledGraph:
    """Return a graph; the files are read once per process and data folder.

    Args:
        name: one of `GRAPHS`.
        split: "public" as published (Cora 140 training nodes, CiteSeer 120, PubMed 60; 500 validation and 1000 test nodes);
            "full": all others than its validation and test nodes train; "complete": in the order of the nodes, all but 1000
            train, 500 validate, 500 test. karate has one training node a class, "public" only; of the others every third
            validates.

    Raises:
        ValueError: the name or split is unknown.
        DataUnavailable: a file is absent and cannot be fetched, or is damaged; names it.

    Source: Yang, Cohen & Salakhutdinov 2016; Zachary 1977 (karate).
    """
    if name not in GRAPHS:
        raise unknown_name("graph", name, GRAPHS)
    if split not in get_args(Split):
        raise unknown_name("split", split, get_args(Split))
    if name == "karate":
        if split != "public":
            raise ValueError(f"karate has the split 'public' only, not {split!r}.")
        return _karate()
    features, edge_index, labels, train, validation, test = _planetoid(name, data_folder())
    nodes = torch.arange(len(labels), device="cpu")
    if split == "full":
        train = nodes[~torch.isin(nodes, torch.cat([validation, test]))]
    elif split == "complete":
        train, validation, test = nodes[:-1000], nodes[-1000:-500], nodes[-500:]
    return LabelledGraph(features, edge_index, labels, train, validation, test)


def _karate() -> LabelledGraph:
    from torch_geometric.datasets import KarateClub  # its import takes seconds

    data = KarateClub()[0]
    train, others = data.train_mask.nonzero()[:, 0], (~data.train_mask).nonzero()[:, 0]
    third = torch.arange(len(others), device="cpu") % 3 == 0
    return LabelledGraph(data.x, data.edge_index, data.y, train, others[third], others[~third])


@lru_cache(maxsize=3)
def _planetoid(name: str, folder: Path) -> tuple[Tensor, ...]:
    """Read a published graph with torch-geometric, from files whose hashes are checked; nothing is written."""
    paths = [fetch(file, folder) for file in PLANETOID[name]]
    from torch_geometric.io import read_planetoid_data  # its import takes seconds

    data = read_planetoid_data(str(paths[0].parent), name)
    x = data.x / data.x.sum(1, keepdim=True).clamp_min(1)
    masks = (data.train_mask, data.val_mask, data.test_mask)
    return x, data.edge_index, data.y, *(mask.nonzero()[:, 0] for mask in masks)


def graph_problem(
    graph: str,
    *,
    name: str | None = None,
    split: Split = "public",
    width: int = 16,
    depth: int = 2,
    activation: str = "relu",
    dropout: float = 0.0,
    samples: int | None = None,
    test_samples: int | None = None,
    loss: str = "cross-entropy",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return node classification by a graph convolutional network, see `curvlab.nn.gcn`.

    Inputs are indices of nodes, targets their classes; the model is a `curvlab.nn.GraphNetwork`, which holds the graph and
    the features of all nodes. Its initialisation is all that depends on the seed.

    Args:
        graph: one of `GRAPHS`.
        name: of the problem; the graph's with "-gcn" if None.
        split: see `load_graph`.
        width: units of each hidden layer.
        depth: layers L, so L − 1 hidden ones.
        activation: a name in `curvlab.nn.ACTIVATIONS`.
        dropout: probability, after every activation; above 0, call `model.eval()` before asking for curvature.
        samples: training nodes, the first ones of the split; all if None.
        test_samples: test nodes, likewise.
        loss: "cross-entropy", or "half-squared" with 0/1 one-hot targets; both are means over nodes.
        seed: of the network's initialisation.
        dtype: of model and data.

    Raises:
        ValueError: the split has fewer nodes, or an argument is out of its range.
        DataUnavailable: the graph is absent and cannot be fetched, or is damaged.

    Source: Kipf & Welling 2017; with dropout 0.5 the model of Izadi et al. 2020.
    """
    if min(width, depth) < 1:
        raise ValueError(f"width and depth must be at least 1; got {width} and {depth}.")
    if loss not in ("half-squared", "cross-entropy"):
        raise ValueError(f"loss must be 'half-squared' or 'cross-entropy', not {loss!r}.")
    data = load_graph(graph, split)

    def prepared(part: str, nodes: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        count = len(nodes) if count is None else count
        if not 1 <= count <= len(nodes):
            raise ValueError(f"{graph} has {len(nodes)} {part} nodes in the split {split!r}; {count} were asked for.")
        labels = data.labels[nodes[:count]]
        one_hot = F.one_hot(labels, data.classes).to(dtype)
        return nodes[:count], labels if loss == "cross-entropy" else one_hot

    model = gcn(
        data.features.to(dtype),
        data.edge_index,
        (*[width] * (depth - 1), data.classes),
        activation=activation,
        dropout=dropout,
        generator=torch.Generator().manual_seed(seed),
    )
    criterion: nn.Module = nn.CrossEntropyLoss() if loss == "cross-entropy" else HalfSquaredError()
    return Problem(
        name=name or f"{graph}-gcn",
        model=model,
        loss=criterion,
        train=prepared("training", data.train, samples),
        test=prepared("test", data.test, test_samples),
    )
