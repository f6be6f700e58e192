"""Losses that the theory is written in, and ways to write others so that rows know how they are reduced."""

from collections.abc import Callable
from typing import Any

import torch
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
        self.reduction = checked_reduction(self, reduction)

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


class GaussianNLL(nn.Module):
    """Negative log-likelihood of a Gaussian of fixed variance: ℓ = ½ (z − y)²/σ² + ½ log σ² an element.

    It equals `nn.GaussianNLLLoss` called with that variance; its output Hessian is 1/σ².

    Args:
        variance: σ², a number or a tensor that broadcasts to the outputs, such as `[C]` for outputs `[N, C]`.
        reduction: "mean" divides by the number of elements, "sum" adds them.

    Raises:
        ValueError: The variance is not positive, or the reduction is neither "mean" nor "sum".
    """

    variance: Tensor

    def __init__(self, variance: float | Tensor, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = checked_reduction(self, reduction)
        self.register_buffer("variance", torch.as_tensor(variance).clone())
        if not bool((self.variance > 0).all()):
            raise ValueError(f"GaussianNLL: variance must be positive, not {float(self.variance.min()):.3g}.")

    def forward(self, outputs: Float[Tensor, "N C ..."], targets: Float[Tensor, "N C ..."]) -> Float[Tensor, ""]:
        """Return the loss of outputs and targets of one shape."""
        variance = self.variance.to(outputs)
        terms = 0.5 * ((outputs - targets).square() / variance + variance.log())
        return terms.mean() if self.reduction == "mean" else terms.sum()

    def extra_repr(self) -> str:
        """Return the variance and the reduction."""
        return f"variance={self.variance.tolist()}, reduction={self.reduction!r}"


class Scaled(nn.Module):
    """A multiple of a loss, and so of its curvature.

    Args:
        loss: any loss that rows are known for.
        scale: by which it is multiplied, at least 0.

    Raises:
        ValueError: The scale is negative.
    """

    def __init__(self, loss: nn.Module, scale: float) -> None:
        super().__init__()
        if not scale >= 0:
            raise ValueError(f"Scaled: scale must be at least 0, not {scale}.")
        self.loss, self.scale = loss, scale

    @property
    def reduction(self) -> str:
        """That of the loss."""
        return str(self.loss.reduction)

    def forward(self, outputs: Tensor, targets: Any) -> Float[Tensor, ""]:
        """Return the multiple."""
        value: Tensor = self.scale * self.loss(outputs, targets)
        return value

    def extra_repr(self) -> str:
        """Return the scale."""
        return f"scale={self.scale}"


class PerSample(nn.Module):
    """A loss made of a function that returns one value a sample.

    This is how to hand over a loss of your own: any twice-differentiable function of one output tensor, in which samples do
    not interact (rows check that).

    Args:
        function: called as `function(outputs, targets)`; returns `[N]`.
        reduction: "mean" divides by the number of samples N, "sum" adds them.

    Raises:
        ValueError: The reduction is neither "mean" nor "sum".
    """

    def __init__(self, function: Callable[[Tensor, Any], Tensor], reduction: str = "mean") -> None:
        super().__init__()
        self.function = function
        self.reduction = checked_reduction(self, reduction)

    def forward(self, outputs: Tensor, targets: Any) -> Float[Tensor, ""]:
        """Return the loss.

        Raises:
            ValueError: The function does not return one value a sample.
        """
        values = self.function(outputs, targets)
        if values.shape != outputs.shape[:1]:
            raise ValueError(
                f"{self.name} must return one value a sample, {list(outputs.shape[:1])}, got {list(values.shape)}."
            )
        return values.mean() if self.reduction == "mean" else values.sum()

    @property
    def name(self) -> str:
        """That of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def extra_repr(self) -> str:
        """Return the function and the reduction."""
        return f"{self.name}, reduction={self.reduction!r}"


def checked_reduction(loss: nn.Module, reduction: str) -> str:
    """Return a reduction, "mean" or "sum"; raise `ValueError` for any other."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{type(loss).__name__}: reduction must be 'mean' or 'sum', not {reduction!r}.")
    return reduction
