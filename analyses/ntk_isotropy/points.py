"""What the experiments share: the points that a problem admits, and what a cell costs."""

from collections.abc import Callable, Iterable
from typing import Any

from analyses.ntk_isotropy.config import Config
from curvlab.study import Cell, Experiment, Point

PAPER = "Karakida & Osawa 2020"
LEFT = 0.0389
"""√(2.03e-4/0.134341): the share of the residual that the first exact step of the published run leaves.

The anisotropy of a response is the same of a linear step at η = 1/ᾱ, as a root mean square over directions of the residual.
"""
LEFT_FROM = "what finite width leaves of the residual in the README's run, √(2.03e-4/0.134341)"


def page(source: str, claims: str) -> str:
    """Return a source with the claims of the page of theory that hold what is claimed, or derive it."""
    return f"{source} (docs/theory/karakida_osawa_2020.md, {claims})"


def base(config: Config) -> dict[str, object]:
    """Return the point from which one thing varies at a time; 0 and "" stand for what the problem cannot vary."""
    takes = config.takes
    return {
        "width": config.middle_width,
        "depth": config.depth if "depth" in takes else 0,
        "activation": config.activation if "activation" in takes else "",
        "outputs": 1 if "outputs" in takes else 0,
    }


def points(config: Config, wanted: Iterable[Point]) -> list[Point]:
    """Return those of the wanted points that the problem admits, at `base` where they do not say otherwise."""
    start = base(config)
    fixed = {"depth", "activation", "outputs"} - config.takes.keys()
    return [
        {**start, **point} for point in wanted if all(point.get(name, start[name]) == start[name] for name in fixed)
    ]


def experiment(wanted: Callable[[Config], Iterable[Point]], **description: Any) -> Experiment[Config]:
    """Return an experiment at those of the wanted points that the problem admits."""
    varied = {"varies": ("initialisation",), **description}
    return Experiment(cells=lambda config: points(config, wanted(config)), memory=memory, **varied)


def seconds(least: float, more: float) -> Callable[[Cell, Config], float]:
    """Seconds of a cell: `least`, and `more` at width 2048, times the number of matrices between hidden layers."""

    def estimated(cell: Cell, _: Config) -> float:
        width, matrices = _size(cell)
        return (least + more * (width / 2048) ** 2) * max(1, matrices)

    return estimated


def memory(cell: Cell, _: Config) -> float:
    """Peak bytes of a cell: sixteen copies of the parameters in float64."""
    width, matrices = _size(cell)
    return 4e8 + 16 * 8.0 * (matrices * width**2 + 1000 * width)


def _size(cell: Cell) -> tuple[int, int]:
    """Width, and number of matrices between hidden layers; a guess where the problem has its own."""
    return int(cell["width"]) or 512, (int(cell["depth"]) or 3) - 2
