"""Figures of the edge-of-stability analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.edge_of_stability import panels

COMMAND = "python -m analyses.edge_of_stability"
_layout = partial(Layout, COMMAND)

APPROXIMATIONS = (
    ("full", "block-diagonal", "block-tridiagonal"),
    ("kfac", "ekfac", "unit-wise"),
    ("diagonal", "mc", "empirical"),
)


def _largest(name: str) -> partial[None]:
    return partial(panels.largest_of, approximation=name)


FIGURES: Mapping[str, Layout] = {
    "edge": _layout(
        [[panels.loss_against_step, panels.sharpness_against_step]],
        claims=("edge-gd", "sharpening-gd", "plateaus", "loss-"),
        height=2.5,
    ),
    "momentum": _layout(
        [
            [partial(panels.loss_against_step, optimiser=name), partial(panels.sharpness_against_step, optimiser=name)]
            for name in ("heavy-ball", "nesterov")
        ],
        claims=("edge-heavy", "edge-nesterov"),
    ),
    "plateaus": _layout([[panels.plateaus, panels.ratios]], claims=("plateaus", "edge-", "above-"), height=2.7),
    "flow": _layout([[panels.flow_sharpness, panels.flow_distance]], claims=("flow-",), height=2.5),
    "alignment": _layout([[panels.alignment_against_step]], claims=("alignment-",), width="column", height=2.4),
    "schedules": _layout(
        [[panels.catapults, panels.dropped_rate, panels.late_drop]],
        claims=("catapult-", "drop-", "late-"),
        height=2.4,
    ),
    "structures": _layout(
        [[_largest(name) for name in row] for row in APPROXIMATIONS], claims=("predicts-",), height=1.9
    ),
    "preconditioned": _layout(
        [[partial(panels.preconditioned, mode="frozen"), partial(panels.preconditioned, mode="live")]],
        claims=("preconditioned-", "natural-"),
        height=2.5,
    ),
    "chebyshev": _layout([[panels.chebyshev]], claims=("chebyshev-",), width="column", height=2.4),
}
"""What a run draws, by the name of the file."""
