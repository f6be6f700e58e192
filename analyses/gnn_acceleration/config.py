"""Options of the acceleration analysis."""

from dataclasses import dataclass

from analyses.graphs import GraphOptions
from curvlab.nn.propagation import Normalisation
from curvlab.study import check_bounds, check_names, check_some

AGGREGATIONS: dict[str, Normalisation] = {"gcn": "symmetric", "gin": "none"}
"""S by name: D̃^(−1/2)(A + I)D̃^(−1/2), and A + I."""

KARATE_NODES = 16
"""Training nodes drawn on karate, whose split has one node a class, so that a permutation of labels changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Config(GraphOptions):
    """Options of the acceleration analysis."""

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
        check_some(self, "aggregation", "depths")
        check_names("--aggregation", self.aggregation, AGGREGATIONS)
        check_bounds(self, depths=0, components=1, draws=1)
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

    @property
    def propagations(self) -> int:
        """The most propagations of the features that are looked at: the largest depth, but one at least."""
        return max(*self.depths, 1)
