"""Options of the training analysis."""

from dataclasses import dataclass, field, replace
from typing import Literal

from analyses.specs import check_structures
from analyses.training.methods import CONFIGURATIONS, DEFAULTS, METHODS, RIVALS, VARIANTS, Entrant, in_order
from analyses.training.races import RACES, USUAL, Race
from curvlab.fisher import of_theory
from curvlab.study import CommonOptions, check_bounds, check_names


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the training analysis; a race's own are fixed by the problem unless said otherwise."""

    first_seed: int = 1001
    """The first of them; configurations were laid around the run from seed 1000 (unit: seeds)."""
    problem: str = "digits-mlp"
    """Data set and model: a name, or module:function that returns a Problem whose targets are classes."""
    dtype: Literal["float64", "float32"] = "float32"
    """Floating-point precision of the races; the theory's rates are measured in float64."""
    configurations: int = 4
    """Configurations that every method but the defaults is tuned over, the first of its list (unit: configurations)."""
    starts: int = 3
    """Runs of each configuration, with streams that no judged run has, by which one is chosen (unit: runs)."""
    rivals: tuple[str, ...] = tuple(RIVALS)
    """First-order methods to run."""
    structures: tuple[str, ...] = field(default_factory=of_theory)
    """Structures to run: keys, or module:Class."""
    defaults: tuple[str, ...] = tuple(DEFAULTS)
    """Optimisers of curvlab to run as they are by default, untuned."""
    ingredients: tuple[str, ...] = tuple(VARIANTS)
    """Variants of K-FAC to run, each compared with K-FAC without the ingredient, and of the default, each without a part of it."""
    steps: int = 0
    """Steps of a run; 0 means those of the problem's race (unit: steps)."""
    batch: int = 0
    """Samples of a step; 0 means those of the problem's race (unit: samples)."""
    target_loss: float = 0.0
    """Training loss to reach; 0 means that of the problem's race."""
    target_accuracy: float = 0.0
    """Share of test samples to classify right; 0 means that of the problem's race."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("name in --rivals", self.rivals, RIVALS)
        check_names("name in --defaults", self.defaults, DEFAULTS)
        check_names("name in --ingredients", self.ingredients, VARIANTS)
        check_structures(self.structures)
        check_bounds(self, starts=1, configurations=(1, CONFIGURATIONS), steps=0, batch=0, target_loss=0)
        check_bounds(self, target_accuracy=(0, 1))

    @property
    def race(self) -> Race:
        """What is to be reached, with what the options say otherwise."""
        wanted = {"steps": self.steps, "batch": self.batch, "loss": self.target_loss, "accuracy": self.target_accuracy}
        return replace(RACES.get(self.problem, USUAL), **{name: value for name, value in wanted.items() if value})  # type: ignore[arg-type]

    @property
    def methods(self) -> list[Entrant]:
        """The methods that were asked for, with the ones that ingredients are compared with, in the order of the table."""
        bases = (VARIANTS[name].base for name in self.ingredients)
        wanted = dict.fromkeys([*self.rivals, *self.structures, *self.defaults, *self.ingredients, *bases])
        return [METHODS[name] for name in in_order(wanted)]
