"""Mean and t-interval over seeds, and the interval that predicts further ones; one seed has a mean and no interval."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit


@dataclass(frozen=True)
class Summary:
    """Mean of a quantity over seeds and its standard error.

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

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided t-interval: a point without variance, (NaN, NaN) for fewer than two seeds."""
        if self.seeds < 2:
            return math.nan, math.nan
        half = self._quantile(confidence) * self.error
        return self.mean - half, self.mean + half

    def prediction(self, confidence: float, further: int = 1) -> float:
        """Half the interval about the mean that holds the mean of so many further normal values; NaN below two seeds."""
        if self.seeds < 2:
            return math.nan
        return self._quantile(confidence) * self.error * math.sqrt(1 + self.seeds / further)

    def _quantile(self, confidence: float) -> float:
        return float(stdtrit(self.seeds - 1, 0.5 + confidence / 2))
