"""Many claims and several looks: Holm's step-down correction, and the boundaries of O'Brien and Fleming.

A run that adds seeds until claims are decided looks several times. The *repeated p-value* of a look is the smallest
level at which a test of O'Brien and Fleming (Biometrics 35, 1979) stops at this look or before; it is a valid p-value
whenever one stops, so that Holm's procedure over the repeated p-values holds the level of the family over all looks
(Maurer and Bretz, Statistics in Biopharmaceutical Research 5, 2013).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

LOOKS = (12, 24, 48)
"""Numbers of seeds at which a sequential run looks."""


@dataclass(frozen=True)
class Holm:
    """Holm's step-down procedure on one family of hypotheses.

    ``level[i]`` is the level at which hypothesis i was tested, 5 %/(m − rejections before it),
    so that ``rejected[i]`` is the same statement as ``p[i] <= level[i]``.
    """

    adjusted: Float[np.ndarray, " tests"]
    level: Float[np.ndarray, " tests"]
    rejected: Bool[np.ndarray, " tests"]


def holm(p_values: Sequence[float], level: float) -> Holm:
    """Holm's correction (1979): family-wise error at most ``level`` under any dependence of the tests.

    Equal to `statsmodels.stats.multitest.multipletests`, which collects garbage on every call and is too slow for
    the judge's calibration.
    """
    sorted_p, order = np.sort(p_values), np.argsort(p_values, kind="stable")
    hypotheses = len(p_values) - np.arange(len(p_values))
    rejections = int(np.logical_and.accumulate(sorted_p <= level / hypotheses).sum())
    rank = np.argsort(order)
    tested_at = level / (len(p_values) - np.minimum(rank, rejections))
    adjusted = np.minimum(np.maximum.accumulate(sorted_p * hypotheses), 1.0)[rank]
    return Holm(adjusted, tested_at, rank < rejections)


@dataclass(frozen=True)
class Looks:
    """When a run looks at what it has measured.

    Attributes:
        seeds: At how many seeds, increasing: once, or three times in a sequential run.
        first: The first of its seeds.
    """

    seeds: tuple[int, ...]
    first: int = 0

    def __post_init__(self) -> None:
        if len(self.seeds) not in (1, 3) or list(self.seeds) != sorted(set(self.seeds)):
            raise ValueError(f"a run looks once or at three increasing numbers of seeds, got {self.seeds}")

    def after(self, look: int) -> range:
        """The seeds that a run comes to after a look."""
        return range(self.first + self.seeds[look], self.first + self.seeds[-1])

    def repeated(self, p_value: float, look: int) -> float:
        """The level of the sequential test that has ``p_value`` as its boundary at a look."""
        if len(self.seeds) == 1 or p_value == 0:
            return p_value
        return 1.0 if p_value >= 0.5 else _crossing(-float(ndtri(p_value)) * math.sqrt(self._times[look]), self._times)

    def nominal(self, level: float, look: int) -> float:
        """The p-value at which a sequential test of some level stops at a look; the inverse of `repeated`."""
        if len(self.seeds) == 1:
            return level
        return float(ndtr(-_boundary(level, self._times) / math.sqrt(self._times[look])))

    @property
    def _times(self) -> tuple[float, float, float]:
        """The looks as shares of the seeds of the last."""
        first, second, last = self.seeds
        return first / last, second / last, 1.0


def _crossing(boundary: float, times: tuple[float, float, float]) -> float:
    """The probability that Brownian motion lies above a constant at one of three times."""
    first, second, last = times

    def before(time: float, later: float) -> float:
        """The standard deviation at a time of the path that is known at a later one."""
        return math.sqrt(time * (later - time) / later)

    def density(x: float, time: float) -> float:
        return math.exp(-x * x / (2 * time)) / math.sqrt(2 * math.pi * time)

    def at_second(x: float) -> float:
        return density(x, first) * float(ndtr((x - boundary) / math.sqrt(second - first)))

    def at_last(x: float) -> float:
        stayed = float(ndtr((boundary - x * first / second) / before(first, second)))
        return density(x, second) * stayed * float(ndtr((x - boundary) / math.sqrt(last - second)))

    crossed = float(ndtr(-boundary / math.sqrt(first)))
    for part, time, later in ((at_second, first, second), (at_last, second, last)):
        centre, wide = boundary * time / later, 10 * before(time, later)  # the rest is negligible
        crossed += quad(part, centre - wide, min(centre + wide, boundary), epsabs=0.0, epsrel=1e-8, limit=200)[0]
    return crossed


@lru_cache(maxsize=1024)
def _boundary(level: float, times: tuple[float, float, float]) -> float:
    """The constant that is crossed with a probability of ``level``."""
    return float(brentq(lambda boundary: math.log(_crossing(boundary, times) / level), 0.0, 12.0, xtol=1e-10))
