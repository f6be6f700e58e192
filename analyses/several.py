"""Options of analyses that measure on several problems in one run, each at seeds of its own."""

from dataclasses import dataclass
from typing import ClassVar

from curvlab.problems import data_hash
from curvlab.study import CommonOptions, check_bounds

MOST = 100
"""Seeds of a problem at most: those of the next one begin so many further."""


@dataclass(frozen=True, kw_only=True)
class SeveralProblems(CommonOptions):
    """Options of an analysis on several problems."""

    KNOWN: ClassVar[tuple[str, ...]]
    """The problems that the analysis is about, in an order that fixes the seeds of each."""
    seeds: int = 12
    """How many random seeds each problem is run at (unit: seeds)."""
    problem: str = "digits-mlp"
    """A training problem: a name, or module:function that returns a Problem."""
    further: tuple[str, ...] = ("karate-gcn",)
    """Further ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, seeds=(1, MOST))

    @property
    def problems(self) -> tuple[str, ...]:
        """All problems, each once."""
        return tuple(dict.fromkeys((self.problem, *self.further)))

    @property
    def own(self) -> tuple[str, ...]:
        """Those that the analysis does not know."""
        return tuple(name for name in self.problems if name not in self.KNOWN)

    @property
    def seeds_by_problem(self) -> dict[str, range]:
        """The seeds of each problem, which no other one has."""
        order = (*self.KNOWN, *self.own)
        firsts = {name: self.first_seed + MOST * order.index(name) for name in self.problems}
        return {name: range(first, first + self.seeds) for name, first in firsts.items()}

    @property
    def data_hash(self) -> str:
        """A digest of the problems that are the user's own; the names of others say everything about them."""
        return " ".join(data_hash(name) for name in self.own)
