"""What a rule is, and what rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.rows.aligned import aligned
from curvlab.rows.grouping import Grouping
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.parameters import Layout

Names = Mapping[str, str]
"""Local names of a module's trainable parameters (`weight`) to their names in the model (`0.weight`)."""

Inputs = tuple[Tensor, ...]
"""The tensors that a module was called on, in the order of its signature."""


@dataclass(frozen=True, eq=False)
class LayerUse:
    """A module through whose forward pass parameters are used.

    Attributes:
        module: the module.
        name: its name in the model, empty for the model itself.
        names: local names of its trainable parameters to their names in the model, a tied parameter's first one.
        layout: how they are laid out in units.
    """

    module: nn.Module
    name: str
    names: Names
    layout: Layout


@dataclass(frozen=True)
class Rule:
    """How the rows of a kind of module are formed.

    Attributes:
        units: number of units of a module (output channels, scale-shift pairs, table rows).
        rows: `(use, inputs, g [V, N, *output])` to the rows of one call.
        check: raises `UnsupportedModel` for settings that the rule does not cover, if there are any.
        input_first: number of groups of a weight `[groups·inputs, outputs, …]`; units come first if None.
        axes: number of axes of an input with samples, if a module also takes one without.
        of_samples: `(use, inputs, g, grouping)` to the rows of samples that have several entries each along the first axis, where
            that is more than to add these up.
    """

    units: Callable[[Any], int]
    rows: Callable[[LayerUse, Inputs, Tensor], LayerRows]
    check: Callable[[Any, str], None] | None = None
    input_first: Callable[[Any], int] | None = None
    axes: Callable[[Any], int] | None = None
    of_samples: Callable[[LayerUse, Inputs, Tensor, Grouping], LayerRows] | None = None


def augmented(a: Tensor, names: Names, bias_scale: float = 1.0, *, axes: int = 1) -> Tensor:
    """Join the last axes to columns, drop these if the weight is frozen, append the bias' column if the bias is not."""
    shape, features = a.shape[:-axes], a.shape[-axes:]
    width = features.numel() if "weight" in names else 0
    columns = aligned((*shape, width + ("bias" in names)), a)
    if width:
        columns[..., :width].unflatten(-1, features).copy_(a)
    columns[..., width:] = bias_scale
    return columns


def scale_shift(use: LayerUse, normalised: Float[Tensor, "N T U"], g: Float[Tensor, "V N T U"]) -> LayerRows:
    """Return the rows of an elementwise scale and shift."""
    columns = []
    if "weight" in use.names:
        columns.append((g * normalised).sum(2))
    if "bias" in use.names:
        columns.append(g.sum(2))
    return DenseRows(use.name, use.layout, torch.stack(columns, dim=-1))
