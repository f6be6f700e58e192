"""Options of the advice analysis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from analyses.advice.arms import ARMS
from analyses.several import SeveralProblems
from curvlab.study import check_names, check_positive

PROBLEMS = (
    "digits-mlp",
    "karate-gcn",
    "fashion-mlp",
    "fashion-lenet",
    "cifar10-5k-cnn",
    "cifar10-5k-residual",
    "characters",
    "cora-gcn",
)
"""All training problems, in an order that fixes the seeds of each."""
BATCH: Mapping[str, int] = {"digits-mlp": 64, "characters": 32}
"""Samples of a step, 128 where nothing else is said; graphs are one batch."""


@dataclass(frozen=True, kw_only=True)
class Config(SeveralProblems):
    """Options of the advice analysis. A full run has all problems, all arms and 12 seeds, see the examples."""

    KNOWN = PROBLEMS
    seeds: int = 5
    """How many random seeds each problem is run at (unit: seeds)."""
    arms: tuple[str, ...] = ("advice", "adam")
    """How an optimiser is chosen: advice, adam (tuned in the same budget) and grid (a search at ten times the cost)."""
    budget: float = 10.0
    """Processor time of an advice on one thread; training afterwards has as much (unit: seconds)."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("name in --arms", self.arms, ARMS)
        check_positive(self, "budget")
