"""Options of the acceleration analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from curvlab.errors import unknown_name
from curvlab.nn.propagation import Normalisation
from curvlab.problems import GRAPHS
from curvlab.problems.graphs import Split
from curvlab.study import CommonOptions

AGGREGATIONS: dict[str, Normalisation] = {"gcn": "symmetric", "gin": "none"}
"""S by name: D̃^(−1/2)(A + I)D̃^(−1/2), and A + I."""

KARATE_NODES = 16
"""Training nodes drawn on karate, whose split has one node a class, so that a permutation of labels changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the acceleration analysis."""

    problem: str = "karate"
    """Graph: karate, cora, citeseer or pubmed."""
    splits: tuple[str, ...] = ("public",)
    """Splits whose propagated features are looked at: public, full, complete; everything else uses the first."""
    nodes: int | None = None
    """Training nodes, drawn at random for each seed; 0 for those of the split; none means 16 on karate, 0 elsewhere."""
    depths: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    """Depths H (unit: layers)."""
    aggregation: tuple[str, ...] = tuple(AGGREGATIONS)
    """Aggregation matrices: gcn, gin."""
    components: int = 34
    """Principal components of the features that trained models see, and their hidden width; fewer if a graph has fewer."""
    draws: int = 50
    """Random models that each seed draws in the search for counter-examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, values, known in (
            ("--problem", (self.problem,), GRAPHS),
            ("--splits", self.splits, get_args(Split)),
            ("--aggregation", self.aggregation, AGGREGATIONS),
        ):
            if not values:
                raise ValueError(f"{option} needs at least one value.")
            for value in values:
                if value not in known:
                    raise unknown_name(option, value, known)
        if not self.depths or min(self.depths) < 0:
            raise ValueError(f"--depths must be at least one number of layers, 0 or above; got {self.depths}.")
        if self.components < 1:
            raise ValueError(f"--components must be at least 1, got {self.components}.")
        if self.draws < 1:
            raise ValueError(f"--draws must be at least 1, got {self.draws}.")
        if self.nodes is not None and self.nodes != 0 and self.nodes < 2:
            raise ValueError(f"--nodes must be at least 2, or 0 for those of the split; got {self.nodes}.")
        if self.dtype != "float64":
            raise ValueError("--dtype must be float64: flows are integrated to errors that float32 does not resolve.")
        if self.device != "cpu":
            raise ValueError(f"--device must be cpu: flows are integrated by SciPy; got {self.device}.")

    @property
    def drawn_nodes(self) -> int:
        """Training nodes that a seed draws; 0 for those of the split."""
        if self.nodes is None:
            return KARATE_NODES if self.problem == "karate" else 0
        return self.nodes

    @property
    def swept_depths(self) -> tuple[int, ...]:
        """The depths, ascending, each once."""
        return tuple(sorted(set(self.depths)))
