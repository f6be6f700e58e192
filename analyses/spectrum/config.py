"""Options of the spectrum analysis."""

from dataclasses import dataclass, field

from analyses.specs import check_structures, members
from curvlab.problems import swept_arguments
from curvlab.study import CommonOptions, check_bounds

HESSIAN, GGN = "hessian", "ggn"


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the spectrum analysis."""

    problem: str = "digits"
    """Data set and model: a name, or module:function that returns a Problem."""
    width: int = 64
    """Hidden width, where the problem takes one (unit: neurons)."""
    activation: str = "tanh"
    """Activation, where the problem takes one."""
    structures: tuple[str, ...] = field(default_factory=members)
    """Structures to measure beside Hessian and GGN: keys, or module:Class."""
    steps: int = 0
    """Gradient-descent steps at half the stable step size before the spectra are taken (unit: steps)."""
    top: int = 5
    """Eigenvalues from the upper end."""
    probes: int = 6
    """Random vectors of a density; at least 2."""
    lanczos: int = 48
    """Lanczos steps of a density, which set its resolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structures(self.structures, families=False)
        check_bounds(self, width=1, steps=0, top=1, probes=2, lanczos=1)

    @property
    def arguments(self) -> dict[str, object]:
        """Those options that the problem takes."""
        wanted = {"width": self.width, "activation": self.activation}
        return {name: value for name, value in wanted.items() if name in swept_arguments(self.problem)}
