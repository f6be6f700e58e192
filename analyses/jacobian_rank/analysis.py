"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.jacobian_rank import networks, panels
from analyses.jacobian_rank.config import Config
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
from curvlab.problems import ARGUMENTS, data_hash
from curvlab.study import Analysis
from curvlab.study.panels import PanelGrid


def _data_hash(config: Config) -> str:
    takes = config.takes
    arguments = {"samples": config.samples}
    if not isinstance(takes.get("width"), int):
        arguments["width"] = config.swept_widths[0]
    return data_hash(config.problem, **{name: value for name, value in arguments.items() if name in takes})


_layout = partial(PanelGrid, "python -m analyses.jacobian_rank")

DRIFTS = (
    ("trajectory", "along the run"),
    ("ball_random", "in the ball, random"),
    ("ball_trained", "in the ball, along the run"),
)

FIGURES = {
    "rank": _layout([[panels.smallest_eigenvalue, panels.unit_rank]], claims=("rank-",), height=2.6),
    "stability": _layout(
        [[partial(panels.drift, at=at, title=title) for at, title in DRIFTS]], claims=("drift-",), height=2.6
    ),
    "rate": _layout(
        [[panels.residual_against_step, panels.steps_against_condition]], claims=("rate-", "modes-"), height=2.8
    ),
    "kfac": _layout([[panels.decay_against_leverage, panels.kfac_error]], claims=("kfac-",), height=2.6),
    "movement": _layout([[panels.movement_ratio]], claims=("movement-",), width="column", height=2.4),
    "paths": _layout([[partial(panels.output_paths, run=run) for run in panels.PATHS]], claims=("paths-",), height=2.8),
    "structures": _layout(
        [[panels.remaining_by_structure, panels.constant_by_structure, panels.distance_by_structure]],
        claims=("faster-", "stable-", "linear-"),
        height=2.9,
    ),
    "networks": _layout(
        [[partial(panels.change_of_networks, network=network) for network in networks.TRAINED]],
        claims=("networks-drift-", "networks-stable-", "networks-rate-"),
        height=2.4,
    ),
    "width": _layout([[panels.needed_width]], claims=("width-",), width="column", height=2.9),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="jacobian_rank",
    version=3,
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
    cost="digits 0 and 1, N = 40, widths 256 to 16384, ReLU and erf, 12 seeds: about 5 minutes of processor time, spread over "
    "the cores, and 1 GiB a process.",
    config=Config,
    experiments=(RANK, TRAINING, NETWORKS, KFAC, MODES, WIDTH, GENERAL, PATHS, GENERALISATION, STRUCTURES, TRAINED),
    data_hash=_data_hash,
    figures=FIGURES,
    axes=("widths", "activation", "structures"),
    together=("problem", *ARGUMENTS),
    memory_option="--widths",
)
