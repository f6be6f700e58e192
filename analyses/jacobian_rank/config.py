"""Options of the Jacobian-rank analysis."""

from dataclasses import dataclass, field

from analyses.specs import check_structures, members
from curvlab.problems import swept_arguments
from curvlab.study import CommonOptions, check_bounds, check_names, check_some

DEFAULT_WIDTHS = (256, 1024, 4096, 16384)
"""Three factors of four, which a slope against width needs."""

ACTIVATIONS = ("relu", "erf")
"""Activations with a limit kernel in closed form: the paper's, and its smooth twin."""


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the Jacobian-rank analysis."""

    problem: str = "two-layer"
    """Data set and model: a name, or module:function that returns a Problem with one output and a half squared error."""
    widths: tuple[int, ...] = ()
    """Hidden widths (unit: neurons); none means 256 1024 4096 16384, or the problem's own where it has its own."""
    activation: tuple[str, ...] = ACTIVATIONS
    """Activations, each at every width: relu as in the paper, erf as its smooth twin."""
    samples: int = 40
    """Number of training samples N (unit: samples)."""
    structures: tuple[str, ...] = field(default_factory=members)
    """Structures to measure: keys, or module:Class."""
    published: bool = False
    """Follow paths in the output space of the paper's network on MNIST, too: 6000 units in two layers, two minutes a seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structures(self.structures, families=False)
        check_names("activation", self.activation, ACTIVATIONS)
        check_some(self, "activation")
        check_bounds(self, widths=1, samples=2)

    @property
    def takes(self) -> dict[str, object]:
        """Arguments that the problem can vary, with their defaults."""
        return swept_arguments(self.problem)

    @property
    def swept_widths(self) -> tuple[int, ...]:
        """The widths to run, ascending; 0 stands for a problem whose width is fixed."""
        if "width" not in self.takes:
            return (0,)
        return tuple(sorted(self.widths)) or DEFAULT_WIDTHS
