"""What experiments share: source, changes of a model that they ask about, points that no depth tells apart, memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from analyses.gnn_acceleration.config import Config
from curvlab.study import Cell, Point
from curvlab.study.experiment import Varied

PAPER = "Xu, Zhang, Jegelka & Kawaguchi 2021"

ROUND_OFF = 1e-9
"""Smallest relative slow-down that counts."""


@dataclass(frozen=True)
class Change:
    """A change of a model that gives it new scales, which is to make training faster.

    Attributes:
        statement: The claim in words.
        number: Of the claim on the page of theory.
        kept: From the depth of the model with the new scales, those that the one without them has.
    """

    statement: str
    number: int
    kept: Callable[[int], range]


CHANGES: Mapping[str, Change] = {
    "skip": Change("Skip connections accelerate", 5, lambda depth: range(depth, depth + 1)),
    "depth": Change("One more layer accelerates", 6, range),
}
"""By name."""


def page(part: str, place: str) -> str:
    """Return a part of the paper as a source, with a place on its page of theory."""
    return f"{PAPER}, {part} (docs/theory/xu_zhang_jegelka_kawaguchi_2021.md, {place})"


def varies(config: Config) -> tuple[Varied, ...]:
    """Return what a seed varies: the split only where it draws nodes."""
    return ("initialisation", *(("split",) if config.drawn_nodes else ()), "draws")


def by_aggregation(config: Config) -> list[Point]:
    """Return a point for each aggregation."""
    return [{"aggregation": aggregation} for aggregation in config.aggregation]


def memory(_: Cell, config: Config) -> float:
    """Peak bytes of a cell; the complete split of the largest graph has 18 717 training nodes."""
    return 2e9 if config.problem == "karate" or config.splits == ("public",) else 1.5e10
