"""Figures of the analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from analyses.drawing import Layout
from analyses.gnn_natural_gradient import panels
from analyses.gnn_natural_gradient.part import ACCURACY, VALIDATION_LOSS

_layout = partial(Layout, "python -m analyses.gnn_natural_gradient")

FIGURES: Mapping[str, Layout] = {
    "accuracy": _layout(
        [[panels.accuracy, panels.epochs, partial(panels.epochs, seconds=True)]],
        claims=("accuracy-", "epochs-", "seconds-", "headline-"),
        height=2.6,
    ),
    "curves": _layout(
        [
            [
                partial(panels.curves, quantity=quantity, choice=choice)
                for quantity in (VALIDATION_LOSS, ACCURACY)
            ]
            for choice in ("published", "selected")
        ],
        claims=("reach-",),
        height=2.3,
    ),
    "unlabelled": _layout([[panels.unlabelled, panels.ablations]], claims=("lambda-", "width-", "aggregation", "labels"),
                          height=2.8, columns=3),
    "sensitivity": _layout([[panels.epsilon, panels.refresh, panels.joint]], claims=("sensitivity-", "selection-"), height=2.5),
    "kronecker": _layout(
        [[panels.errors, *(partial(panels.cosines, space=space) for space in ("parameters", "outputs"))]],
        claims=("kronecker-",),
        height=2.4,
    ),
}  # fmt: skip
"""What a run draws, by the name of the file."""
