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
    """Bring the cotangents to the edges, all rows in one pass; see `pull`."""
    return pull([z], edges, [cotangents], keep=keep) if z.requires_grad else [None for _ in edges]


def pull(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    edges: Sequence[GradientEdge | Tensor | None],
    cotangents: Sequence[Float[Tensor, "V ..."]],
    *,
    keep: bool = False,
) -> list[Tensor | None]:
    """Bring cotangents at some outputs to edges, all rows in one pass; a single one as autograd's own, without a batch of one.

    One row after the other where torch cannot vectorise a layer's reverse pass, as that of a GroupNorm on channels-last data.
    """
    reached: Any = [edge for edge in edges if edge is not None]
    if not reached:
        return [None for _ in edges]
    rows = len(cotangents[0])

    def pulled(at: Sequence[Tensor], *, batched: bool, keep: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, reached, at, is_grads_batched=batched, allow_unused=True, retain_graph=keep
        )
        return found

    with unhooked(reached), _named_checkpoints():
        if rows == 1:
            single = pulled([c[0] for c in cotangents], batched=False, keep=keep)
            found = [None if g is None else g[None] for g in single]
        else:
            try:
                found = list(pulled(cotangents, batched=True, keep=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.info("One row after the other, as torch cannot vectorise the reverse pass: %s", error)
                each = [pulled([c[row] for c in cotangents], batched=False, keep=True) for row in range(rows)]
                arrived = ([g for g in of_edge if g is not None] for of_edge in zip(*each, strict=True))
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
