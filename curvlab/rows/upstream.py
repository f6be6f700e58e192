"""The gradient of a loss at a model's outputs, in the order of rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.rows.loss import LossTerms, flat_outputs
from curvlab.rows.passes import Pass
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
