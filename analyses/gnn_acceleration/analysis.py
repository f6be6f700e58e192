"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.gnn_acceleration import panels
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.experiments.conditioning import CONDITIONING
from analyses.gnn_acceleration.experiments.flows import FLOWS
from analyses.gnn_acceleration.experiments.identities import IDENTITIES
from analyses.gnn_acceleration.experiments.labels import LABELS
from analyses.gnn_acceleration.experiments.relu import RELU
from analyses.gnn_acceleration.experiments.search import SEARCH
from analyses.graphs import described, digest_of, graph_of
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid


def _subject(config: Config) -> dict[str, object]:
    drawn = {"nodes": f"{config.drawn_nodes} training nodes, drawn for each seed"} if config.drawn_nodes else {}
    swept = {"aggregation": config.aggregation, "depths": config.swept_depths}
    return {**described(config), **drawn, **swept, "hidden width": "that of the features; 32 of ReLU networks"}


_layout = partial(PanelGrid, "python -m analyses.gnn_acceleration")

FIGURES = {
    "conditioning": _layout(
        [[partial(panels.singular_values, aggregation=aggregation) for aggregation in ("gcn", "gin")]],
        claims=("conditioning-", "rank-"),
        height=2.6,
    ),
    "bounds": _layout([[panels.looseness, panels.floors]], claims=("bound-", "floor-", "flow-"), height=2.7),
    "acceleration": _layout(
        [
            [partial(panels.acceleration, experiment="flows", change=change) for change in ("skip", "depth")],
            [partial(panels.slower, change=change) for change in ("skip", "depth")],
        ],
        claims=("skip-", "depth-"),
        height=2.4,
    ),
    "labels": _layout(
        [[partial(panels.permutation, targets=targets) for targets in ("one-hot", "centred")]],
        claims=("labels-",),
        height=2.4,
    ),
    "relu": _layout(
        [[partial(panels.acceleration, experiment="relu", change=change) for change in ("skip", "depth", "labels")]],
        claims=("relu-",),
        height=2.4,
    ),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="gnn_acceleration",
    version=4,
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
    experiments=(IDENTITIES, FLOWS, SEARCH, CONDITIONING, LABELS, RELU),
    subject=_subject,
    data_hash=lambda config: digest_of(graph_of(config.problem, split) for split in config.splits),
    figures=FIGURES,
    together=("aggregation", "form", "split"),
    memory_option="--splits",
)
