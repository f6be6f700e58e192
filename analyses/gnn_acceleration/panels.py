"""The panels of the acceleration analysis' figures, each one relation between stored measurements and its prediction."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.gnn_acceleration.config import AGGREGATIONS
from curvlab.study import style
from curvlab.study.panels import groups, level, note, side_by_side, take

SINGLE, MULTI = "gradient-descent", "full"
"""Looks of single-scale and multiscale models; GIN's markers are hollow."""
LOOKS = {"single": SINGLE, "multi": MULTI}
NAMES = {"single": "single-scale", "multi": "multiscale"}
ZERO = 1e-30
"""Squares of singular values that are zero to round-off are drawn here."""
SHADES = {1: "unit-wise", 2: "block-diagonal", 4: "block-tridiagonal", 6: "diagonal"}
"""Looks of depths in the search for counter-examples."""


def _by_aggregation(axes: Axes, table: pd.DataFrame, x: str, look: str, where: str = "") -> None:
    """Draw the measurements of each aggregation side by side; where they were made enters the legend."""
    of = table["aggregation"]
    side_by_side(
        axes, x, ((table[of == name], look, name.upper() + where, name == "gin") for name in AGGREGATIONS), 4.0
    )


def _depth_axis(axes: Axes, table: pd.DataFrame, label: str = "depth $H$") -> None:
    axes.set_xticks(sorted(int(depth) for depth in table["depth"].unique()))
    axes.margins(x=0.12)
    axes.set_xlabel(label)


def singular_values(axes: Axes, measurements: pd.DataFrame, *, aggregation: str, form: str = "normalised") -> None:
    """σ_min² and σ_max² of G_H and of G^[H] against depth; where F ≥ n the stack's cannot fall below the first (line)."""
    axes.set_yscale("log")
    at = {"aggregation": aggregation, "form": form, "features": "all"}
    split = take(measurements, "conditioning", "smallest", **at)["split"].iloc[0]
    for quantity, end in (("largest", "max"), ("smallest", "min")):
        table = take(measurements, "conditioning", quantity, split=split, **at)
        table = table.assign(value=table["value"].clip(lower=ZERO))
        sorts = (("single", SINGLE, "$G_H$"), ("stack", MULTI, "$G^{[H]}$"))
        side_by_side(axes, "depth", (
            (table[table["sort"] == sort], look, rf"$\sigma_{{\{end}}}^2$ of {features}", quantity == "largest")
            for sort, look, features in sorts
        ))  # fmt: skip
    stack = take(measurements, "conditioning", "smallest", sort="stack", split=split, **at)
    if bool(stack["monotone"].all()):
        first = float(stack.loc[stack["depth"] == stack["depth"].min(), "value"].mean())
        ends = [float(stack["depth"].min()), float(stack["depth"].max())]
        label = r"floor of $\sigma_{\min}^2$ of $G^{[H]}$"
        style.theory(axes, ends, [max(first, ZERO)] * 2, "block-tridiagonal", label=label)
    _depth_axis(axes, table)
    axes.set(ylabel=r"$\sigma^2$ of the features", title=f"{aggregation.upper()}, {split} split, {form}")


def looseness(axes: Axes, measurements: pd.DataFrame) -> None:
    """Measured exponent of the decay over the one of the bound, at the end of the flow, against depth."""
    axes.set_yscale("log")
    table = take(measurements, "flows", "looseness", start="zero", features="all")
    _models(axes, table)
    level(axes, 1.0)
    note(axes, table["depth"].min(), 1.0, "the bound", va="top", xytext=(-4, -1))
    axes.set_ylim(bottom=0.4)
    axes.set(ylabel="decay exponent, measured over bound")


