"""Derivatives of a loss at the outputs, in the memory of the outputs and one or two results, or in that of the outputs alone.

A cross-entropy over a large vocabulary has outputs that are larger than the rest of a model's activations, and automatic
differentiation keeps several copies of them. Its derivatives are known and are taken some positions at a time:

    slope      w/count (p − m/w)
    product    w/count (p ∘ c − p (pᵀc))

Other losses are differentiated as a whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jvp

from curvlab.rows.loss.cross_entropy import Labels, read_labels
from curvlab.rows.loss.own import is_altered
from curvlab.rows.loss.table import reduction_of
from curvlab.rows.loss.terms import flat_outputs
from curvlab.rows.products import pieces
from curvlab.spectrum.objective import Part
from curvlab.spectrum.pull import pull


def curved(part: Part, z: Float[Tensor, "N C ..."], change: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
    """Return the product of the loss's Hessian at outputs with a change of them."""
    found = _labels(part, z)
    if found is None:
        curved: Tensor = jvp(grad(part.of_output), (z,), (change,))[1]
        return curved
    (_, factor), flat, c = found, flat_outputs(z), flat_outputs(change)
    product = torch.empty_like(c)
    for n, x in pieces(flat):
        product[n, :, x] = _bent(flat[n, :, x].softmax(1), c[n, :, x], factor[n, :, x])
    return product.view(z.shape)


def slope_and_curved(
    part: Part, z: Float[Tensor, "N C ..."], change: Float[Tensor, "N C ..."], *, over: bool
) -> tuple[Float[Tensor, "N C ..."], Float[Tensor, "N C ..."]]:
    """Return the loss's gradient at outputs, and how it changes with them; may write over both if told `over`."""
    found = _labels(part, z)
    if found is None:
        at = z.detach().requires_grad_()
        (slope,) = pull([part.of_output(at)], [at], create_graph=True)
        return slope.detach(), pull([slope], [at], [change])[0]
    (labels, factor), flat, c = found, flat_outputs(z), flat_outputs(change)
    slope, product = (flat, c) if over else (torch.empty_like(flat), torch.empty_like(c))
    for n, x in pieces(flat):
        p, scale = flat[n, :, x].softmax(1), factor[n, :, x]
        product[n, :, x] = _bent(p, c[n, :, x], scale)
        slope[n, :, x] = labels.take_from(p, (n, x)).mul_(scale)
    return slope.view(z.shape), product.view(z.shape)


def _bent(
    p: Float[Tensor, "n C x"], c: Float[Tensor, "n C x"], factor: Float[Tensor, "n 1 x"]
) -> Float[Tensor, "n C x"]:
    product = p * c
    return product.sub_(p * product.sum(1, keepdim=True)).mul_(factor)


def _labels(part: Part, z: Tensor) -> tuple[Labels, Float[Tensor, "N 1 X"]] | None:
    """Return the targets of a cross-entropy, and the weight of every term over the divisor."""
    loss = part.loss
    if type(loss) is not nn.CrossEntropyLoss or is_altered(loss):
        return None
    labels = read_labels(loss, z, part.targets)
    return labels, labels.weight / (labels.count if reduction_of(loss) == "mean" else 1.0)
