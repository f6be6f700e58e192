"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.jacobian_rank import networks, panels
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.experiments.ball import BALL
from analyses.jacobian_rank.experiments.general import GENERAL
from analyses.jacobian_rank.experiments.generalisation import GENERALISATION
from analyses.jacobian_rank.experiments.kfac import KFAC
from analyses.jacobian_rank.experiments.modes import MODES
from analyses.jacobian_rank.experiments.networks import NETWORKS
from analyses.jacobian_rank.experiments.paths import PATHS
from analyses.jacobian_rank.experiments.rank import RANK
from analyses.jacobian_rank.experiments.structures import STRUCTURES
from analyses.jacobian_rank.experiments.trained import TRAINED
from analyses.jacobian_rank.experiments.training import TRAINING
from analyses.jacobian_rank.experiments.width import WIDTH
from analyses.specs import described
from curvlab.problems import ARGUMENTS, Problem, digest_of, instance
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid


def _problem(config: Config) -> Problem:
    takes = config.takes
    arguments = {"samples": config.samples}
    if not isinstance(takes.get("width"), int):
        arguments["width"] = config.swept_widths[0]
    return instance(config.problem, **{name: value for name, value in arguments.items() if name in takes})


def _subject(config: Config) -> dict[str, object]:
    swept = {"network": "", "widths": config.swept_widths, "activation": config.activation}
    beside = "random unit inputs (ball, kfac, modes, width), digits 4 and 9 (paths), digits 0 to 2 (trained)"
    return described(_problem(config), **(swept if config.swept_widths != (0,) else {}), beside=beside)


_layout = partial(PanelGrid, "python -m analyses.jacobian_rank")

DRIFTS = (("trajectory", "along the run"), ("ball_random", "in the ball, random"))

FIGURES = {
    "rank": _layout([[panels.smallest_eigenvalue, panels.unit_rank]], claims=("rank-",), height=2.6),
    "stability": _layout(
        [[*(partial(panels.drift, at=at, title=title) for at, title in DRIFTS), panels.worst_point]],
        claims=("drift-", "ball-"),
        height=2.6,
    ),
    "rate": _layout(
        [[panels.residual_against_step, panels.steps_against_condition]], claims=("rate-", "modes-"), height=2.8
    ),
    "kfac": _layout([[panels.decay_against_leverage, panels.kfac_error]], claims=("kfac-",), height=2.6),
    "movement": _layout([[panels.movement_ratio]], claims=("movement-",), width="column", height=2.4),
    "paths": _layout([[partial(panels.output_paths, run=run) for run in panels.PATHS]], claims=("paths-",), height=2.8),
    "structures": _layout(
        [[panels.remaining_by_structure, panels.constant_by_structure, panels.distance_by_structure]],
        claims=("faster-", "linear-", "structures-"),
        height=2.9,
    ),
    "networks": _layout(
        [[partial(panels.change_of_networks, network=network) for network in networks.TRAINED]],
        claims=("networks-drift-", "networks-uncovered", "networks-rate-"),
        height=2.4,
    ),
    "width": _layout([[panels.needed_width]], claims=("width-",), width="column", height=2.9),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="jacobian_rank",
    version=4,
    question=(
        "Has the Jacobian of a network full row rank, does it stay so, and does natural gradient then converge at a rate that "
        "knows nothing of the data?"
    ),
    paper="Zhang, Martens & Grosse 2019, Fast Convergence of Natural Gradient Descent for Overparameterized Neural Networks "
    "(arXiv 1905.10961)",
    examples=(
        "--widths 256 1024 --seeds 5    # a quick look at two widths",
        "--activation erf --samples 80  # the smooth twin alone, with more samples",
    ),
    cost="digits 0 and 1, N = 40, widths 256 to 16384, ReLU and erf, 12 seeds: about 7 minutes of processor time, spread over "
    "the cores, and 1.5 GiB a process.",
    config=Config,
    experiments=(
        RANK,
        TRAINING,
        BALL,
        NETWORKS,
        KFAC,
        MODES,
        WIDTH,
        GENERAL,
        PATHS,
        GENERALISATION,
        STRUCTURES,
        TRAINED,
    ),
    subject=_subject,
    data_hash=lambda config: digest_of(_problem(config)),
    figures=FIGURES,
    axes=("widths", "activation", "structures", "published"),
    together=("problem", *ARGUMENTS),
    memory_option="--widths",
)
