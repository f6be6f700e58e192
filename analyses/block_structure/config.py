"""Options of the block-structure analysis."""

from dataclasses import dataclass, field
from functools import lru_cache

from analyses.specs import check_structures, members
from curvlab.problems import instance, swept_arguments
from curvlab.study import CommonOptions, check_bounds, check_positive

HESSIAN, GGN, EMPIRICAL = "hessian", "ggn", "empirical"
MATRICES = (HESSIAN, GGN, EMPIRICAL)
"""Hessian, Gauss–Newton matrix and empirical Fisher matrix of loss terms."""


@dataclass(frozen=True, kw_only=True)
class Config(CommonOptions):
    """Options of the block-structure analysis."""

    problem: str = "short-text"
    """Data set and model: a name, or module:function that returns a Problem."""
    beside: tuple[str, ...] = ("short-text-cnn", "short-text-mlp")
    """Problems whose networks are compared with it; short-text-mixer is one more, four times as slow."""
    width: int = 0
    """Width of the networks, where a problem takes one; 0 means its own (unit: neurons)."""
    depths: tuple[int, ...] = ()
    """Depths of the problem's network against which its off-block share is measured, too, where it takes one."""
    widths: tuple[int, ...] = ()
    """Widths against which it is, where it takes one (unit: neurons)."""
    structures: tuple[str, ...] = field(default_factory=members)
    """Structures to measure on the problem: keys, or module:Class."""
    terms: int = 64
    """Loss terms that curvature is taken of, at most, at least one sample (unit: terms)."""
    largest: int = 5000
    """Parameters up to which matrices are formed; larger networks have maps of layers alone (unit: parameters)."""
    steps: int = 300
    """Training steps (unit: steps)."""
    batch: int = 32
    """Samples of a training step (unit: samples)."""
    rate: float = 0.01
    """Learning rate of AdamW."""
    directions: int = 400
    """Random directions of products (unit: directions)."""
    permutations: int = 20
    """Random partitions with which one within a tensor is compared (unit: partitions)."""
    classes: tuple[int, ...] = (2, 8, 32, 128)
    """Numbers of classes of the perceptron in which classes are the blocks."""
    races: bool = False
    """Race SGD, Adam and Adam-mini, each tuned, on every problem at three widths: about three minutes a seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_structures(self.structures, families=False)
        check_positive(self, "rate")
        check_bounds(self, width=0, depths=1, widths=1, terms=1, largest=1, steps=2, batch=1)
        check_bounds(self, directions=2, permutations=1, classes=2)

    @property
    def compared(self) -> tuple[str, ...]:
        """The problems, the one that claims are about first."""
        return tuple(dict.fromkeys((self.problem, *self.beside)))

    def arguments(self, problem: str, **wanted: int) -> dict[str, int]:
        """Those arguments that a problem takes, without those that are 0."""
        takes = swept_arguments(problem)
        return {name: value for name, value in ({"width": self.width} | wanted).items() if value and name in takes}

    def dense(self, problem: str, **wanted: int) -> bool:
        """Whether matrices of a problem's network are formed."""
        return parameters_of(problem, tuple(sorted(self.arguments(problem, **wanted).items()))) <= self.largest


@lru_cache(maxsize=32)
def parameters_of(problem: str, arguments: tuple[tuple[str, int], ...]) -> int:
    """Number of trainable parameters of a problem's network."""
    model = instance(problem, **dict(arguments)).model
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
