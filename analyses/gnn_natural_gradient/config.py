"""Options of the analysis of natural gradient on graphs."""

from dataclasses import dataclass
from typing import Literal

from analyses.gnn_natural_gradient.recipe import CONFIGURATIONS
from analyses.graphs import GraphOptions
from curvlab.study import check_bounds, check_positive
from curvlab.study.claims import Group
from curvlab.study.experiment import Varied


@dataclass(frozen=True, kw_only=True)
class Config(GraphOptions):
    """Options of the analysis of natural gradient on graphs."""

    seeds: int | Literal["auto"] = 24
    """Runs of each method, each with its own seed, or auto: 12, then 24 and 48 where that does not decide. A test node of karate
    is worth five points of accuracy, so that a dozen runs decide little (unit: seeds)."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of training; the quality of the Kronecker form is measured in float64."""
    epochs: int = 200
    """Epochs E of a run, steps on the whole graph (unit: epochs)."""
    configurations: int = 5
    """Configurations that every method is tuned over, the first of its list (unit: configurations)."""
    starts: int = 4
    """Runs of each configuration, with streams that no judged run has, whose validation accuracy is averaged (unit: runs)."""
    epsilons: tuple[float, ...] = (0.1, 1.0)
    """Dampings ε beside the published 0.01."""
    gammas: tuple[float, ...] = (1.0, 4.0)
    """Powers γ of the schedule λ = (epoch/E)^γ with which unlabelled nodes gain weight."""
    refreshes: tuple[int, ...] = (4, 128)
    """Refresh intervals of the curvature beside the published 50 (unit: epochs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, configurations=(1, CONFIGURATIONS), epochs=1, starts=1)
        check_positive(self, "epsilons", "gammas", "refreshes")

    @property
    def varies(self) -> tuple[Varied, ...]:
        """What a seed varies: the split of karate, which has no published one, and dropout on every graph."""
        return ("initialisation", *(() if self.published else ("split",)), "draws")

    @property
    def published(self) -> bool:
        """Whether the graph is one of the paper's."""
        return self.problem != "karate"

    @property
    def group(self) -> Group:
        """What claims of the paper are here: on a graph that it has not, they are derived."""
        return "paper" if self.published else "derived"

    def place(self, split: str) -> str:
        """Where a run is made, in words."""
        return f"{self.problem}, {f'{split} split' if self.published else 'a split drawn by the seed'}"
