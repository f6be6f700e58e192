"""What experiments share: their points, what cells at them cost, and how fast the Jacobian is to change."""

from collections.abc import Callable, Iterable
from typing import Any

from analyses.jacobian_rank.config import Config
from curvlab.study import Cell, Experiment, Point
from curvlab.study.experiment import Varied

PAPER = "Zhang, Martens & Grosse 2019"

DRIFTS = {
    "relu": (
        -0.25,
        "A share O(m^(−1/2)) of a sample's activation patterns flips, each flip changing an entry of size m^(−1/2).",
    ),
    "erf": (-0.5, "Every pre-activation moves by O(m^(−1/2)), and φ' with it."),
}
"""Exponent of the width m with which the Jacobian changes along natural gradient, by activation, and its derivation."""

SYNTHETIC = "synthetic-two-layer"
"""Random inputs, more samples than dimensions, and a similarity that sets λ_min of the kernel."""

BOTH: tuple[Varied, ...] = ("initialisation", "data")
"""What a seed varies of random data, or random targets, and a network for them."""

FEW = 4
"""Samples for which condition 2 holds along runs at widths that fit into memory."""

WIDEST = 16384
"""Width at which `seconds` are given."""


def page(part: str, place: str) -> str:
    """Return a part of the paper as a source, with a place on its page of theory."""
    return f"{PAPER}, {part} (docs/theory/zhang_martens_grosse_2019.md, {place})"


def second_largest(config: Config) -> int:
    """The second largest width, or the only one."""
    return config.swept_widths[-2:][0]


def admitted(config: Config, points: Iterable[Point]) -> list[Point]:
    """Points with their problem; at the configured one without what it cannot vary, a fixed width or number of samples as 0."""
    fixed = {"width", "activation", "samples"} - config.takes.keys()
    own = {"samples": config.samples} | dict.fromkeys(fixed & {"width", "samples"}, 0)

    def complete(point: Point) -> Point:
        if point.get("problem", config.problem) != config.problem:
            return point
        varied = {name: value for name, value in point.items() if name not in fixed}
        return {"problem": config.problem, **own, **varied}

    return list(map(complete, points))


def own_and_few(config: Config) -> list[Point]:
    """Every activation, on the problem's own data at every width and, where both are free, on few of them at the largest."""
    points: list[Point] = [{"data": "own", "width": width} for width in config.swept_widths]
    if {"width", "samples"} <= config.takes.keys():
        points.append({"data": "few", "samples": min(FEW, config.samples), "width": config.swept_widths[-1]})
    return [{**point, "activation": activation} for point in points for activation in config.activation]


def experiment(
    points: Callable[[Config], Iterable[Point]], *, varies: tuple[Varied, ...] = ("initialisation",), **description: Any
) -> Experiment[Config]:
    """Return an experiment at `admitted` points, whose data are the same at every seed unless it says otherwise."""
    described: dict[str, Any] = {"varies": varies, "memory": memory} | description
    return Experiment(cells=lambda config: admitted(config, points(config)), **described)


def _width(cell: Cell) -> int:
    return int(cell.coordinates.get("width", 0)) or 1024


def seconds(fixed: float, at_widest: float) -> Callable[[Cell, Config], float]:
    """Seconds of a cell: a fixed number, and one that grows with the width up to that at `WIDEST`."""
    return lambda cell, _: fixed + at_widest * _width(cell) / WIDEST


def memory(cell: Cell, config: Config) -> float:
    """Peak bytes of a cell."""
    return 4e8 + 8.0 * _width(cell) * (10 * config.samples + 1500)
