"""Powers of a matrix, and inverse powers with damping, as functions of its eigenvalues.

    F^p            on range(F)
    (F + ρI)^{-p}  damping added to the matrix, as in Shampoo's roots
    (F^p + ρI)⁻¹   damping added to the power, as Adam's ε is added to the root

For ρ = 0 both inverses are those on range(F).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import NotPositiveDefinite, unknown_name

Damps = Literal["matrix", "power"]
"""What damping is added to: F, whose inverse power is taken then, or the power of F, which is inverted then."""


@dataclass(frozen=True)
class Power:
    """A function f of eigenvalues λ: `λ^p`, or an inverse.

    Attributes:
        exponent: p.
        inverse: whether it is an inverse.
        damping: ρ, of an inverse.
        damps: see `Damps`.
    """

    exponent: float
    inverse: bool = False
    damping: float = 0.0
    damps: Damps = "matrix"

    @property
    def outside(self) -> float:
        """f(0); 0 for a function on the range."""
        if self.damping == 0:
            return 0.0
        return 1 / self.damping if self.damps == "power" else self.damping**-self.exponent

    @property
    def drops(self) -> bool:
        """Whether null directions count as 0, as a power below 1 would raise their round-off; else they count as they are."""
        return self.damping == 0 or self.damps == "power"

    def of(self, values: Float[Tensor, "*B n"], null: Bool[Tensor, "*B n"], name: str) -> Float[Tensor, "*B n"]:
        """Return f(λ), f(0) on null directions if f `drops` them.

        Args:
            values: λ.
            null: which directions count as null.
            name: what they belong to, for messages.

        Raises:
            NotPositiveDefinite: if a power that is no whole number would be taken of a negative number.
        """
        shift = self.damping if self.damps == "matrix" else 0.0
        kept = torch.where(null, 1, values) if self.drops else values + shift
        lowest = float(kept.min()) if kept.numel() else 0.0
        if lowest < 0 and not float(self.exponent).is_integer():
            raise NotPositiveDefinite(
                f"layers {name}: F{' + ρI' if shift else ''} has the eigenvalue {lowest:.3g}, of which there is no power "
                f"{self.exponent:g}. Use a damping above {shift - lowest:.3g} with damps='matrix', or a positive structure."
            )
        powers = kept**self.exponent
        if self.damps == "power":
            powers = powers + self.damping
        found = 1 / powers if self.inverse else powers
        return torch.where(null, self.outside, found) if self.drops else found


RANGE = Power(0.0)
"""The projector on the range."""


def check_power(power: float, damps: Damps = "matrix") -> None:
    """Raise `ValueError` unless the power is a finite number > 0, and `damps` known."""
    if not (isfinite(power) and power > 0):
        raise ValueError(f"power is a finite number > 0, got {power}.")
    if damps not in get_args(Damps):
        raise unknown_name("damps", damps, get_args(Damps))
