"""Options of the isotropy analysis."""

from dataclasses import dataclass, field
from typing import Literal

from analyses.specs import check_structures
from curvlab.fisher import of_theory
from curvlab.nn import ACTIVATIONS
from curvlab.problems import swept_arguments
from curvlab.study import CommonOptions, check_bounds, check_names, check_positive

Kind = Literal["exact", "mc", "empirical"]

DEFAULT_WIDTHS = (128, 512, 2048)


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the isotropy analysis.

    Depth, activation, kind and outputs vary one at a time at the smallest width, step sizes at the middle one.
    """

    problem: str = "digits"
    """Data set and model: a name, or module:function that returns a Problem."""
    widths: tuple[int, ...] = ()
    """Hidden widths (unit: neurons); none means 128 512 2048, or the problem's own where it has its own."""
    depth: int = 3
    """Number of weight layers."""
    activation: str = "relu"
    """Activation of the hidden layers."""
    structures: tuple[str, ...] = field(default_factory=of_theory)
    """Structures to measure: keys, or module:Class."""
    other_depths: tuple[int, ...] = (2, 4, 5, 6, 7)
    """Depths tried besides, at the smallest width (unit: weight layers)."""
    other_activations: tuple[str, ...] = ("erf", "tanh")
    """Activations tried besides, at the smallest width; in steps of exact natural gradient at every width."""
    other_kinds: tuple[Kind, ...] = ("mc", "empirical")
    """Fisher kinds tried besides the exact one, at the smallest width."""
    other_outputs: tuple[int, ...] = (3,)
    """Numbers of outputs tried besides one, at the smallest width, of K-FAC at the middle one (unit: classes)."""
    step_scales: tuple[float, ...] = (0.1, 0.5, 1.5, 2.2)
    """Step sizes tried besides 1, in units of 1/α, at the middle width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structures(self.structures)
        check_names("activation", (self.activation, *self.other_activations), ACTIVATIONS)
        check_bounds(self, widths=1, depth=2, other_depths=2, other_outputs=2)
        check_positive(self, "step_scales")

    @property
    def takes(self) -> dict[str, object]:
        """Arguments that the problem can vary, with their defaults."""
        return swept_arguments(self.problem)

    @property
    def swept_widths(self) -> tuple[int, ...]:
        """The widths to run, ascending; 0 stands for a problem whose width is fixed."""
        if "width" not in self.takes:
            return (0,)
        if self.widths:
            return tuple(sorted(self.widths))
        own = self.takes["width"]
        generic = ":" not in self.problem and self.problem != "karakida-osawa"
        return DEFAULT_WIDTHS if generic or not isinstance(own, int) else (own,)

    @property
    def middle_width(self) -> int:
        """The width at which everything else varies."""
        return self.swept_widths[len(self.swept_widths) // 2]
