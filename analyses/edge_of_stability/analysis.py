"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.edge_of_stability import panels
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.experiments import published
from analyses.edge_of_stability.experiments.chebyshev import CHEBYSHEV
from analyses.edge_of_stability.experiments.flow import FLOW
from analyses.edge_of_stability.experiments.losses import LOSSES
from analyses.edge_of_stability.experiments.preconditioned import PRECONDITIONED
from analyses.edge_of_stability.experiments.quadratic import QUADRATIC
from analyses.edge_of_stability.experiments.schedules import SCHEDULES
from analyses.edge_of_stability.experiments.structures import STRUCTURES
from analyses.edge_of_stability.experiments.training import BATCHES, TRAINING
from analyses.edge_of_stability.points import effort
from analyses.edge_of_stability.setting import ARGUMENTS, setting_of
from analyses.specs import described
from curvlab.problems import Problem, data_hash, digest_of
from curvlab.problems.images import IMAGE_SETS, load_images
from curvlab.study import Analysis, Cell, UsageError
from curvlab.study.panels import PanelGrid


def _problem(config: Config) -> Problem:
    try:
        return setting_of(Cell({"problem": config.problem, "seed": 0}), config).problem
    except ValueError as error:
        raise UsageError(f"--problem {config.problem} with --samples {config.samples}: {error}") from error


def _subject(config: Config) -> dict[str, object]:
    named = {"network": config.network, "width": config.width, "depth": config.depth, "scaling": config.scaling}
    return described(_problem(config), **(named if config.problem in IMAGE_SETS else {}), steps=config.steps)


def _data_hash(config: Config) -> str:
    if config.published:
        load_images(str(published.SETTING["problem"]))
    return digest_of(_problem(config)) if config.problem in IMAGE_SETS else data_hash(config.problem)


_layout = partial(PanelGrid, "python -m analyses.edge_of_stability")

FIGURES = {
    "edge": _layout(
        [[panels.loss_against_step, panels.sharpness_against_step]],
        claims=("edge-gd", "sharpening-gd", "plateaus", "loss-"),
        height=2.5,
    ),
    "momentum": _layout(
        [
            [partial(panels.loss_against_step, optimiser=name), partial(panels.sharpness_against_step, optimiser=name)]
            for name in ("heavy-ball", "nesterov")
        ],
        claims=("edge-heavy", "edge-nesterov"),
    ),
    "plateaus": _layout([[panels.plateaus, panels.ratios]], claims=("plateaus", "edge-", "above-"), height=2.7),
    "flow": _layout([[panels.flow_sharpness, panels.flow_distance]], claims=("flow-",), height=2.5),
    "alignment": _layout([[panels.alignment_against_step]], claims=("alignment-",), width="column", height=2.4),
    "schedules": _layout(
        [[panels.catapults, panels.dropped_rate, panels.late_drop]], claims=("catapult-", "drop-", "late-"), height=2.4
    ),
    "structures": _layout(panels.largest, claims=("predicts-", "tracks-"), height=1.9),
    "preconditioned": _layout(
        [[partial(panels.preconditioned, mode="frozen"), partial(panels.preconditioned, mode="live")]],
        claims=("preconditioned-", "natural-"),
        height=2.5,
    ),
    "chebyshev": _layout([[panels.chebyshev]], claims=("chebyshev-",), width="column", height=2.4),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="edge_of_stability",
    version=5,
    question=(
        "Does full-batch training sharpen until its optimiser is just stable, and stay there? And do natural gradient and its "
        "approximations have an edge of their own?"
    ),
    paper="Cohen, Kaur, Li, Kolter & Talwalkar 2021, Gradient Descent on Neural Networks Typically Occurs at the Edge of "
    "Stability (arXiv 2103.00065)",
    examples=(
        "--seeds 4 --steps 500  # a quick look",
        "--problem cifar10-5k --scaling standardised --samples 5000 --width 200 --etas 0.01 0.02 --steps 9000 --dtype float32 "
        "--device cuda  # the paper's network",
    ),
    cost="digits, N = 128, tanh network 64-64-64-10, runs of 1200 steps, 12 seeds: about 7 minutes of processor time, spread over "
    "the cores.",
    config=Config,
    experiments=(
        QUADRATIC,
        TRAINING,
        BATCHES,
        FLOW,
        SCHEDULES,
        LOSSES,
        STRUCTURES,
        PRECONDITIONED,
        CHEBYSHEV,
        published.PUBLISHED,
    ),
    subject=_subject,
    data_hash=_data_hash,
    figures=FIGURES,
    axes=("heavy_ball", "nesterov", "adam", "batch_size", "preconditioners", "published", "published_seeds"),
    together=("problem", *ARGUMENTS),
    effort=effort,
    memory_option="--samples",
)
