"""Options of the analysis of natural gradient on graphs."""

from dataclasses import dataclass
from typing import Literal

from analyses.gnn_natural_gradient.recipe import CONFIGURATIONS
from analyses.graphs import GraphOptions
from curvlab.study import check_bounds, check_positive


@dataclass(frozen=True, kw_only=True)
class Config(GraphOptions):
    """Options of the analysis of natural gradient on graphs."""

    seeds: int = 10
    """Runs of each method, each with its own seed; intervals and p-values are taken over them (unit: seeds)."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of training; the quality of the Kronecker form is measured in float64."""
    epochs: int = 200
    """Epochs E of a run, steps on the whole graph (unit: epochs)."""
    configurations: int = 5
    """Configurations that every method is tuned over, the first of its list (unit: configurations)."""
    starts: int = 2
    """Runs of each configuration, with seeds that no other run has, whose validation accuracy is averaged (unit: runs)."""
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
