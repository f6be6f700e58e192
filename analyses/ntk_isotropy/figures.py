"""Figures of the isotropy analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.ntk_isotropy import panels

_layout = partial(Layout, "python -m analyses.ntk_isotropy")

FIGURES: Mapping[str, Layout] = {
    "isotropy": _layout(
        [[panels.scale_against_depth, panels.anisotropy_against_width]],
        claims=("isotropic-", "kfac-published", "anisotropic-diagonal", "anisotropic-ekfac", "gradient-descent-anis"),
        height=3.1,
    ),
    "training": _layout(
        [
            [
                panels.residual_against_rate,
                partial(panels.loss_against_step, loss="training", scale=0.5),
                partial(panels.loss_against_step, loss="training", scale=1.0),
            ]
        ],
        claims=("stability-",),
        height=2.9,
        columns=6,
    ),
    "convergence": _layout(
        [[panels.training_error, panels.jacobian_change]],
        claims=("training-", "convergence-", "jacobian-"),
        height=3.0,
    ),
    "test": _layout(
        [[panels.test_loss, panels.test_error]],
        claims=("test-full", "test-block", "test-kfac", "test-unit"),
        height=2.9,
        columns=6,
    ),
    "damping": _layout(
        [[panels.damped_loss]],
        claims=("damping-",),
        width="column",
        height=2.9,
    ),
    "tridiagonal": _layout(
        [[panels.damped_tridiagonal_scale, panels.damped_tridiagonal_anisotropy, panels.moved_layers]],
        claims=("tridiagonal-",),
        height=2.6,
    ),
    "kfac": _layout(
        [[panels.kfac_layers, panels.leverages, panels.kfac_inputs]],
        claims=("kfac-",),
        height=2.6,
    ),
    "unit_wise": _layout(
        [[panels.unit_wise_scale, panels.unit_wise_spread]],
        claims=("unit-wise-",),
        height=2.5,
    ),
    "cross_entropy": _layout(
        [
            [partial(panels.cross_entropy_loss, rank=rank) for rank in (0, 1)],
            [partial(panels.cross_entropy_ratio, rank=rank) for rank in (0, 1)],
        ],
        claims=("cross-entropy-",),
        height=2.3,
    ),
    "gradient_descent": _layout(
        [[panels.modes, panels.descent_error]],
        claims=("gradient-descent-",),
        height=2.4,
    ),
    "stability": _layout(
        [[panels.edge_of_stability, panels.sharpness]],
        claims=("preconditioned-", "edge-"),
        height=2.6,
    ),
    "positivity": _layout(
        [[panels.positivity]],
        claims=("positive-", "duplicates-", "narrow-"),
        width="column",
        height=2.5,
    ),
}
"""What a run draws, by the name of the file."""
