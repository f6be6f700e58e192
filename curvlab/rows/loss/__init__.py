"""Losses: what their terms are, the output Hessian's square root, sampled and empirical rows at the model's output.

table     one reader a loss of one target tensor
composed  multiples, and sums over different outputs
own       any other loss that says how it is reduced, by automatic differentiation
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import MultiTask, Scaled
from curvlab.rows.loss.composed import multi_task, scaled
from curvlab.rows.loss.likelihood import Draws
from curvlab.rows.loss.own import (
    WRAP,
    bound_to_samples,
    divisor,
    has_gradient,
    held_by_sample,
    is_altered,
    own_terms,
    watching,
)
from curvlab.rows.loss.root import DiagonalRoot, OutputRoot, restored
from curvlab.rows.loss.table import READERS, REMEDIES, Reader
from curvlab.rows.loss.terms import (
    Kind,
    LossTerms,
    Measure,
    RowPer,
    flat_outputs,
    identity_cotangents,
    one_row_a_position,
)

__all__ = [
    "LOSSES",
    "DiagonalRoot",
    "Draws",
    "Kind",
    "LossTerms",
    "Measure",
    "OutputRoot",
    "RowPer",
    "bound_to_samples",
    "check_loss",
    "divisor",
    "flat_outputs",
    "held_by_sample",
    "identity_cotangents",
    "loss_terms",
    "one_row_a_position",
    "restored",
    "watching",
]


def check_loss(loss: nn.Module) -> None:
    """Refuse a loss for which there are no rows, whatever its outputs and targets are.

    Raises:
        UnsupportedModel: with the remedy.
    """
    if type(loss) in REMEDIES:
        raise UnsupportedModel(f"{type(loss).__name__} has no rows. {REMEDIES[type(loss)]}")
    if type(loss) not in LOSSES and getattr(loss, "reduction", None) is None:
        if not callable(loss):
            raise UnsupportedModel(
                f"The loss is a module such as torch.nn.CrossEntropyLoss(), got a {type(loss).__name__}."
            )
        name = getattr(loss, "__name__", type(loss).__name__)
        remedy = f"Pass an object of the class, {name}()." if isinstance(loss, type) else WRAP
        raise UnsupportedModel(f"{name} does not say whether it is a mean or a sum over samples. {remedy}")


def loss_terms(loss: nn.Module, z: Tensor, targets: Any) -> LossTerms:
    """Take a loss module apart at given outputs and targets.

    Args:
        loss: a module whose exact type stands in `LOSSES`, or any twice-differentiable one with an attribute `reduction`. One
            with forward hooks or a `forward` of its own that change its gradient is of the latter kind.
        z: outputs `[N, C, …]`.
        targets: as the loss takes them.

    Raises:
        UnsupportedModel: if the loss or its reduction is not covered; see also `own_terms`.
        ValueError: if targets do not fit or are not finite, or if weights are negative.
    """
    check_loss(loss)
    if type(loss) in READERS and not isinstance(targets, Tensor):
        raise ValueError(
            f"{type(loss).__name__} takes targets in one tensor, got a {type(targets).__name__}: pass torch.as_tensor(targets)."
        )
    if isinstance(targets, Tensor) and targets.is_floating_point() and not torch.isfinite(targets).all():
        sample = int((~torch.isfinite(targets)).reshape(len(targets), -1).any(1).nonzero()[0])
        raise ValueError(f"The targets are not finite, first at sample {sample}.")
    terms = _terms(loss, z, targets)
    if bool((terms.weight < 0).any()):
        raise ValueError(f"{type(loss).__name__} has negative weights, so the curvature has no square root.")
    return terms


def _terms(loss: nn.Module, z: Tensor, targets: Any) -> LossTerms:
    reader = LOSSES.get(type(loss), own_terms)
    if reader is own_terms or not is_altered(loss):
        return reader(loss, z, targets)
    try:
        if has_gradient(loss, z, targets, lambda at: reader(loss, at, targets)):
            return reader(loss, z, targets)
    except (UnsupportedModel, ValueError):
        pass  # What the hooks make of outputs and targets may fit all the same.
    if getattr(loss, "reduction", None) is None:
        raise UnsupportedModel(f"{type(loss).__name__} has hooks, or a forward of its own, that change it. {WRAP}")
    return own_terms(loss, z, targets)


LOSSES: dict[type[nn.Module], Reader] = {
    **READERS,
    Scaled: partial(scaled, read=loss_terms),
    MultiTask: partial(multi_task, read=loss_terms),
}
"""The losses whose terms are known in closed form."""
