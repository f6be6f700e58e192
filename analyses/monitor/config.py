"""Options of the monitor analysis."""

from dataclasses import dataclass
from typing import Literal

from analyses.monitor.courses import COURSES
from analyses.several import SeveralProblems
from curvlab.study import check_bounds, check_positive

SHORTEST = 3000
"""Steps over which the learning rate grows at least: claims are about slow growth."""


@dataclass(frozen=True, kw_only=True)
class Config(SeveralProblems):
    """Options of the monitor analysis. The claims are about four problems, see the examples."""

    KNOWN = tuple(COURSES)
    steps: int = 8000
    """Steps of a run, over which the learning rate grows or stays (unit: steps)."""
    ramp: float = 30.0
    """Factor by which the learning rate grows, by as much in each step."""
    budget: float = 0.02
    """Share of the time that the monitor may take."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, steps=SHORTEST)
        check_positive(self, "budget")
        if self.ramp <= 1:
            raise ValueError(f"--ramp is a factor above 1, got {self.ramp}")
