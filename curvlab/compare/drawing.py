"""Figures of a comparison: colours and markers of structures are those of all other figures."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curvlab.tools.canvas import canvas, use
from curvlab.tools.looks import look

if TYPE_CHECKING:
    import pandas as pd

RATES = {
    "eta_linear": ("|", "linearised model, first step"),
    "eta_batch": ("<", "one step, this batch"),
    "eta_second": (">", "one step, second batch"),
    "eta_repeated": ("D", "steps in a row"),
    "eta": ("*", "largest fall"),
}
"""Learning rates that are drawn, each with a marker and its words."""
LINES = ("-", "--", ":", "-.")
"""Of dampings, in their order."""
FLOOR = 0.05
"""Losses that rise are drawn down to this share of the largest fall below zero, no further."""


def draw(table: pd.DataFrame, steps: pd.DataFrame, *, real: bool) -> Figure:
    """Draw real steps and learning rates, or scale and anisotropy of the response where there were no steps.

    Args:
        table: one row a candidate.
        steps: one row a real step.
        real: whether real steps were taken.
    """
    with use():
        height = max(2.5, 0.22 * len(table) + 0.9)
        figure, axes = canvas(1, 2, width="double", height=height)
        left, right = axes[0]
        names = [f"{look(str(row.structure)).label}, {row.damping}" for row in table.itertuples()]
        if real:
            _falls(left, steps)
            _rates(right, table)
            _lines(right, names)
        else:
            _points(left, table, "alpha")
            left.set_xlabel("scale α of the response")
            _lines(left, names)
            _points(right, table, "anisotropy")
            right.set_xlabel("anisotropy of the response")
            _lines(right, [""] * len(names))
    return figure


def _lines(axes: Axes, names: list[str]) -> None:
    """Give every candidate a line, the first one at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _falls(axes: Axes, steps: pd.DataFrame) -> None:
    """Draw how far the loss falls at each learning rate, a line a candidate."""
    column = "second_fall" if steps["second_fall"].notna().any() else "fall"
    styles = dict(zip(dict.fromkeys(steps["damping"]), cycle(LINES), strict=False))
    top = steps[column].max()
    lowest = -FLOOR * abs(top) if np.isfinite(top) and top else -1.0
    for (structure, damping), group in steps.groupby(["structure", "damping"], sort=False):
        style = look(str(structure))
        values = group[column].fillna(-np.inf).clip(lower=lowest)
        axes.plot(
            group["learning_rate"], values, styles[damping], color=style.color, marker=style.marker, markersize=3.0
        )
    axes.axhline(0, color="#333333", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of one real step")
    axes.set_ylabel("fall of the loss of the " + ("second batch" if column == "second_fall" else "batch"))
    shown = {str(s): look(str(s)) for s in dict.fromkeys(steps["structure"])}
    handles = [Line2D([], [], color=s.color, marker=s.marker, label=s.label) for s in shown.values()]
    handles += [Line2D([], [], color="#333333", linestyle=line, label=f"ρ = {rho}") for rho, line in styles.items()]
    _legend(axes, handles)


def _rates(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the learning rates of every candidate on a line of its own."""
    for column, (marker, _) in RATES.items():
        _points(axes, table, column, marker)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    handles = [
        Line2D(
            [], [], linestyle="", marker=marker, color="#333333", markerfacecolor=_face(column, "#333333"), label=words
        )
        for column, (marker, words) in RATES.items()
    ]
    _legend(axes, handles)


def _legend(axes: Axes, handles: list[Line2D]) -> None:
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=6)


def _points(axes: Axes, table: pd.DataFrame, column: str, marker: str | None = None) -> None:
    """Draw a column, a line a candidate, with a marker that stands for the column or else with those of structures."""
    for place, (structure, value) in enumerate(zip(table["structure"], table[column], strict=True)):
        if np.isfinite(value) and value > 0:
            style = look(str(structure))
            face = _face(column, style.color)
            axes.plot(
                [value], [place], linestyle="", marker=marker or style.marker, color=style.color, markerfacecolor=face
            )


def _face(column: str, color: str) -> Any:
    """Filled markers for what a user would take, hollow ones for the rest."""
    return color if column in ("eta", "eta_repeated", "alpha", "anisotropy") else "white"
