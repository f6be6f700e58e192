"""Forward passes that bring a change of the parameters to the output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.dlpack import from_dlpack

from curvlab.nn.linearize import differentiable_attention
from curvlab.spectrum.in_place import ChangesInPlace
from curvlab.spectrum.objective import Parameters, Part


def push(part: Part, at: Parameters, vector: Parameters) -> tuple[Float[Tensor, "N C ..."], Float[Tensor, "N C ..."]]:
    """Return the output z at parameters, and J v.

    Memory: the two results, and what layers return in between.
    """
    with torch.no_grad(), forward_ad.dual_level(), differentiable_attention(), ChangesInPlace():
        z, change = forward_ad.unpack_dual(
            part.output({name: moving(value, vector[name]) for name, value in at.items()})
        )
        return z, torch.zeros_like(z) if change is None else change


def moving(value: Tensor, change: Tensor) -> Tensor:
    """Return a dual tensor.

    `forward_ad.make_dual` copies a tangent that is a part of a longer vector, because its storage begins elsewhere; seen by DLPack
    it has a storage of its own.
    """
    if change.is_contiguous() and change.layout == torch.strided:
        change = from_dlpack(change.detach())
    dual: Tensor = forward_ad.make_dual(value, change)
    return dual
