"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.gnn_natural_gradient import panels
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments.ablations import ABLATIONS
from analyses.gnn_natural_gradient.experiments.accuracy import ACCURACIES
from analyses.gnn_natural_gradient.experiments.kronecker import KRONECKER
from analyses.gnn_natural_gradient.experiments.sensitivity import SENSITIVITY
from analyses.gnn_natural_gradient.experiments.timing import TIMING
from analyses.gnn_natural_gradient.experiments.tuning import TUNING
from analyses.gnn_natural_gradient.experiments.unlabelled import UNLABELLED
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION_LOSS
from analyses.graphs import described, digest_of, graph_of
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid

COST = {"karate": 1.0, "cora": 8.0, "citeseer": 20.0, "pubmed": 30.0}
"""Time of an epoch against karate's."""


def _subject(config: Config) -> dict[str, object]:
    drawn = {} if config.published else {"splits": "drawn by each seed, as many nodes of each class for training"}
    network = "two graph convolutions, 16 hidden units, ReLU, dropout 0.5"
    return {**described(config), **drawn, "network": network, "epochs": config.epochs}


_layout = partial(PanelGrid, "python -m analyses.gnn_natural_gradient")

FIGURES = {
    "accuracy": _layout(
        [[panels.accuracy, panels.epochs, partial(panels.epochs, seconds=True)]],
        claims=("epochs-", "seconds-", "headline-"),
        height=2.6,
    ),
    "curves": _layout(
        [
            [
                partial(panels.curves, quantity=quantity, choice=choice)
                for quantity in (VALIDATION_LOSS, ACCURACY)
            ]
            for choice in ("published", "selected")
        ],
        claims=("reach-",),
        height=2.3,
    ),
    "changes": _layout([[panels.changes, panels.unlabelled]],
                       claims=("accuracy-", "lambda-", "width-", "aggregation", "labels"), height=2.8, columns=3),
    "sensitivity": _layout([[panels.epsilon, panels.refresh, panels.joint]], claims=("sensitivity-", "selection-"), height=2.5),
    "kronecker": _layout(
        [[panels.errors, *(partial(panels.cosines, space=space) for space in ("parameters", "outputs"))]],
        claims=("kronecker-",),
        height=2.4,
    ),
}  # fmt: skip

ANALYSIS: Analysis[Config] = Analysis(
    name="gnn_natural_gradient",
    version=3,
    question="Does K-FAC improve the accuracy and the convergence of graph networks, do unlabelled nodes help, and what is due "
    "to damping, width, aggregation and selection?",
    paper="Izadi, Fang, Stevenson & Lin 2020, Optimization of Graph Neural Networks with Natural Gradient Descent "
    "(arXiv 2008.09624)",
    examples=(
        "--seeds 5 --gammas --refreshes                     # a quick look",
        "--problem cora --splits public complete --configurations 8   # a published graph, rivals tuned further",
    ),
    cost="karate, 200 epochs, 4 methods, 5 configurations each, 24 seeds: about 9 minutes of processor time, spread over the "
    "cores.",
    config=Config,
    experiments=(TUNING, ACCURACIES, TIMING, UNLABELLED, ABLATIONS, SENSITIVITY, KRONECKER),
    subject=_subject,
    data_hash=lambda config: digest_of([graph_of(config.problem, "public")]),
    figures=FIGURES,
    axes=("splits", "epsilons", "gammas", "refreshes"),
    effort=lambda _, config: COST[config.problem],
)
