"""The analysis as one object: its experiments and figures."""

import hashlib
from functools import partial

from analyses.block_structure import panels
from analyses.block_structure.config import MATRICES, Config
from analyses.block_structure.experiments.classes import CLASSES
from analyses.block_structure.experiments.curvature import CURVATURE
from analyses.block_structure.experiments.finite_differences import FINITE
from analyses.block_structure.experiments.kernels import KERNELS
from analyses.block_structure.experiments.one_rate import ONE_RATE
from analyses.block_structure.experiments.quadratics import QUADRATICS
from analyses.block_structure.experiments.races import RACES
from analyses.block_structure.experiments.structures import STRUCTURE
from analyses.specs import described
from curvlab.problems import digest_of, instance
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid


def _subject(config: Config) -> dict[str, object]:
    problem = instance(config.problem, **config.arguments(config.problem))
    found = described(problem, beside=config.beside, training=f"{config.steps} steps of AdamW at {config.rate:g}")
    return found | {"loss terms of curvature": config.terms}


def _data_hash(config: Config) -> str:
    digests = [digest_of(instance(name, **config.arguments(name))) for name in config.compared]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


_layout = partial(PanelGrid, "python -m analyses.block_structure")

FIGURES = {
    "map": _layout([[partial(panels.block_map, matrix=matrix) for matrix in MATRICES]], claims=(), height=2.3),
    "share": _layout(panels.shares, claims=("share-",), height=2.4, columns=3),
    "products": _layout(
        [[panels.products, panels.within]],
        claims=("hessian-", "ggn-", "empirical-", "random-", "dense-", "outputs-"),
        height=2.5,
    ),
    "spectra": _layout(panels.densities, claims=(), height=2.3),
    "heterogeneity": _layout(
        [[panels.distance_normalised, panels.distance_smoothed]],
        claims=("heterogeneity-", "scale-", "smoothing-", "queries-"),
        height=2.6,
    ),
    "steps": _layout(
        [[panels.step_against_share, panels.gain_of_steps, panels.structures]],
        claims=("step-", "share-predicts", "structures-", "undamped", "kernels-"),
        height=2.6,
        columns=6,
    ),
    "classes": _layout([[panels.classes]], claims=("classes-",), width="column", height=2.8, columns=2),
    "optimisers": _layout(
        [[panels.quadratics, panels.one_rate]], claims=("quadratic-", "adam-mini", "partition-"), height=2.5
    ),
    "differences": _layout([[panels.differences]], claims=("difference-",), width="column", height=2.6),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="block_structure",
    version=1,
    question=(
        "Is curvature block-diagonal, does the error of a matrix predict that of its step, and how unlike are the blocks' spectra?"
    ),
    paper="Granziol & Juarev 2026; Zhang, Chen, Ding et al. 2024; Zhang, Chen, Li et al. 2024 (Adam-mini); Dong, Zhang et al. 2025",
    examples=(
        "--beside short-text-cnn short-text-mlp short-text-mixer   # a mixer, too",
        "--depths 1 2 4 --widths 6 8 12                            # the off-block share against depth and width",
        "--races --seeds 6                                         # who wins, SGD or Adam, and what predicts it",
        "--problem digits --width 32 --beside                      # another network, alone",
    ),
    cost="a transformer, convolutions and a perceptron on characters, under 2100 parameters each, 12 seeds: under four minutes.",
    config=Config,
    experiments=(CURVATURE, STRUCTURE, KERNELS, CLASSES, QUADRATICS, ONE_RATE, FINITE, RACES),
    subject=_subject,
    data_hash=_data_hash,
    figures=FIGURES,
    axes=("depths", "widths", "classes", "races"),
    memory_option="--terms",
)
