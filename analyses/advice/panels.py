"""The panels of the advice analysis' figures; what a run has not measured itself is drawn from the results that come along."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from analyses.advice.config import PROBLEMS
from analyses.advice.experiment import DIVERGED, LOSS, RATIO, SEEN, ratio
from curvlab.advice.candidates import Method
from curvlab.study import load, style
from curvlab.study.panels import DASHED, NEUTRAL, SMALL, NotStored, Rows, note, one_each, plain_ticks, take

STORED = Path(__file__).with_name("stored")
"""Results of a run, which come with the package."""
ARMS: Mapping[str, style.Look] = {
    "advice": style.Look("#0072B2", "o", "advice"),
    "adam": style.Look("#D55E00", "s", "Adam, tuned as long"),
    "grid": style.Look("#555555", "^", "grid search, ten times as long"),
}
"""How the choices look."""


def _all(measurements: pd.DataFrame, quantity: str, *arms: str) -> pd.DataFrame:
    """Return the observations of a quantity, with those that come along of problems that some arm was not run on."""
    table = measurements[measurements["quantity"] == quantity].assign(stored=False)
    stored = load(STORED).measurements
    stored = stored[(stored["quantity"] == quantity) & ~stored["problem"].isin(_complete(table, arms))]
    table = pd.concat([table[~table["problem"].isin(stored["problem"])], stored.assign(stored=True)])
    table = table[table["problem"].isin(_complete(table, arms)) & table["arm"].isin(arms)]
    return take(table, "advice", quantity)


def _complete(table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """Return the problems on which all of some arms were run."""
    return [str(name) for name, part in table.groupby("problem") if {*arms} <= {*part["arm"]}]


def _problems(table: pd.DataFrame) -> list[str]:
    """Return the problems, in the order of the table of all, others after them."""
    return sorted(
        table["problem"].unique(), key=lambda name: PROBLEMS.index(name) if name in PROBLEMS else len(PROBLEMS)
    )


def ratios(axes: Axes, measurements: pd.DataFrame, *, other: str) -> None:
    """Lowest test loss after advice over that after another choice: each seed, and the geometric mean with its interval.

    Hollow: not measured in this run, from the run that comes with the package. Dotted, against the grid search: 10 % above it.
    """
    table = _all(measurements, LOSS, "advice", other)
    axes.set_xscale("log")
    names = _problems(table)
    for place, name in enumerate(reversed(names)):
        runs = table[table["problem"] == name]
        values = ratio(runs, other)["value"]
        look = ARMS["advice"]
        axes.plot(values, np.full(len(values), place - 0.22), "|", color=look.color, markersize=5, alpha=0.6)
        style.across(axes, values, place + 0.1, look, hollow=bool(runs["stored"].any()))
    axes.axvline(1.0, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    if other == "grid":
        axes.axvline(RATIO, color=NEUTRAL, linestyle=":", linewidth=0.8, zorder=1)
    low, high = axes.get_xlim()
    if high < 100 * low:
        plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"test loss, advice / {'tuned Adam' if other == 'adam' else 'grid search'}")


def advised(axes: Axes, measurements: pd.DataFrame) -> None:
    """How many seeds each method was advised at, and at how many of them it diverged within 500 steps."""
    chosen, lost = _all(measurements, LOSS, "advice"), _all(measurements, DIVERGED, "advice")
    names, methods = _problems(chosen), get_args(Method)
    counts = chosen.pivot_table("value", "problem", "method", aggfunc="count").reindex(names, columns=methods).fillna(0)
    axes.imshow(counts.div(counts.sum(axis=1), axis=0), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for y, name in enumerate(names):
        for x, method in enumerate(methods):
            axes.text(x, y, f"{counts.loc[name, method]:.0f}", ha="center", va="center", fontsize=SMALL)
        runs = lost[lost["problem"] == name]["value"]
        note(axes, len(methods) - 0.4, y, f"{runs.sum():.0f}/{len(runs)}", va="center", annotation_clip=False)
    note(axes, len(methods) - 0.4, -0.55, "diverged", annotation_clip=False)
    axes.grid(visible=False)
    axes.set_xticks(range(len(methods)), ["natural\ngradient", *methods[1:]])
    axes.set_yticks(range(len(names)), names)


def curve(axes: Axes, measurements: pd.DataFrame, *, problem: str) -> None:
    """Test loss against the share of the budget that was trained, mean over seeds with its interval.

    Dashed: not measured in this run, from the run that comes with the package.
    """
    axes.set_xscale("log")
    axes.set_yscale("log")
    for arm, look in ARMS.items():
        try:
            table = _all(measurements, SEEN, arm)
        except NotStored:
            continue
        runs = table[table["problem"] == problem]
        if len(runs):
            line = DASHED if runs["stored"].any() else "-"
            style.band(axes, runs, "share", label=look.label, color=look.color, linestyle=line)
    axes.set_xticks((0.01, 0.1, 1.0), ("1 %", "10 %", "100 %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=problem, xlabel="share of the budget", ylabel="test loss")


def curves(measurements: pd.DataFrame) -> Rows:
    """Return a panel for every problem."""
    names = _problems(_all(measurements, SEEN, "advice"))
    return one_each([partial(curve, problem=name) for name in names], columns=4)
