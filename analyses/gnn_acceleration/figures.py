"""Figures of the acceleration analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.gnn_acceleration import panels

_layout = partial(Layout, "python -m analyses.gnn_acceleration")

FIGURES: Mapping[str, Layout] = {
    "conditioning": _layout(
        [[partial(panels.singular_values, aggregation=aggregation) for aggregation in ("gcn", "gin")]],
        claims=("conditioning-", "rank-"),
        height=2.6,
    ),
    "bounds": _layout([[panels.looseness, panels.floors]], claims=("bound-", "floor-", "flow-", "margin-"), height=2.7),
    "acceleration": _layout(
        [
            [partial(panels.acceleration, part="flows", change=change) for change in ("skip", "depth")],
            [partial(panels.slower, change=change) for change in ("skip", "depth")],
        ],
        claims=("skip-", "depth-"),
        height=2.4,
    ),
    "labels": _layout(
        [[partial(panels.permutation, targets=targets) for targets in ("one-hot", "centred")]],
        claims=("labels-",),
        height=2.4,
    ),
    "relu": _layout(
        [[partial(panels.acceleration, part="relu", change=change) for change in ("skip", "depth", "labels")]],
        claims=("relu-",),
        height=2.4,
    ),
}
"""What a run draws, by the name of the file."""
