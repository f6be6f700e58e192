"""The panels of the training analysis' figures, each one relation between stored measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analyses.drawing import DASHED, NEUTRAL, NotStored, level, note, take
from analyses.training.comparison import SECONDS, seconds_to
from analyses.training.methods import METHODS
from analyses.training.parts.contraction import RATES
from analyses.training.parts.isotropic import LEFT, SCALES
from analyses.training.parts.isotropic import STRUCTURES as ISOTROPIC
from analyses.training.parts.judging import INGREDIENTS
from curvlab.study import style
from curvlab.study.inference import Summary

RIVALS: Mapping[str, tuple[str, Any, str, str]] = {
    "sgd": ("SGD with momentum", "-", "<", "#8a8a8a"),
    "adam": ("Adam", (0, (4, 1.5)), ">", "#6a6a6a"),
    "adamw": ("AdamW", (0, (1, 1)), "v", "#8a8a8a"),
    "muon": ("Muon", (0, (5, 1, 1, 1)), "d", "#4a4a4a"),
}
"""Name, dashes, marker and grey of the first-order methods; structures keep their colours."""

MOMENTS = ("diagonal", "kfac", "ekfac")
"""Structures that average moments; the others keep rows."""
ROWS = tuple(name for name, method in METHODS.items() if method.family == "structure" and name not in MOMENTS)
CONFIDENCE = 0.95


def _judged(measurements: pd.DataFrame, quantity: str, names: Sequence[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each method that was run, in the order of the table, with its observations of a quantity."""
    table = take(measurements, "judging", quantity, method=tuple(names))
    for name in METHODS:
        if (table["method"] == name).any():
            yield name, table[table["method"] == name]


def _line(name: str) -> dict[str, Any]:
    if name in RIVALS:
        label, dashes, _, color = RIVALS[name]
        return {"label": label, "linestyle": dashes, "color": color, "linewidth": 1.0, "zorder": 2}
    look = style.look(METHODS[name].structure)
    return {"label": look.label, "color": look.color, "linewidth": 1.2, "zorder": 3}


def _band(axes: Axes, x: np.ndarray, logs: pd.DataFrame, **line: Any) -> None:
    """Draw the geometric mean over seeds with its t-interval, up to a cross where the first seed diverged."""
    common = logs.dropna(axis=1)
    if common.empty:
        return
    places = x[: common.shape[1]]
    summaries = [Summary.of(common[step].to_numpy(dtype=float)) for step in common]
    mean = np.exp([summary.mean for summary in summaries])
    low, high = np.exp(np.array([summary.interval(CONFIDENCE) for summary in summaries])).T
    axes.plot(places, mean, **line)
    axes.fill_between(places, low, high, color=line["color"], alpha=0.15, linewidth=0, zorder=1)
    if common.shape[1] < logs.shape[1]:
        axes.plot(places[-1:], mean[-1:], "x", color=line["color"], markersize=6, markeredgewidth=1.4, zorder=4)


def curves(axes: Axes, measurements: pd.DataFrame, *, names: Sequence[str], against: str) -> None:
    """Training loss against steps or seconds, structures in colour and first-order methods in grey."""
    axes.set_yscale("log")
    seconds = against == "seconds"
    price = take(measurements, "timing", SECONDS).groupby("method")["value"].mean() if seconds else None
    for name, table in _judged(measurements, "loss", (*RIVALS, *names)):
        logs = table.assign(value=np.log(table["value"])).pivot_table("value", "seed", "step")
        steps = logs.columns.to_numpy(dtype=float)
        scale = 1.0 if price is None else float(price[name])
        shown = steps > 0
        _band(axes, scale * steps[shown], logs.loc[:, shown], **_line(name))
    if seconds:
        axes.set_xscale("log")
    axes.set(xlabel="seconds of training" if seconds else "steps", ylabel="training loss")


def _dot(axes: Axes, values: pd.Series, place: float, *, hollow: bool = False, **look: Any) -> None:
    """Draw the mean over seeds with its t-interval, on the scale of a logarithmic x axis."""
    summary = Summary.of(np.log(values.to_numpy(dtype=float)))
    low, high = np.exp(summary.interval(CONFIDENCE))
    mean = float(np.exp(summary.mean))
    error = [[mean - low], [high - mean]] if np.isfinite(low) else None
    color = look["color"]
    axes.errorbar(
        [mean], [place], xerr=error, fmt=look["marker"], color=color, ecolor=color, capsize=2, zorder=3,
        markerfacecolor="white" if hollow else color, markeredgecolor=color, label=look.get("label"),
    )  # fmt: skip


def _dot_look(name: str) -> dict[str, Any]:
    if name in RIVALS:
        _, _, marker, color = RIVALS[name]
        return {"marker": marker, "color": color}
    look = style.look(METHODS[name].structure)
    return {"marker": look.marker, "color": look.color}


