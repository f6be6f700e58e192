"""Figures of the isotropy analysis, drawn from stored measurements only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
from matplotlib.figure import Figure

from curvlab.study import style

Draw = Callable[[pd.DataFrame, pd.DataFrame], Figure]


def _isotropy(measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:  # noqa: ARG001
    table = measurements[(measurements["part"] == "response") & (measurements["quantity"] == "anisotropy")]
    figure, axes = style.canvas()
    for structure, group in table[
        (table["kind"] == "exact") & (table["depth"] == 3) & (table["activation"] == "relu") & (table["outputs"] == 1)
    ].groupby("structure"):
        style.measured(axes[0, 0], group, "width", str(structure))
    axes[0, 0].set(xscale="log", yscale="log", xlabel="width (neurons)", ylabel="anisotropy")
    return figure


FIGURES: Mapping[str, Draw] = {"isotropy": _isotropy}
