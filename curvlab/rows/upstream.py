"""The gradient of a loss at a model's outputs, and what it says of the rows of a pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.rows.loss import LossTerms, flat_outputs
from curvlab.rows.passes import Pass
from curvlab.rows.rows import Rows
from curvlab.rows.sweep import left_as_found

PROPORTIONAL = 1e-2
"""Largest relative distance of the gradient at the outputs from a multiple of the loss's own, half precision allowed for."""


def output_gradient(model: nn.Module, loss: nn.Module, inputs: Any, targets: Any, how: Pass) -> Float[Tensor, " R"]:
    """Return ∂L/∂z, so that the gradient is `Jᵀ ∂L/∂z`; any differentiable loss will do. Cost: one forward pass."""
    asked = how.read(model, inputs)
    with torch.no_grad(), left_as_found(model):
        z = asked.outputs(model)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, targets), z)
    return flat_outputs(asked.samples.lay_out(gradient)).permute(1, 2, 0).flatten()


def is_even(terms: LossTerms) -> bool:
    """Whether all elements of a position have one weight."""
    return terms.weight.shape[1] == 1 or bool((terms.weight == terms.weight[:, :1]).all())


def multiple_of(terms: LossTerms, upstream: Tensor) -> float:
    """Return κ, by which the user has multiplied the loss before `backward()`.

    Raises:
        ValueError: if the gradient at the outputs is no multiple of the loss's.
    """
    expected = (terms.weight * terms.score / terms.count).double().flatten()
    found = flat_outputs(upstream).double().flatten()
    if not bool(expected.any() and expected.isfinite().all() and found.isfinite().all()):
        return 1.0
    kappa = float(found @ expected / (expected @ expected))
    if not float((found - kappa * expected).norm()) <= PROPORTIONAL * float(found.norm()) or kappa <= 0:
        raise ValueError(
            "The gradient at the model's output is not a multiple of that of the loss that was given: another loss acts "
            "on the outputs, too. Use kind='mc', which does not need it."
        )
    return kappa


def of_whole_samples(how: Pass) -> bool:
    """Whether rows are multiples of the gradients of samples, or of the batch."""
    return how.kind == "empirical" and how.per in ("sample", "batch")


def is_single(how: Pass, terms: LossTerms) -> bool:
    """Whether a sample is one loss term, whose gradient is a multiple of its row."""
    return how.per == "term" and terms.z.shape[2] == 1 and is_even(terms)


def row_scale(how: Pass, terms: LossTerms, upstream: Tensor) -> Float[Tensor, " N"]:
    """Return what turns a sample's gradient `κ w s/count` into its row, `√(w/count) s` or, of the whole, `w s/√count`."""
    kappa = multiple_of(terms, upstream)
    if of_whole_samples(how):
        return terms.weight.new_full((len(terms.weight),), _whole_scale(how, terms) / kappa)
    weight = terms.weight[:, 0, 0]
    return torch.where(weight > 0, (terms.count / torch.where(weight > 0, weight, 1)).sqrt() / kappa, 0)


def coefficients(how: Pass, rows: Rows, terms: LossTerms, upstream: Tensor) -> Float[Tensor, " R"] | None:
    """Return c with `Sᵀc` the gradient of a pass, None if its rows do not determine it."""
    if rows.root is not None:
        # The gradient may lie outside the range of a Hessian that is no Fisher matrix.
        if not terms.likelihood.exact:
            return None
        return rows.dual(flat_outputs(upstream).permute(1, 2, 0).flatten().to(rows.dtype))
    if of_whole_samples(how):
        return rows.sample_weights.new_full((rows.R,), multiple_of(terms, upstream) / _whole_scale(how, terms))
    if rows.kind == "mc" or rows.per == "signs" or not is_even(terms):
        return None
    weight = (terms.weight[:, 0] / terms.count).sqrt().T.flatten()
    return (multiple_of(terms, upstream) * weight).to(rows.dtype)


def _whole_scale(how: Pass, terms: LossTerms) -> float:
    """What a row is times the sample's share `w s/count` in the gradient."""
    return terms.count**0.5 if how.per == "sample" else 1.0
