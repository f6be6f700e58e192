"""The panels of the monitor analysis' figure."""

from collections.abc import Mapping
from itertools import chain, repeat

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.monitor.courses import COURSES
from analyses.monitor.experiment import AHEAD, CONSTANT, RAMP, SHARE, SHOWN, TOLD
from curvlab.study import style
from curvlab.study.measurements import is_outside
from curvlab.study.panels import DASHED, NEUTRAL, NotStored, note, take

LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
"""Colours and markers of the problems, in their order; those of one's own are grey."""
RATES: Mapping[str, style.Look] = {
    CONSTANT: style.Look("#333333", "o", "constant rate, all quantities"),
    RAMP: style.Look("#888888", "s", "growing rate, the edge alone"),
}
"""How learning rates look."""


def _problems(table: pd.DataFrame) -> dict[str, style.Look]:
    """Return the problems with their looks, in the order of the courses, others after them."""
    found = set(table["problem"])
    order = [*COURSES, *sorted(found.difference(COURSES))]
    looks = chain(LOOKS, repeat(("#777777", "v")))
    return {name: style.Look(*look, name) for name, look in zip(order, looks, strict=False) if name in found}


def told(axes: Axes, measurements: pd.DataFrame) -> None:
    """Step of the event "at the edge" against the step at which the loss shows an instability, of each seed at a growing rate.

    Below the diagonal the event comes first. Hollow, at the top: none came.
    """
    shown = take(measurements, "runs", SHOWN, rate=RAMP).set_index(["problem", "seed"])["value"]
    try:
        events = (
            take(measurements, "runs", TOLD, rate=RAMP).set_index(["problem", "seed"])["value"].reindex(shown.index)
        )
    except NotStored:
        events = pd.Series(np.nan, shown.index)
    top = 1.15 * float(shown.max())
    axes.axline((0, 0), slope=1, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    for name, look in _problems(shown.reset_index()).items():
        x, y = shown[name], events[name]
        axes.plot(x, y, look.marker, color=look.color, label=name, markersize=4, alpha=0.7)
        missed = x[y.isna()]
        axes.plot(missed, [top] * len(missed), look.marker, color=look.color, markerfacecolor="white", markersize=4)
    if events.isna().any():
        note(axes, 0, top, "no event", va="center", xytext=(3, 0))
    axes.set(xlim=(0, top), ylim=(0, 1.05 * top))
    axes.set(xlabel="step at which the loss shows it", ylabel="step of the event")


def ahead(axes: Axes, measurements: pd.DataFrame) -> None:
    """Steps by which the event comes first, of each seed, with the median; 0 where none came."""
    table = take(measurements, "runs", AHEAD)
    table = table[~is_outside(table)]
    if table.empty:
        raise NotStored("A run whose loss shows an instability")
    problems = _problems(table)
    for place, (name, look) in enumerate(problems.items()):
        values = table[table["problem"] == name]["value"]
        axes.plot(values, np.full(len(values), -place), look.marker, color=look.color, markersize=4, alpha=0.7)
        axes.plot([values.median()] * 2, [-place - 0.3, -place + 0.3], color=look.color, linewidth=1.5)
    _rows(axes, list(problems))
    axes.axvline(0, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set(xlabel="steps before the loss shows it")


def shares(axes: Axes, measurements: pd.DataFrame) -> None:
    """The monitor's share of the time, each run, and the mean over seeds; dashed: the budget that was given."""
    table = take(measurements, "runs", SHARE)
    problems = list(_problems(table))
    for rate, look in RATES.items():
        shift = 0.15 if rate == CONSTANT else -0.15
        for place, name in enumerate(problems):
            values = 100 * table[(table["problem"] == name) & (table["rate"] == rate)]["value"]
            axes.plot(values, np.full(len(values), -place + shift), "|", color=look.color, markersize=5, alpha=0.6)
            if len(values):
                style.across(axes, values, -place + shift, look)
        axes.plot([], [], look.marker, color=look.color, label=look.label)
    budget = 100 * float(table["budget"].iloc[0])
    axes.axvline(budget, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    _rows(axes, problems)
    axes.set(xlim=(0, 1.1 * max(budget, 100 * float(table["value"].max()))), xlabel="share of the time (%)")


def _rows(axes: Axes, names: list[str]) -> None:
    """Name rows from the top down."""
    axes.set_yticks(range(0, -len(names), -1), names)
    axes.set_ylim(0.6 - len(names), 0.6)
