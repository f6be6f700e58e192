"""The gradient of a loss at a model's outputs, in the order of rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.rows.engine import read
from curvlab.rows.loss import flat_outputs
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sweep import PickOutput, call, left_as_found


def output_gradient(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    nodes: NodeChoice = None,
    output: PickOutput = None,
) -> Float[Tensor, " R"]:
    """Return ∂L/∂z, so that the gradient is `Jᵀ ∂L/∂z`; any differentiable loss will do.

    Arguments as in `curvlab.jacobian`. Cost: one forward pass.
    """
    arguments, samples = read(model, inputs, nodes)
    with torch.no_grad(), left_as_found(model):
        z = samples.choose(call(model, arguments, output))
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, targets), z)
    return flat_outputs(samples.lay_out(gradient)).permute(1, 2, 0).flatten()
