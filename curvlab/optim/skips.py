"""Steps that are left out because something was not finite: how many, how many in a row, and when it is too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from curvlab.optim.gradients import all_finite
from curvlab.tools.shown import some


@dataclass
class Skips:
    """Counts them.

    Attributes:
        patience: steps in a row that may be left out.
        total: those that were.
        in_a_row: those since the last step that was taken.
    """

    patience: int
    total: int = 0
    in_a_row: int = 0

    def count(self, model: nn.Module, outputs: Sequence[Tensor], inverse: str = "") -> None:
        """Count one.

        Args:
            model: whose step it is.
            outputs: those of the step's passes, `[N, …]`.
            inverse: the damped inverse that was beyond what numbers hold, in words; empty if gradients or rows were not finite.

        Raises:
            FloatingPointError: if it is one too many in a row; says what was not finite, and the remedy.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row <= self.patience:
            return
        if inverse:
            raise FloatingPointError(
                f"Preconditioned gradients were not finite in {self.in_a_row} steps in a row, although gradients and rows were: "
                f"{inverse}. Raise the damping, or convert model and data to float64."
            )
        raise FloatingPointError(
            f"Gradients or rows were not finite in {self.in_a_row} steps in a row. {_not_finite(model, outputs)}"
        )


def _not_finite(model: nn.Module, outputs: Sequence[Tensor]) -> str:
    """Say which parameters, or else at which sample a model's outputs, are not finite, and the remedy."""
    broken = [name for name, p in model.named_parameters() if not all_finite([p.detach()])]
    if broken:
        return f"{some(broken)} of the model are not finite: begin again with finite ones, and a lower learning rate."
    for z in outputs:
        samples = (~z.isfinite()).flatten(1).any(1).nonzero()
        if len(samples):
            return f"The model's output is not, first at sample {int(samples[0])}: check the inputs, or lower the learning rate."
    return "Lower the learning rate or raise the damping."
