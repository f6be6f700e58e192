"""The analysis as one object: its parts, claims and figures."""

from __future__ import annotations

from analyses.assembly import cells_of, claims_of, digest_of, instance
from analyses.part import Observations
from analyses.training.config import Config
from analyses.training.figures import FIGURES
from analyses.training.parts import PARTS
from curvlab.study import Analysis, Cell, UsageError

RACES = ("tuning", "judging", "timing")
"""Parts whose cells run on the problem, and not on networks of their own."""


def _place(cell: Cell) -> tuple[int, str]:
    """Tuning comes first, because the other races choose by it; runs of one method stand side by side."""
    return list(PARTS).index(str(cell["part"])), str(cell.coordinates.get("method", ""))


def _data_hash(config: Config) -> str:
    problem = instance(config.problem)
    targets = problem.train[1]
    if targets.is_floating_point():
        raise UsageError(
            f"--problem {config.problem} has targets {list(targets.shape)} {targets.dtype}, but races need classes to have an "
            "accuracy to reach: make the targets integers, with a loss such as torch.nn.CrossEntropyLoss"
        )
    return digest_of(problem)


def _measure(cell: Cell, config: Config) -> Observations:
    return PARTS[str(cell["part"])].measure(cell, config)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:
    part = str(cell["part"])
    seconds = PARTS[part].seconds(config.task.steps)
    return seconds * config.task.cost if part in RACES else seconds, 8e8


ANALYSIS: Analysis[Config] = Analysis(
    name="training",
    version=3,
    question=(
        "Does natural gradient with a structure of the Fisher matrix need fewer steps than tuned first-order methods, and less "
        "time? What do single ingredients of K-FAC add, and does the optimiser keep the rates that the theory gives?"
    ),
    paper="Martens & Grosse 2015 (K-FAC), Karakida & Osawa 2020 (equal rates), Zhang, Martens & Grosse 2019 (contraction)",
    examples=(
        "--seeds 5 --structures full kfac --ingredients   # a quick look at two structures",
        "--problem fashion-lenet --races 5                # LeNet on Fashion-MNIST",
    ),
    cost="MLP on the ten digits, 21 methods, 4 configurations each, 8 fresh seeds to race on: about 3 minutes on 2 cores.",
    config=Config,
    claims=claims_of(PARTS),
    cells=cells_of(PARTS, _place),
    data_hash=_data_hash,
    measure=_measure,
    resources=_resources,
    figures=FIGURES,
    axes=("rivals", "structures", "ingredients"),
    memory_option="--batch",
)
