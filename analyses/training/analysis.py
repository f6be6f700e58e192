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
        columns=6,
    ),
    "targets": _layout(
        [[partial(panels.targets, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("steps-", "time-loss", "time-accuracy"),
        height=3.2,
    ),
    "ingredients": _layout(
        [[partial(panels.ingredients, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("ingredient-", "time-step"),
        height=2.2,
    ),
    "rates": _layout(
        [[panels.equal_rates, panels.contraction]], claims=("rate-", "equal-rate-", "contraction-"), height=2.6
    ),
}

ANALYSIS: Analysis[Config] = Analysis(
    name="training",
    version=4,
    question=(
        "Does natural gradient with a structure of the Fisher matrix need fewer steps than tuned first-order methods, and less "
        "time? What do single ingredients of K-FAC add, and does the optimiser keep the rates that the theory gives?"
    ),
    paper="Martens & Grosse 2015 (K-FAC), Karakida & Osawa 2020 (equal rates), Zhang, Martens & Grosse 2019 (contraction)",
    examples=(
        "--seeds 5 --structures full kfac --ingredients   # a quick look at two structures",
        "--problem fashion-lenet --races 5                # LeNet on Fashion-MNIST",
    ),
    cost="MLP on the ten digits, 22 methods, 4 configurations each, 8 fresh seeds to race on: about 3 minutes on 2 cores.",
    config=Config,
    experiments=(TUNE, JUDGING, TIMING, ISOTROPIC, CONTRACTION),
    data_hash=_data_hash,
    figures=FIGURES,
    axes=("rivals", "structures", "ingredients"),
    memory_option="--batch",
)
