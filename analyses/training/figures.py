"""Figures of the training analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.training import panels

_layout = partial(Layout, "python -m analyses.training")

FIGURES: Mapping[str, Layout] = {
    "curves": _layout(
        [
            [partial(panels.curves, names=names, against=against) for against in ("steps", "seconds")]
            for names in (panels.ROWS, panels.MOMENTS)
        ],
        claims=(),
        height=2.5,
        columns=6,
    ),
    "targets": _layout(
        [[partial(panels.targets, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("steps-", "time-loss", "time-accuracy"),
        height=3.2,
    ),
    "ingredients": _layout(
        [[partial(panels.ingredients, seconds=seconds, named=not seconds) for seconds in (False, True)]],
        claims=("ingredient-", "time-step"),
        height=2.2,
    ),
    "rates": _layout(
        [[panels.equal_rates, panels.contraction]], claims=("rate-", "equal-rate-", "contraction-"), height=2.6
    ),
}
"""What a run draws, by the name of the file."""
