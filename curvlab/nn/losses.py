"""Losses that torch has not, or not in this form."""

from jaxtyping import Float, Int
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


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy of classes with a weight for every sample, divided by their sum: Σ_n w_n ℓ_n / Σ_n w_n.

    A sample of weight 0 stays in place without counting, as do unlabelled nodes of a graph. The weights may be replaced from
    one call to the next, so that samples gain weight during training.

    Attributes:
        weights: w.

    Args:
        weights: not negative, of the samples in their order.
    """

    weights: Tensor

    def __init__(self, weights: Float[Tensor, " N"]) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, outputs: Float[Tensor, "N C"], targets: Int[Tensor, " N"]) -> Float[Tensor, ""]:
        """Return the loss of logits and classes.

        Raises:
            ValueError: There is not one weight a sample.
        """
        if len(self.weights) != len(outputs):
            raise ValueError(
                f"WeightedCrossEntropy has {len(self.weights)} weights for {len(outputs)} samples; it needs one each."
            )
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return self.weights @ losses / self.weights.sum()

    def extra_repr(self) -> str:
        """Return the number of samples."""
        return f"{len(self.weights)} samples"
