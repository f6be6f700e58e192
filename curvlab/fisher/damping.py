"""Damping: an absolute ρ, or one relative to the largest eigenvalue, and what a solve with it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from jaxtyping import Float
from torch import Tensor

from curvlab.tools.shown import line

Damping = float | int | str
"""ρ of `F + ρI`; `"rel:1e-6"` is 1e-6 times the largest eigenvalue of F."""


@dataclass(frozen=True)
class SolveInfo:
    """What a solve did.

    Attributes:
        damping: the absolute ρ.
        outside: share of the right-hand side's norm outside range(F), one a vector; 0 with damping.
    """

    damping: float
    outside: Float[Tensor, " K"]

    def __repr__(self) -> str:
        return line(self, damping=self.damping, outside=self.outside)


def absolute(damping: Damping, largest: Callable[[], float]) -> float:
    """Return the absolute ρ.

    Args:
        damping: as the user gave it.
        largest: computes the largest eigenvalue, called for a relative damping only.

    Raises:
        ValueError: unless it is a finite number ≥ 0 or `"rel:<number>"`.
    """
    relative = isinstance(damping, str)
    text = damping.removeprefix("rel:") if isinstance(damping, str) else damping
    try:
        if isinstance(damping, str) and not damping.startswith("rel:"):
            raise ValueError
        value = float(text)
    except (TypeError, ValueError):
        raise ValueError(f'damping is a number or a string such as "rel:1e-6", got {damping!r}.') from None
    if not isfinite(value) or value < 0:
        raise ValueError(f"damping must be finite and not negative, got {damping!r}.")
    return value * largest() if relative else value
