"""What experiments share: their source, the points of those that a depth does not tell apart, their memory."""

from analyses.gnn_acceleration.config import Config
from curvlab.study import Cell, Point
from curvlab.study.experiment import Varied

PAPER = "Xu, Zhang, Jegelka & Kawaguchi 2021"


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
