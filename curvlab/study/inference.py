"""Student's t over seeds and Holm's step-down correction: the statistics of verdicts and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True)
class Summary:
    """Mean of a quantity over seeds and its standard error, the sufficient statistics of a t-test.

    ``error`` is 0 exactly if all values are equal and NaN for a single value.
    """

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " seeds"]) -> "Summary":
        """Summary of one value per seed."""
        seeds = len(values)
        if seeds < 2:
            return cls(float(values[0]) if seeds else math.nan, math.nan, seeds)
        if np.all(values == values[0]):
            return cls(float(values[0]), 0.0, seeds)
        return cls(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(seeds), seeds)

    def below(self, bound: float) -> float:
        """p-value of H₀: E[mean] ≥ ``bound`` against E[mean] < ``bound``.

        Without variance the t-statistic does not exist; the exact sign test takes its place: 2⁻ⁿ if all n
        values lie below, else 1.
        """
        if self.error == 0.0:
            return 0.5**self.seeds if self.mean < bound else 1.0
        return float(stdtr(self.seeds - 1, (self.mean - bound) / self.error))

    def above(self, bound: float) -> float:
        """p-value of H₀: E[mean] ≤ ``bound`` against E[mean] > ``bound``; see `below`."""
        return Summary(-self.mean, self.error, self.seeds).below(-bound)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided t-interval: a point without variance, (NaN, NaN) for fewer than two seeds."""
        if self.seeds < 2:
            return math.nan, math.nan
        half = float(stdtrit(self.seeds - 1, 0.5 + confidence / 2)) * self.error
        return self.mean - half, self.mean + half


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
    adjusted = np.minimum(1.0, np.maximum.accumulate(hypotheses * sorted_p))[rank]
    return Holm(adjusted, tested_at, rank < rejections)
