"""What a training step asks of its gradients: whether they are finite, and still those of the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def is_hooked(parameter: nn.Parameter) -> bool:
    """Whether a hook may have changed what the backward pass brought."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def interchangeable(gradient: Tensor, direction: Tensor) -> bool:
    """Whether one can take the place of the other in memory."""
    return gradient.stride() == direction.stride()


def unchanged(gradient: Tensor, earlier: Tensor, version: int) -> bool:
    """Whether a gradient is what it was, and has not been written to."""
    return gradient is earlier and gradient._version == version


def masked(direction: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the direction, 0 if it or a gradient is not finite, without asking the device which it is."""
    finite = torch.stack([x.sum() for x in (*gradients.values(), *direction.values())]).isfinite().all()
    return {name: torch.where(finite, step, torch.zeros_like(step)) for name, step in direction.items()}


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries are finite; sums that overflow are looked at closely. Cost: one pass."""
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        return True
    sums = torch.stack([t.sum() for t in floating])
    return bool(sums.isfinite().all()) or all(bool(t.isfinite().all()) for t in floating)


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries together."""
    found: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(x.detach()).float() for x in tensors])
    )
    return found
