"""Derivatives of a loss at the outputs, in the memory of the outputs and one or two results.

A cross-entropy over a large vocabulary has outputs that are larger than the rest of a model's activations, and automatic
differentiation keeps several copies of them. Its derivatives are known and are taken some positions at a time:

    slope      w/count (p − m/w)
    product    w/count (p ∘ c − p (pᵀc))

Other losses are differentiated as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp

from curvlab.rows.loss.cross_entropy import Labels, read_labels
from curvlab.rows.loss.own import is_altered
from curvlab.rows.loss.table import reduction_of
from curvlab.rows.loss.terms import flat_outputs
from curvlab.rows.products import Piece, pieces
from curvlab.spectrum.objective import Part


def curved(part: Part, z: Float[Tensor, "N C ..."], change: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
    """Return the product of the loss's Hessian at outputs with a change of them."""
    found = _labels(part, z)
    if found is None:
        curved: Tensor = jvp(grad(part.of_output), (z,), (change,))[1]
        return curved
    c, (_, factor) = flat_outputs(change), found

    def product(piece: Piece, p: Tensor) -> Tensor:
        bent = p * c[piece[0], :, piece[1]]
        return bent.sub_(p * bent.sum(1, keepdim=True)).mul_(factor[piece[0], :, piece[1]])

    return _by_piece(z, c, product)


def slope_and_curved(
    part: Part, z: Float[Tensor, "N C ..."], change: Float[Tensor, "N C ..."]
) -> tuple[Float[Tensor, "N C ..."], Float[Tensor, "N C ..."]]:
    """Return the loss's gradient at outputs, and how it changes with them; within `forward_ad.dual_level`."""
    found = _labels(part, z)
    if found is None:
        at = z.detach().requires_grad_()
        value = part.of_output(forward_ad.make_dual(at, change))
        (slope,) = torch.autograd.grad(value, at, materialize_grads=True)
        primal, tangent = forward_ad.unpack_dual(slope)
        return primal, torch.zeros_like(primal) if tangent is None else tangent
    labels, factor = found

    def scores(piece: Piece, p: Tensor) -> Tensor:
        return labels.take_from(p, piece).mul_(factor[piece[0], :, piece[1]])

    return _by_piece(z, flat_outputs(z), scores), curved(part, z, change)


def _labels(part: Part, z: Tensor) -> tuple[Labels, Float[Tensor, "N 1 X"]] | None:
    """Return the targets of a cross-entropy, and the weight of every term over the divisor."""
    loss = part.loss
    if type(loss) is not nn.CrossEntropyLoss or is_altered(loss):
        return None
    labels = read_labels(loss, z, part.targets)
    return labels, labels.weight / (labels.count if reduction_of(loss) == "mean" else 1.0)


def _by_piece(
    z: Float[Tensor, "N C ..."], like: Float[Tensor, "N C X"], compute: Callable[[Piece, Tensor], Tensor]
) -> Float[Tensor, "N C ..."]:
    """Compute a result of the outputs' shape from probabilities, some positions at a time."""
    flat, result = flat_outputs(z), torch.empty_like(like)
    for piece in pieces(flat):
        n, x = piece
        result[n, :, x] = compute(piece, flat[n, :, x].softmax(1))
    return result.view(z.shape)
