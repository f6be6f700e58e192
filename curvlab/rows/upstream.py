"""The gradient of a loss at a model's outputs, in the order of rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.rows.loss import flat_outputs
from curvlab.rows.passes import Pass
from curvlab.rows.sweep import left_as_found


def output_gradient(model: nn.Module, loss: nn.Module, inputs: Any, targets: Any, how: Pass) -> Float[Tensor, " R"]:
    """Return ∂L/∂z, so that the gradient is `Jᵀ ∂L/∂z`; any differentiable loss will do. Cost: one forward pass."""
    asked = how.read(model, inputs)
    with torch.no_grad(), left_as_found(model):
        z = asked.outputs(model)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, targets), z)
    return flat_outputs(asked.samples.lay_out(gradient)).permute(1, 2, 0).flatten()
