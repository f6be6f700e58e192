"""The targets of a cross-entropy, position by position.

Term i is `−Σ_c m_c log p_c`, with the mass m_c that class weights, label smoothing and the target put on class c. Its weight is
`w = Σ_c m_c`, its score `p − m/w`, its Hessian `w (diag(p) − ppᵀ)`. The mass is kept as what lies on one class and what is spread
over all of them, so that a large number of classes needs no tensor of the outputs' size.

Shapes: outputs `[N, C, X]`, see `curvlab.rows.loss.terms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.rows.loss.terms import flat_outputs
from curvlab.rows.products import Piece


@dataclass(frozen=True)
class Labels:
    """Where the mass of every term lies.

    Attributes:
        weight: w, 0 where a target is ignored.
        count: by which a mean divides.
        index: class of the target; any where it is ignored, None for probabilities.
        on_index: mass on that class alone.
        spread: mass on all classes, `[N, C, X]` or expanded to it; None without any.
    """

    weight: Float[Tensor, "N 1 X"]
    count: float
    index: Int[Tensor, "N 1 X"] | None = None
    on_index: Float[Tensor, "N 1 X"] | None = None
    spread: Float[Tensor, "N C X"] | None = None

    def take_from(self, p: Float[Tensor, "n C x"], piece: Piece = (slice(None), slice(None))) -> Float[Tensor, "n C x"]:
        """Turn probabilities into scores, in place; terms without weight keep them."""
        n, x = piece
        weight = self.weight[n, :, x]
        share = torch.where(weight > 0, 1 / weight, 0)
        if self.spread is not None:
            p.addcmul_(self.spread[n, :, x], share, value=-1)
        if self.index is not None and self.on_index is not None:
            p.scatter_add_(1, self.index[n, :, x], -self.on_index[n, :, x] * share)
        return p


def read_labels(loss: nn.CrossEntropyLoss, z: Float[Tensor, "N C ..."], targets: Tensor) -> Labels:
    """Read classes, or probabilities of classes.

    Raises:
        ValueError: if targets or class weights do not fit the outputs.
    """
    N, C, X = flat_outputs(z).shape
    if loss.weight is not None and loss.weight.shape != (C,):
        raise ValueError(
            f"CrossEntropyLoss has a weight of shape {tuple(loss.weight.shape)}, but the model's output has {C} classes; "
            "it needs one weight a class."
        )
    class_weight = z.new_ones(C) if loss.weight is None else loss.weight.to(z)
    smoothing = loss.label_smoothing
    if targets.is_floating_point():
        _check_probabilities(z, targets)
        spread = class_weight[:, None] * ((1 - smoothing) * flat_outputs(targets).to(z) + smoothing / C)
        return Labels(spread.sum(1, keepdim=True), float(N * X), spread=spread)
    index, counted = _classes(loss, z, targets)
    of_target = class_weight[index] * counted
    on_index = (1 - smoothing) * of_target
    everywhere = smoothing / C * class_weight
    return Labels(
        on_index + everywhere.sum() * counted,
        float(of_target.sum()),
        index,
        on_index,
        everywhere[:, None].expand(N, C, X) if smoothing else None,
    )


def _check_probabilities(z: Float[Tensor, "N C ..."], targets: Tensor) -> None:
    if targets.shape != z.shape:
        raise ValueError(
            f"CrossEntropyLoss needs class probabilities of the output's shape {tuple(z.shape)}, got "
            f"{tuple(targets.shape)}, or class indices as integers."
        )
    if bool((targets < 0).any()):
        sample = int((targets < 0).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"CrossEntropyLoss needs class probabilities of at least 0, which sample {sample} has not.")


def _remedy(z: Float[Tensor, "N C ..."], targets: Tensor) -> str:
    """What to do about class indices of another shape than the outputs have without axis 1."""
    if z.ndim > 2 and targets.shape == z.shape[:-1]:
        moved = "mT" if z.ndim == 3 else "movedim(-1, 1)"
        return (
            f"The outputs seem to have the classes last: move classes to axis 1, as in output=lambda z: z.{moved}, or of what is "
            f"picked, output=lambda z: z.logits.{moved}; in a loop of your own call loss(outputs.{moved}, targets), or "
            "flatten both."
        )
    if targets.shape == (z.shape[0], 1, *z.shape[2:]):
        return "Targets have one axis too many: pass targets.squeeze(1)."
    return "Axis 1 of the outputs are the classes; every other axis is one of the targets, too."


def _classes(
    loss: nn.CrossEntropyLoss, z: Float[Tensor, "N C ..."], targets: Tensor
) -> tuple[Int[Tensor, "N 1 X"], Float[Tensor, "N 1 X"]]:
    """Return the class of every target, 0 where it is ignored, and 1 where it counts, else 0."""
    positions = (z.shape[0], *z.shape[2:])
    if targets.shape != positions:
        raise ValueError(
            f"CrossEntropyLoss needs class indices of shape {positions}, got {tuple(targets.shape)}, for outputs {tuple(z.shape)}. "
            f"{_remedy(z, targets)}"
        )
    N, C, X = flat_outputs(z).shape
    y = targets.long().reshape(N, X)
    counted = y != loss.ignore_index
    outside = counted & ((y < 0) | (y >= C))
    if outside.any():
        n, x = outside.nonzero()[0].tolist()
        raise ValueError(f"Target {int(y[n, x])} of sample {n} is neither one of the {C} classes nor ignore_index.")
    return torch.where(counted, y, 0)[:, None], counted[:, None].to(z)
