"""Validation shared by the theory modules: every check names the argument and the remedy."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

SYMMETRY = 1e-8
"""Largest asymmetry, relative to the largest entry, that counts as round-off and is averaged away."""


def array(name: str, value: ArrayLike, ndim: int) -> Float[np.ndarray, "..."]:
    """A finite float64 array with `ndim` axes, none of them empty."""
    out = np.asarray(value, dtype=np.float64)
    if out.ndim != ndim or out.size == 0:
        raise ValueError(f"{name}: expected a non-empty array with {ndim} axes, got shape {out.shape}.")
    if not np.isfinite(out).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(out))[0])
        raise ValueError(f"{name}: the entry at {where} is not finite; find the computation that made it.")
    return out


def length(name: str, value: Float[np.ndarray, "..."], expected: int, why: str, axis: int = 0) -> None:
    """Raise unless `value` has `expected` entries along `axis`."""
    if value.shape[axis] != expected:
        raise ValueError(f"{name}: axis {axis} has {value.shape[axis]} entries but must have {expected}, {why}.")


def symmetric(name: str, value: ArrayLike, ndim: int = 2) -> Float[np.ndarray, "..."]:
    """A finite symmetric matrix, or a stack of them, with round-off asymmetry removed."""
    out = array(name, value, ndim)
    transposed = np.swapaxes(out, -1, -2)
    if out.shape[-1] != out.shape[-2]:
        raise ValueError(f"{name}: expected square matrices on the last two axes, got shape {out.shape}.")
    asymmetry = float(np.abs(out - transposed).max())
    if asymmetry > SYMMETRY * float(np.abs(out).max()):
        raise ValueError(
            f"{name}: must be symmetric but differs from its transpose by {asymmetry:.3g}; if that is "
            "round-off of a lower precision, compute it in float64 or pass (A + A.T) / 2."
        )
    return np.asarray((out + transposed) / 2)


def positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above zero."""
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name}: must be a finite number above 0, got {value}.")


def non_negative(name: str, value: float) -> None:
    """Raise unless `value` is a finite number, zero or above."""
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: must be a finite number, 0 or above, got {value}.")


def at_least_one(name: str, value: int) -> None:
    """Raise unless `value` counts something."""
    if value < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}.")


def layer_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The widths (M_0, …, M_L) of a network with at least one weight layer."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            f"widths: expected (M_0, …, M_L), inputs first and outputs last, each at least 1, got {widths}."
        )
    return tuple(widths)
