"""Exponents of measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress


@dataclass(frozen=True)
class Exponent:
    """The slope of log cost over log size.

    Attributes:
        slope: by least squares.
        error: its standard error.
    """

    slope: float
    error: float


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent | None:
    """Fit the larger half of the sizes, at least three; None from fewer."""
    usable = sorted((s, c) for s, c in zip(sizes, costs, strict=True) if c > 0)
    upper = usable[-max(3, (len(usable) + 1) // 2) :]
    if len(upper) < 3:
        return None
    x, y = np.log(np.array(upper)).T
    fitted = linregress(x, y)
    return Exponent(float(fitted.slope), float(fitted.stderr))
