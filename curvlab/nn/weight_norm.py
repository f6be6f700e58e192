"""Weight normalisation with derivatives of every order.

torch computes `w = g·v/‖v‖` by a fused function, which has no forward-mode derivative and a wrong second one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from curvlab.nn.replacing import Replacing


def differentiable_weight_norm(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a forward pass of the model records weight norms that have all derivatives."""
    return Replacing({torch._weight_norm: _quotient}) if any(map(_weight_normed, model.modules())) else nullcontext()


def _weight_normed(module: nn.Module) -> bool:
    old = any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
    return old or isinstance(module, parametrizations._WeightNorm)


def _quotient(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return `g·v/‖v‖`, with a norm for every index of an axis, or a single one for `dim=-1`."""
    squares = v.square().sum() if dim == -1 else v.square().movedim(dim, 0).reshape(g.numel(), -1).sum(1).view_as(g)
    return v * (g / squares.sqrt())
