"""Whether gradients are the sums over samples for which cheaper routes to the direction take them.

What the loss adds beside the outputs (penalties), clipping within the pass, unscaling and edits of `.data` change a gradient
where neither hooks nor version counters tell, so numbers decide: both sides are compared along random directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from math import hypot, isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.rows.layer import LayerRows

ROUND_OFF = 32.0
"""Largest difference that counts as round-off, in units of that of the terms."""

DIRECTIONS = (1, 4)
"""Random directions to compare along: one, and if that differs several, as all terms along one may be small by chance."""


def adds_up(rows: LayerRows, gradients: Mapping[str, Tensor], coefficients: Float[Tensor, " R"] | None = None) -> bool:
    """Whether gradients of a layer's parameters are the sum of rows, times coefficients if there are any.

    False if anything is not finite. Cost: one pass over the rows' factors and the gradients.
    """
    return any(_agree(rows, gradients, coefficients, directions) for directions in DIRECTIONS)


def is_small(layer: LayerRows) -> bool:
    """Whether a sample's row and inputs, of all samples, are so few numbers that factoring the gradient may pay."""
    numbers = [*layer.sample_factors, *(rows[0] for rows in layer.row_factors)]
    return 3 * sum(factor.numel() for factor in numbers) <= 4 * layer.size


def _agree(rows: LayerRows, gradients: Mapping[str, Tensor], coefficients: Tensor | None, directions: int) -> bool:
    layout, like = rows.layout, rows.row_factors[-1]
    units, width = _random(layout.units + layout.width, directions).to(like).split([layout.units, layout.width])
    terms = rows.along(units, width)
    if coefficients is not None:
        terms = terms * coefficients[:, None]
    along_width = [
        slot.columns(gradients[slot.name], layout.units) @ width[slot.start : slot.stop] for slot in layout.slots
    ]
    found = (units * reduce(torch.add, along_width)).sum(0)
    sums, sizes, sought = torch.stack([terms.sum(0), terms.abs().sum(0), found]).tolist()
    round_off = ROUND_OFF * torch.finfo(like.dtype).eps * hypot(*sizes) / sqrt(directions)
    return isfinite(round_off) and all(abs(one - other) <= round_off for one, other in zip(sums, sought, strict=True))


@lru_cache(maxsize=256)
def _random(entries: int, directions: int) -> Float[Tensor, "entries directions"]:
    """Return normal entries, the same in every step."""
    return torch.randn(entries, directions, generator=torch.Generator().manual_seed(directions), device="cpu")
