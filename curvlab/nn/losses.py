"""Losses that the theory is written in."""

from jaxtyping import Float
from torch import Tensor, nn


class HalfSquaredError(nn.Module):
    """Half the squared error, summed over outputs: ℓ_n = ½ Σ_c (z_nc − y_nc)².

    The output Hessian of one sample is the identity, so the Fisher of this loss is JᵀJ / count without
    further factors. `nn.MSELoss`, by contrast, carries a factor 2 and divides by the number of elements.

    Args:
        reduction: "mean" divides by the number of samples N (count = N), whatever the other axes are; "sum"
            adds the samples (count = 1).

    Raises:
        ValueError: The reduction is neither "mean" nor "sum".
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"HalfSquaredError: reduction must be 'mean' or 'sum', not {reduction!r}.")
        self.reduction = reduction

    def forward(self, outputs: Float[Tensor, "..."], targets: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """Return the loss of outputs and targets, both [N, C] or [N, C, *].

        Raises:
            ValueError: The shapes differ (nothing is broadcast) or lack the axis of outputs.
        """
        if outputs.shape != targets.shape or outputs.ndim < 2:
            raise ValueError(
                "HalfSquaredError needs outputs and targets of one shape [N, C] or [N, C, *]; got outputs "
                f"{list(outputs.shape)} and targets {list(targets.shape)}. Nothing is broadcast: give a "
                "single output its axis, as in targets.unsqueeze(1), and classes as one-hot vectors."
            )
        total = 0.5 * (outputs - targets).square().sum()
        return total / len(outputs) if self.reduction == "mean" else total

    def extra_repr(self) -> str:
        """Return the reduction."""
        return f"reduction={self.reduction!r}"
