"""The analysis as one object: its experiments and figures."""

from functools import partial

from analyses.training import panels
from analyses.training.config import Config
from analyses.training.experiments.contraction import CONTRACTION
from analyses.training.experiments.isotropic import ISOTROPIC
from analyses.training.experiments.judging import JUDGING
from analyses.training.experiments.timing import TIMING
from analyses.training.experiments.tuning import TUNE
from curvlab.problems import digest_of, instance
from curvlab.study import Analysis, UsageError
from curvlab.study.panels import PanelGrid


def _data_hash(config: Config) -> str:
    problem = instance(config.problem)
    targets = problem.train[1]
    if targets.is_floating_point():
        raise UsageError(
            f"--problem {config.problem} has targets {list(targets.shape)} {targets.dtype}, but races need classes to have an "
            "accuracy to reach: make the targets integers, with a loss such as torch.nn.CrossEntropyLoss"
        )
    return digest_of(problem)


_layout = partial(PanelGrid, "python -m analyses.training")

FIGURES = {
    "curves": _layout(
        [
            [partial(panels.curves, rows=rows, against=against) for against in ("steps", "seconds")]
            for rows in (True, False)
        ],
        claims=(),
        height=2.5,
        columns=5,
    ),
    "targets": _layout(
        [[partial(panels.targets, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=(),
        height=3.7,
    ),
    "wins": _layout(
        [[partial(panels.wins, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("trains-", "steps-", "time-loss", "time-accuracy"),
        height=3.0,
    ),
    "ingredients": _layout(
        [[partial(panels.ingredients, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("ingredient-", "time-step"),
        height=3.0,
    ),
    "rates": _layout([[panels.rates, panels.contraction]], claims=("rate-", "contraction-"), height=2.6),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="training",
    version=6,
    question=(
        "Does natural gradient with a structure of the Fisher matrix need fewer steps than tuned first-order methods, and less "
        "time? What do single ingredients of K-FAC add, and do curvlab's defaults train without tuning?"
    ),
    paper="Martens & Grosse 2015 (K-FAC)",
    examples=(
        "--seeds 5 --structures full kfac --ingredients   # a quick look at two structures",
        "--problem fashion-lenet --seeds 5                # LeNet on Fashion-MNIST",
    ),
    cost=(
        "MLP on the ten digits, 28 methods, 22 of them in 4 configurations each on 3 seeds, 12 fresh ones to judge: about 5 "
        "minutes on 2 cores."
    ),
    config=Config,
    experiments=(TUNE, JUDGING, TIMING, ISOTROPIC, CONTRACTION),
    data_hash=_data_hash,
    figures=FIGURES,
    axes=("rivals", "structures", "defaults", "ingredients"),
    memory_option="--batch",
)
