"""How every loss of torch and of curvlab is taken apart: one reader a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import GaussianNLL, HalfSquaredError, WeightedCrossEntropy
from curvlab.rows.loss.cross_entropy import read_labels
from curvlab.rows.loss.likelihood import Elementwise, Independent, Likelihood, PoissonRate, Probability, Softmax
from curvlab.rows.loss.terms import LossTerms, Measure, Reduction, flat_outputs

Reader = Callable[[nn.Module, Tensor, Any], LossTerms]


def reduction_of(loss: nn.Module) -> Reduction:
    """Return the reduction of a loss; raises `UnsupportedModel` unless it is "mean" or "sum"."""
    if loss.reduction == "mean":
        return "mean"
    if loss.reduction == "sum":
        return "sum"
    raise UnsupportedModel(
        f"{type(loss).__name__} has reduction={loss.reduction!r}; a Fisher matrix needs 'mean' or 'sum'."
    )


def _same_shape(loss: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    if targets.shape != z.shape:
        remedy = " Pass targets.view_as(outputs)." if targets.numel() == z.numel() else ""
        raise ValueError(
            f"{type(loss).__name__} needs targets of the output's shape {tuple(z.shape)}, got {tuple(targets.shape)}.{remedy}"
        )
    return targets.to(z.dtype)


def _by_element(
    loss: nn.Module,
    z: Tensor,
    score: Tensor,
    likelihood: Likelihood,
    *,
    weight: Tensor | None = None,
    divisor: int | None = None,
    measure: Measure = "nats",
) -> LossTerms:
    """Return the terms of an element-wise loss, a mean of which is over elements unless a divisor is given."""
    weight = torch.ones_like(z) if weight is None else weight.expand_as(z)
    return LossTerms(
        name=type(loss).__name__,
        likelihood=likelihood,
        z=flat_outputs(z),
        weight=flat_outputs(weight),
        score=flat_outputs(score),
        count=float(z.numel() if divisor is None else divisor) if loss.reduction == "mean" else 1.0,
        reduction=reduction_of(loss),
        measure=measure,
    )


def _constant(z: Tensor, curvature: float) -> Independent:
    return Independent(torch.full_like(flat_outputs(z), curvature))


def _squared(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    residual = z - _same_shape(loss, z, targets)
    return _by_element(loss, z, 2 * residual, _constant(z, 2.0), measure="squares")


def _half_squared(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    residual = z - _same_shape(loss, z, targets)
    return _by_element(loss, z, residual, _constant(z, 1.0), divisor=len(z), measure="squares")


def _gaussian(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, GaussianNLL)
    precision = loss.variance.to(z).reciprocal().expand_as(z)
    residual = z - _same_shape(loss, z, targets)
    return _by_element(loss, z, precision * residual, Independent(flat_outputs(precision)))


def _huber(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.HuberLoss)
    return _clipped(loss, z, targets, loss.delta, 1.0)


def _smooth_l1(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.SmoothL1Loss)
    if loss.beta == 0:
        raise UnsupportedModel("SmoothL1Loss with beta=0 is the L1 loss, which has no curvature. Use beta > 0.")
    return _clipped(loss, z, targets, loss.beta, 1 / loss.beta)


def _clipped(loss: nn.Module, z: Tensor, targets: Tensor, edge: float, curvature: float) -> LossTerms:
    """Return the terms of a squared error that goes on linearly from residuals of ±edge."""
    residual = z - _same_shape(loss, z, targets)
    kink = residual.abs() == edge
    if bool(kink.any()):
        sample = int(kink.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{type(loss).__name__} has no Hessian where the residual is ±{edge:g}, as it is at sample {sample}. Move the "
            "target, or the threshold, by a little."
        )
    inside = flat_outputs((residual.abs() < edge).to(z))
    score = curvature * residual.clamp(-edge, edge)
    return _by_element(loss, z, score, Elementwise(curvature * inside), measure="squares")


def _poisson(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.PoissonNLLLoss)
    y = _same_shape(loss, z, targets)
    if loss.log_input:
        rate = z.exp()
        return _by_element(loss, z, rate - y, Independent(flat_outputs(rate)))
    shifted = z + loss.eps
    for what, wrong in (("rates above 0", z <= 0), ("targets of at least 0", y < 0)):
        if bool(wrong.any()):
            sample = int(wrong.flatten(1).any(1).nonzero()[0])
            raise ValueError(f"PoissonNLLLoss with log_input=False needs {what}, which sample {sample} has not.")
    likelihood = PoissonRate(flat_outputs(y / shifted.square()), flat_outputs(z), loss.eps)
    return _by_element(loss, z, 1 - y / shifted, likelihood)


def _cross_entropy(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.CrossEntropyLoss)
    labels = read_labels(loss, z, targets)
    flat = flat_outputs(z)
    p = flat.softmax(1)
    return LossTerms(
        name="CrossEntropyLoss",
        likelihood=Softmax(p),
        z=flat,
        weight=labels.weight,
        score=labels.take_from(p.clone()),
        count=labels.count if loss.reduction == "mean" else 1.0,
        reduction=reduction_of(loss),
        measure="nats from 0 on",
    )


def _weighted_cross_entropy(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, WeightedCrossEntropy)
    terms = _cross_entropy(nn.CrossEntropyLoss(), z, targets)
    if loss.weights.shape != targets.shape:
        raise ValueError(
            f"WeightedCrossEntropy has weights of shape {tuple(loss.weights.shape)} for targets of shape "
            f"{tuple(targets.shape)}; it needs one for each."
        )
    weight = loss.weights.to(z).view_as(terms.weight)
    return replace(terms, name="WeightedCrossEntropy", weight=weight, count=float(loss.weights.sum()))


def _bernoulli(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.BCEWithLogitsLoss)
    y = _binary(loss, z, targets)
    positive = y if loss.pos_weight is None else loss.pos_weight.to(z) * y
    mass = positive + 1 - y
    weight = mass if loss.weight is None else mass * loss.weight.to(z)
    p = z.sigmoid()
    score = p - positive / torch.where(mass > 0, mass, 1)
    likelihood = Independent(flat_outputs(p * (1 - p)))
    return _by_element(loss, z, score, likelihood, weight=weight, measure="nats from 0 on")


def _probability(loss: nn.Module, z: Tensor, targets: Tensor) -> LossTerms:
    assert isinstance(loss, nn.BCELoss)
    y = _binary(loss, z, targets)
    outside = (z <= 0) | (z >= 1)
    if bool(outside.any()):
        sample = int(outside.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"BCELoss needs probabilities between 0 and 1, which sample {sample} has not. Leave out the model's sigmoid "
            "and use BCEWithLogitsLoss."
        )
    curvature = y / z.square() + (1 - y) / (1 - z).square()
    likelihood = Probability(flat_outputs(curvature), flat_outputs(z))
    weight = None if loss.weight is None else loss.weight.to(z)
    score = (z - y) / (z * (1 - z))
    return _by_element(loss, z, score, likelihood, weight=weight, measure="nats from 0 on")


def _binary(loss: nn.Module, z: Tensor, targets: Tensor) -> Tensor:
    y = _same_shape(loss, z, targets)
    if bool(((y < 0) | (y > 1)).any()):
        raise ValueError(f"{type(loss).__name__} needs targets between 0 and 1.")
    return y


READERS: dict[type[nn.Module], Reader] = {
    nn.MSELoss: _squared,
    HalfSquaredError: _half_squared,
    GaussianNLL: _gaussian,
    nn.HuberLoss: _huber,
    nn.SmoothL1Loss: _smooth_l1,
    nn.CrossEntropyLoss: _cross_entropy,
    WeightedCrossEntropy: _weighted_cross_entropy,
    nn.BCEWithLogitsLoss: _bernoulli,
    nn.BCELoss: _probability,
    nn.PoissonNLLLoss: _poisson,
}
"""Losses of one target tensor."""

_LOGITS = "It is linear in log-probabilities. Leave out the model's log-softmax and use CrossEntropyLoss on its logits"

REMEDIES: dict[type[nn.Module], str] = {
    nn.GaussianNLLLoss: (
        "It takes the variance as a third argument. Use curvlab.nn.GaussianNLL(variance=…) for a fixed variance, or "
        "curvlab.nn.PerSample for one that is an output of the model."
    ),
    nn.NLLLoss: f"{_LOGITS}.",
    nn.KLDivLoss: f"{_LOGITS}, with class probabilities as targets.",
    nn.L1Loss: "It has no curvature. Use HuberLoss or SmoothL1Loss.",
    nn.CTCLoss: "It takes lengths as further arguments. Use curvlab.nn.PerSample with a function that knows them.",
}
"""Losses that have no rows, and what to use instead."""
