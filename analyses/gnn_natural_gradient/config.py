"""Options of the analysis of natural gradient on graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from analyses.gnn_natural_gradient.recipe import CONFIGURATIONS
from curvlab.errors import unknown_name
from curvlab.problems import GRAPHS
from curvlab.problems.graphs import Split
from curvlab.study import CommonOptions


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the analysis of natural gradient on graphs."""

    problem: str = "karate"
    """Graph: karate, cora, citeseer or pubmed."""
    seeds: int = 10
    """Runs of each method, each with its own seed; intervals and p-values are taken over them (unit: seeds)."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of training; the quality of the Kronecker form is measured in float64."""
    splits: tuple[str, ...] = ("public",)
    """Splits on which methods are compared: public, full, complete; everything else uses the first."""
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
        for option, values, known in (
            ("--problem", (self.problem,), GRAPHS),
            ("--splits", self.splits, get_args(Split)),
        ):
            if not values:
                raise ValueError(f"{option} needs at least one value.")
            for value in values:
                if value not in known:
                    raise unknown_name(option, value, known)
        if not 1 <= self.configurations <= CONFIGURATIONS:
            raise ValueError(f"--configurations must be from 1 to {CONFIGURATIONS}, got {self.configurations}.")
        for option in ("epochs", "starts"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option} must be at least 1, got {getattr(self, option)}.")
        for option in ("epsilons", "gammas", "refreshes"):
            if any(value <= 0 for value in getattr(self, option)):
                raise ValueError(f"--{option} must be positive, got {getattr(self, option)}.")
