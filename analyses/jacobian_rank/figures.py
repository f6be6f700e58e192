"""Figures of the Jacobian-rank analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.jacobian_rank import panels
from analyses.jacobian_rank.networks import TRAINED

_layout = partial(Layout, "python -m analyses.jacobian_rank")

FIGURES: Mapping[str, Layout] = {
    "rank": _layout([[panels.smallest_eigenvalue, panels.unit_rank]], claims=("rank-",), height=2.6),
    "stability": _layout(
        [[panels.drift_on_path, panels.drift_in_ball, panels.drift_at_edge]], claims=("drift-",), height=2.6
    ),
    "rate": _layout(
        [[panels.residual_against_step, panels.steps_against_condition]],
        claims=("rate-", "modes-"),
        height=2.8,
    ),
    "kfac": _layout([[panels.decay_against_leverage, panels.kfac_error]], claims=("kfac-",), height=2.6),
    "movement": _layout([[panels.movement_ratio]], claims=("movement-",), width="column", height=2.4),
    "paths": _layout(
        [
            [
                partial(panels.output_paths, run="natural-gradient", structure="full"),
                partial(panels.output_paths, run="gradient-descent", structure="gradient-descent"),
            ]
        ],
        claims=("paths-",),
        height=2.8,
    ),
    "structures": _layout(
        [[panels.remaining_by_structure, panels.constant_by_structure, panels.distance_by_structure]],
        claims=("faster-", "stable-", "linear-"),
        height=2.9,
    ),
    "networks": _layout(
        [[partial(panels.change_of_networks, network=network) for network in TRAINED]],
        claims=("networks-drift-", "networks-stable-", "networks-rate-"),
        height=2.4,
    ),
    "width": _layout([[panels.needed_width]], claims=("width-",), width="column", height=2.9),
}
"""What a run draws, by the name of the file."""
