"""One step of natural gradient on a batch, in the form that keeps its digits at any damping."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from curvlab.fisher.damping import Damping
from curvlab.fisher.structure import Structure
from curvlab.rows.making import rows_of_loss
from curvlab.rows.passes import Pass
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sweep import PickOutput
from curvlab.rows.upstream import output_gradient


def natural_gradient_step(
    structure: Structure,
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    damping: Damping = 0.0,
    metric: nn.Module | None = None,
    nodes: NodeChoice = None,
    output: PickOutput = None,
) -> dict[str, Tensor]:
    """Return `(F + ρI)⁻¹ ∇L` at the present parameters; a step subtracts η times it.

    Loss and Fisher matrix share their normalisation, so for a squared error and the full structure at ρ = 0 this is
    `Jᵀ(J Jᵀ)⁻¹(u − y)`, without a factor N, whether the loss is a mean or a sum.

    Args:
        structure: receives the rows of this batch in place of what it held.
        model: any module whose samples do not interact. It is left as it was found.
        loss: called as `loss(outputs, targets)`; any differentiable loss if there is a `metric`.
        inputs: the batch, as `curvlab.jacobian` takes it.
        targets: its targets.
        damping: ρ, absolute or relative; 0 for the pseudo-inverse.
        metric: loss whose Fisher matrix is F, `loss` itself if None. With `HalfSquaredError`, F = JᵀJ/N, the step moves
            the outputs by `−η ∇_u` of the summed loss: gradient descent in function space.
        nodes: which nodes of a graph carry rows, as in `curvlab.jacobian`.
        output: which tensor of a structured output to use, as in `curvlab.jacobian`.

    Returns:
        One tensor a trainable parameter, by name.

    Raises:
        UnsupportedModel, ValueError: see `curvlab.sqrt_fisher`.

    Cost: one sweep, one forward pass, one update and one `lift`.
    Source: Zhang, Martens & Grosse 2019, the step (NGD) and the one for general losses.
    """
    how = Pass(nodes=nodes, output=output)
    rows = rows_of_loss(model, metric or loss, inputs, targets, how)
    gradient = output_gradient(model, loss, inputs, targets, how)
    structure.update(rows)
    return structure.lift(structure.rows.dual(gradient), damping)