def floors(axes: Axes, measurements: pd.DataFrame) -> None:
    """λ_T by the start of the weights, at the depth at which starts are compared; the derived floor as a line."""
    table = take(measurements, "flows", "floor", model="single", features="all")
    depth = table.loc[table["start"] != "zero", "depth"].max()
    table = table[table["depth"] == depth]
    guaranteed = take(measurements, "flows", "guaranteed", model="single", depth=depth, features="all")
    starts = [start for start in ("zero", "orthogonal", "glorot", "uniform") if (table["start"] == start).any()]
    axes.set_yscale("log")
    table = table.assign(place=table["start"].map(starts.index), value=table["value"].clip(lower=1e-12))
    _by_aggregation(axes, table, "place", SINGLE)
    for place, start in enumerate(starts):
        floor = float(guaranteed.loc[guaranteed["start"] == start, "value"].mean())
        if floor > 0:
            label = "floor for all times" if not place else None
            style.theory(axes, [place - 0.35, place + 0.35], [floor, floor], "block-tridiagonal", label=label)
    axes.set_xticks(range(len(starts)), ["orthogonal,\nzero heads", "orthogonal", "Glorot", "uniform"][: len(starts)])
    axes.margins(y=0.15)
    axes.set(ylabel=rf"$\lambda_T$, $H={int(depth)}$")


def _models(axes: Axes, table: pd.DataFrame) -> None:
    """Draw single- and multiscale models of both aggregations side by side, against depth."""
    side_by_side(axes, "depth", (
        (table[(table["model"] == model) & (table["aggregation"] == key)], look, f"{NAMES[model]}, {key.upper()}", key == "gin")
        for model, look in LOOKS.items()
        for key in AGGREGATIONS
    ))  # fmt: skip
    _depth_axis(axes, table)


def acceleration(axes: Axes, measurements: pd.DataFrame, *, experiment: str, change: str) -> None:
    """Loss left with new scales over that without, against depth; of flows also each at its own horizon."""
    axes.set_yscale("log")
    where = {"features": "all"} if experiment == "flows" else {}
    shown = (("ratio", MULTI, ""), ("own_ratio", SINGLE, ", own horizon"))[: 1 + len(where)]
    for quantity, look, label in shown:
        table = take(measurements, experiment, f"{change}_{quantity}", **where)
        keys = [table[key] for key in ("aggregation", "depth", "seed")]
        table = np.exp(np.log(table["value"]).groupby(keys).mean()).reset_index()
        _by_aggregation(axes, table, "depth", look, label)
    level(axes, 1.0)
    _depth_axis(axes, table)
    titles = {"skip": "skip connections", "depth": "the last layer", "labels": "true labels"}
    axes.set(ylabel="loss left, with / without", title=titles[change])
    if change == "labels":
        axes.set_ylabel("loss left, true / permuted")


def slower(axes: Axes, measurements: pd.DataFrame, *, change: str) -> None:
    """Share of random models at equal outputs that new scales make slower, against the size of the heads."""
    table = take(measurements, "search", "slower", change=change)
    table = table[table["heads"] > 0].groupby(["depth", "heads", "seed"])["value"].mean().reset_index()
    style.log_ticks(axes, sorted(table["heads"].unique()))
    axes.margins(x=0.12)
    depths = ((int(depth), rows) for depth, rows in groups(table, "depth"))
    side_by_side(axes, "heads", ((rows, SHADES[depth], f"$H={depth}$", False) for depth, rows in depths))
    axes.set_ylim(bottom=-0.01)
    axes.set(
        xlabel=r"size of the heads, times width$^{-1/2}$",
        ylabel="share of models made slower",
        title="skip connections" if change == "skip" else "the last layer",
    )


def permutation(axes: Axes, measurements: pd.DataFrame, *, targets: str) -> None:
    """Initial speed of each scale with true labels over the geometric mean of permutations."""
    axes.set_yscale("log")
    table = take(measurements, "labels", "speed_ratio", targets=targets)
    _by_aggregation(axes, table, "depth", MULTI)
    level(axes, 1.0)
    _depth_axis(axes, table, "scale $l$")
    axes.set(ylabel="initial speed, true / permuted", title=f"{targets} targets")


def relu_losses(axes: Axes, measurements: pd.DataFrame, *, aggregation: str, loss: str) -> None:
    """Loss over its initial value against steps of gradient descent on ReLU networks of the largest depth."""
    table = take(measurements, "relu", "loss", aggregation=aggregation, loss=loss)
    depth = table["depth"].max()
    table = table[(table["depth"] == depth) & (table["step"] > 0)]
    side_by_side(axes, "step", ((table[table["model"] == m], look, NAMES[m], False) for m, look in LOOKS.items()), 4.0)
    level(axes, 1.0)
    axes.set(xlabel="step", ylabel="loss over its start", title=f"{aggregation.upper()}, {loss}, $H={int(depth)}$")
