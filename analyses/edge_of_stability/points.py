"""What experiments share: their points, what cells at them cost, their source, and what hovers."""

from collections.abc import Iterable

from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.windows import SETTLING
from curvlab.study import Cell, Equivalence, Expected, Point, supported

PAPER = "Cohen et al. 2021"

BAND = 0.1
"""Half width of the band about the threshold that counts as hovering there. The paper's README run stays 1.5 to 6.5 % above."""


HOVERS = Equivalence("plateau_ratio", 1.0, BAND, centre="geometric mean")
"""Stays at the threshold, over the time at the edge of `windows`."""
HOVERING = f"Geometric mean of the sharpness over the threshold, from {SETTLING} steps after the first crossing on."


def settled(reason: str) -> Expected:
    """Expect support of a claim about the time at the edge, which was fixed after seeds 0 to 11 had shown the overshoot."""
    return supported(reason, explored=12)


def points(config: Config, wanted: Iterable[Point]) -> list[Point]:
    """Points at the configured problem."""
    return [{"problem": config.problem, **point} for point in wanted]


def effort(cell: Cell, config: Config) -> float:
    """How many times as long as at the default size a cell takes."""
    if cell["problem"] != config.problem:
        return 1.0
    return max(0.3, config.width**2 * (config.depth - 1) * config.samples * config.steps / (2 * 64**2 * 128 * 1200))


def memory(cell: Cell, config: Config) -> float:  # noqa: ARG001
    """Peak bytes of a cell."""
    return 5e8 + 8.0 * config.samples * (3072 + 60 * config.width)


def page(place: str) -> str:
    """Return the paper as a source, with a place on its page of theory."""
    return f"{PAPER} (docs/theory/cohen_2021.md, {place})"
