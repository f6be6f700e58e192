"""Reverse passes that bring rows at the output to edges of a graph, all rows at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlab.errors import UnsupportedModel
from curvlab.rows.sweep import unhooked

logger = logging.getLogger("curvlab")


def backward(
    z: Tensor, edges: Sequence[GradientEdge | Tensor | None], cotangents: Tensor, *, keep: bool = False
) -> list[Tensor | None]:
    """Bring the cotangents to the edges, all rows in one pass; a single one as autograd's own, without a batch of one.

    One row after the other where torch cannot vectorise a layer's reverse pass, as that of a GroupNorm on channels-last data.
    """
    reached: Any = [edge for edge in edges if edge is not None]
    if not reached or not z.requires_grad:
        return [None for _ in edges]

    def pulled(cotangents: Tensor, *, batched: bool, keep: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            z, reached, cotangents, is_grads_batched=batched, allow_unused=True, retain_graph=keep
        )
        return found

    with unhooked(reached), _named_checkpoints():
        if len(cotangents) == 1:
            found = [None if g is None else g[None] for g in pulled(cotangents[0], batched=False, keep=keep)]
        else:
            try:
                found = list(pulled(cotangents, batched=True, keep=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.info("One row after the other, as torch cannot vectorise the reverse pass: %s", error)
                rows = [pulled(cotangent, batched=False, keep=True) for cotangent in cotangents]
                arrived = ([g for g in of_edge if g is not None] for of_edge in zip(*rows, strict=True))
                found = [torch.stack(gradients) if gradients else None for gradients in arrived]
    at_edge = iter(found)
    return [None if edge is None else next(at_edge) for edge in edges]


def cotangents_at(
    output: Float[Tensor, "M ..."], z: Float[Tensor, "N C ..."], cotangents: Float[Tensor, "V N C ..."]
) -> Float[Tensor, "V M ..."]:
    """Bring cotangents to an output of which z is a part, or another layout."""
    if z is output:
        return cotangents
    (found,) = backward(z, [output], cotangents, keep=True)
    return cotangents.new_zeros(len(cotangents), *output.shape) if found is None else found


@contextmanager
def _named_checkpoints() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise UnsupportedModel(
            "The model checkpoints activations with use_reentrant=True, through which torch brings no gradients to single "
            "layers. Call torch.utils.checkpoint.checkpoint with use_reentrant=False."
        ) from error
