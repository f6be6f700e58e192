"""The analysis as one object: its experiment and figures."""

from functools import partial

from analyses.advice import panels
from analyses.advice.config import Config
from analyses.advice.experiment import ADVICE
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid

_layout = partial(PanelGrid, "python -m analyses.advice")

FIGURES = {
    "advice": _layout(
        [[partial(panels.ratios, other="adam"), partial(panels.ratios, other="grid"), panels.advised]],
        claims=("advice-", "adam-", "grid-"),
        height=2.6,
    ),
    "curves": _layout(panels.curves, claims=(), height=1.7, columns=3),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="advice",
    version=1,
    question="Does the advice of curvlab.advise train without divergence, and how far is it from Adam tuned as long, and from a "
    "grid search at ten times the cost?",
    examples=(
        "--seeds 12 --arms advice adam grid --further karate-gcn fashion-mlp fashion-lenet cifar10-5k-cnn cifar10-5k-residual "
        "characters cora-gcn   # in full: about 6 hours of processor time, spread over the cores; resumable",
        "--problem my.module:problem --further --budget 60   # on a problem of one's own",
    ),
    cost="digits and karate, 5 seeds, 10 s an advice: about 4 minutes on 2 cores. The grid search and six more problems are not "
    "measured; figures show the grid search and the MLP on Fashion-MNIST from a run at three seeds that comes with the package.",
    config=Config,
    experiments=(ADVICE,),
    subject=lambda config: {"problems": config.problems, "budget": f"{config.budget:g} s"},
    data_hash=lambda config: config.data_hash,
    figures=FIGURES,
    axes=("problem", "further", "arms"),
    memory_option="--problem",
)
