"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

import hashlib

from analyses.assembly import cells_of, claims_of
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.figures import FIGURES
from analyses.gnn_acceleration.parts import PARTS
from analyses.gnn_acceleration.setting import graph_of
from analyses.part import Observations
from curvlab.study import Analysis, Cell


def _order(cell: Cell) -> list[str]:
    return [str(cell.coordinates.get(name, "")) for name in ("part", "aggregation", "form", "split")]


def _data_hash(config: Config) -> str:
    digest = hashlib.sha256()
    for split in config.splits:
        graph = graph_of(config.problem, split)
        for tensor in (graph.features, graph.edge_index, graph.labels, graph.train):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    # The complete split of the largest graph has 18 717 training nodes.
    memory = 2e9 if config.problem == "karate" or config.splits == ("public",) else 1.5e10
    return PARTS[str(cell["part"])].seconds(int(cell.coordinates.get("depth", 0))), memory


ANALYSIS: Analysis[Config] = Analysis(
    name="gnn_acceleration",
    version=1,
    question="Do skip connections, depth and labels that fit the graph make graph networks train faster, and do the bounds on "
    "the loss along gradient flow hold?",
    paper="Xu, Zhang, Jegelka & Kawaguchi 2021, Optimization of Graph Neural Networks: Implicit Acceleration by Skip "
    "Connections and More Depth (arXiv 2105.04550)",
    examples=(
        "--depths 1 2 --seeds 5                   # a quick look at two depths",
        "--problem cora --splits public full      # a published graph, the singular values of two splits",
    ),
    cost="karate, 16 training nodes, depths 0 to 6, GCN and GIN, 12 seeds: about 4 minutes of processor time, spread over the "
    "cores, and 0.5 GiB a process.",
    config=Config,
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, _order),
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    memory_option="--splits",
)
