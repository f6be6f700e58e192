"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

import hashlib

from analyses.assembly import cells_of, claims_of
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.figures import FIGURES
from analyses.gnn_natural_gradient.parts import PARTS
from analyses.gnn_natural_gradient.training import graph_of
from analyses.part import Observations
from curvlab.study import Analysis, Cell

COST = {"karate": 1.0, "cora": 8.0, "citeseer": 20.0, "pubmed": 30.0}
"""Time of an epoch against karate's."""


def _place(cell: Cell) -> tuple[int, str, str]:
    """Tuning comes first, because selected recipes depend on it."""
    return (
        list(PARTS).index(str(cell["part"])),
        str(cell.coordinates.get("split", "")),
        str(cell.coordinates.get("arm", "")),
    )


def _data_hash(config: Config) -> str:
    graph = graph_of(config.problem, "public")
    digest = hashlib.sha256()
    for tensor in (graph.features, graph.edge_index, graph.labels, graph.train, graph.validation, graph.test):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    return COST[config.problem] * PARTS[str(cell["part"])].seconds(config.epochs), 1.5e9


ANALYSIS: Analysis[Config] = Analysis(
    name="gnn_natural_gradient",
    version=1,
    question="Does K-FAC improve the accuracy and the convergence of graph networks, do unlabelled nodes help, and what is due "
    "to damping, width, aggregation and selection?",
    paper="Izadi, Fang, Stevenson & Lin 2020, Optimization of Graph Neural Networks with Natural Gradient Descent "
    "(arXiv 2008.09624)",
    examples=(
        "--seeds 5 --gammas --refreshes                     # a quick look",
        "--problem cora --splits public complete --configurations 8   # the published graph, rivals tuned further",
    ),
    cost="karate, 200 epochs, 4 methods, 5 configurations each, 10 seeds: about 4 minutes of processor time, spread over the "
    "cores.",
    config=Config,
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, _place),
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=("splits", "epsilons", "gammas", "refreshes"),
    memory_option="--problem",
)
