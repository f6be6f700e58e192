"""Losses made of losses: multiples, and sums over different outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import MultiTask, Scaled
from curvlab.rows.loss.likelihood import Likelihood, Several
from curvlab.rows.loss.table import Reader, reduction_of
from curvlab.rows.loss.terms import LossTerms, flat_outputs


def scaled(loss: nn.Module, z: Tensor, targets: Any, read: Reader) -> LossTerms:
    """Take a multiple apart: the scale is part of the weights."""
    assert isinstance(loss, Scaled)
    terms = read(loss.loss, z, targets)
    return replace(terms, weight=loss.scale * terms.weight)


def multi_task(loss: nn.Module, z: Tensor, targets: Mapping[str, Any], read: Reader) -> LossTerms:
    """Take a sum of tasks apart: element-wise weights, of which every task fills its outputs."""
    assert isinstance(loss, MultiTask)
    shape = flat_outputs(z)
    weight, score = torch.zeros_like(shape), torch.zeros_like(shape)
    parts: list[tuple[slice, Likelihood]] = []
    for part in loss.labelled(z, targets):
        terms = read(part.task.loss, part.z, part.targets)
        if terms.z.shape[1:] != flat_outputs(part.z).shape[1:]:
            raise UnsupportedModel(
                f"The {terms.name} of task {part.name!r} takes all positions of a sample at once, other tasks do not. Give "
                "outputs [N, C] without further axes, or write one function of all outputs as curvlab.nn.PerSample."
            )
        terms = terms.relaid(part.place)
        weight[:, part.channels] = part.task.weight * terms.weight
        score[:, part.channels] = terms.score
        parts.append((part.channels, terms.likelihood))
    return LossTerms(
        name="MultiTask(" + ", ".join(type(task.loss).__name__ for task in loss.tasks.values()) + ")",
        likelihood=Several(tuple(parts), shape.shape[1]),
        z=shape,
        weight=weight,
        score=score,
        count=float(len(z)) if loss.reduction == "mean" else 1.0,
        reduction=reduction_of(loss),
    )