def targets(axes: Axes, measurements: pd.DataFrame, *, seconds: bool, named: bool) -> None:
    """Steps or seconds to the loss (filled) and to the accuracy (hollow) of every method, and how many runs failed."""
    axes.set_xscale("log")
    present = [name for name, _ in _judged(measurements, "steps_to_loss", (*RIVALS, *ROWS, *MOMENTS))]
    for quantity, offset in (("steps_to_loss", 0.16), ("steps_to_accuracy", -0.16)):
        table = take(measurements, "judging", quantity, method=tuple(present))
        if seconds:
            table = seconds_to(pd.concat([table, take(measurements, "timing", SECONDS)]), quantity)
        for place, name in enumerate(reversed(present)):
            runs = table[table["method"] == name]
            _dot(axes, runs["value"], place + offset, hollow=quantity != "steps_to_loss", **_dot_look(name))
            failed = int((runs["status"] != "ok").sum())
            if failed:
                summary = Summary.of(np.log(runs["value"].to_numpy(dtype=float)))
                end = float(np.exp(np.nanmax([summary.mean, *summary.interval(CONFIDENCE)])))
                note(axes, end, place + offset, f"{failed}/{len(runs)} failed", va="center", xytext=(7, 0))
    labels = [RIVALS[name][0] if name in RIVALS else style.look(name).label for name in reversed(present)]
    axes.set_yticks(range(len(present)), labels if named else [""] * len(labels))
    axes.margins(x=0.3)
    axes.set_xlabel("seconds to the target" if seconds else "steps to the target")
    axes.set_title("filled: loss, hollow: accuracy")


def ingredients(axes: Axes, measurements: pd.DataFrame, *, seconds: bool, named: bool) -> None:
    """Steps to the loss, or seconds of a step, with an ingredient over those without it, left of 1 a gain."""
    axes.set_xscale("log")
    part, quantity = ("timing", SECONDS) if seconds else ("judging", "steps_to_loss")
    wide = take(measurements, part, quantity).pivot_table("value", "seed", "method")
    shown = [which for which in INGREDIENTS if {which.versus.method, *which.versus.others} <= set(wide.columns)]
    if not shown:
        raise NotStored("the comparison of K-FAC with and without its ingredients")
    for place, which in enumerate(reversed(shown)):
        look = style.look("kfac")
        ratio = wide[which.versus.method] / wide[which.versus.others[0]]
        _dot(axes, ratio, place, marker=look.marker, color=look.color)
    axes.axvline(1.0, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(shown)), [GAINS[which.name] if named else "" for which in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds of a step, with / without" if seconds else "steps to the loss, with / without")


GAINS = {
    "adapted": "Levenberg–Marquardt damping",
    "quadratic": "quadratic-model step",
    "clipped": "trust region",
    "split": "split damping",
    "average": "averaged factors",
    "rare": "rare inverses",
    "accumulated": "accumulated passes",
    "autocast": "autocast and loss scaling",
    "plain": "plain output layer",
}
"""Names of the ingredients."""


def equal_rates(axes: Axes, measurements: pd.DataFrame) -> None:
    """Share of the residual that one step leaves at η = 1/α and 1/(2α), by structure, and the limits (dashed)."""
    table = take(measurements, "isotropic", "rate")
    present = [name for name in ISOTROPIC if (table["structure"] == name).any()]
    for scale in SCALES:
        level(axes, 1 - scale)
        for place, name in enumerate(present):
            group = table[(table["structure"] == name) & (table["scale"] == scale)]
            style.measured(axes, group.assign(place=float(place)), "place", name, label="")
    axes.set_xticks(range(len(present)), [style.look(name).label for name in present], rotation=30, ha="right")
    axes.set_ylim(bottom=-LEFT)
    note(axes, -0.3, 0.5, r"$\eta=1/(2\alpha)$", xytext=(0, 4))
    note(axes, -0.3, 0.0, r"$\eta=1/\alpha$", xytext=(0, 6))
    axes.set_ylabel(r"$\|f_1-y\|\,/\,\|f_0-y\|$")


def contraction(axes: Axes, measurements: pd.DataFrame) -> None:
    """‖r‖² against steps: measured, the linear limit (1−η)^2k (lines), the bound (1−η)^k (dashed)."""
    axes.set_yscale("log")
    table = take(measurements, "contraction", "squared")
    steps = np.array(sorted(table["step"].unique()))
    for eta in RATES:
        group = table[table["eta"] == eta]
        style.theory(axes, steps, (1 - eta) ** (2 * steps), "full")
        axes.plot(steps, (1 - eta) ** steps, color=NEUTRAL, linestyle=DASHED, linewidth=0.9)
        style.measured(axes, group, "step", "full", label="")
        note(axes, steps[-1], float(group[group["step"] == steps[-1]]["value"].mean()), rf"$\eta={eta:g}$",
             va="center", xytext=(5, 0))  # fmt: skip
    axes.set_xlim(right=1.25 * steps[-1])
    axes.set(
        xlabel="step $k$", ylabel=r"$\|r_k\|^2/\|r_0\|^2$", title=r"line $(1-\eta)^{2k}$, dashed: bound $(1-\eta)^k$"
    )
