"""The panels of the training analysis' figures, each one relation between stored measurements."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.jacobian_rank import panels as jacobian_rank
from analyses.training.comparison import SECONDS, Comparison, seconds_to
from analyses.training.experiments import isotropic
from analyses.training.ingredients import INGREDIENTS
from analyses.training.methods import DEFAULT, METHODS, VARIANTS, in_order
from curvlab.fisher import KFAC
from curvlab.study import style
from curvlab.study.inference import Summary
from curvlab.study.panels import DASHED, NEUTRAL, SMALL, NotStored, note, plain_ticks, take
from curvlab.tools.errors import CommandError

RIVALS: Mapping[str, style.Look] = {
    "sgd": style.Look("#8a8a8a", "<", "SGD with momentum"),
    "adam": style.Look("#6a6a6a", ">", "Adam"),
    "adamw": style.Look("#8a8a8a", "v", "AdamW"),
    "muon": style.Look("#4a4a4a", "d", "Muon"),
}
"""Greys, markers and names of the first-order methods; structures keep their looks."""
DEFAULTS: Mapping[str, style.Look] = {
    DEFAULT: style.Look("#B2182B", "*", "NaturalGradient"),
    "preconditioned-sgd": style.Look("#762A83", "8", "Preconditioner, SGD"),
}
"""Colours, markers and names of what is as it is by default."""
DASHES: Mapping[str, Any] = {"adam": (0, (4, 1.5)), "adamw": (0, (1, 1)), "muon": (0, (5, 1, 1, 1))}
"""Of their lines."""


def _judged(measurements: pd.DataFrame, quantity: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each method that was run, but for ingredients, in the order of the table, with its observations of a quantity."""
    table = take(measurements, "judging", quantity)
    for name in in_order(table["method"].unique().tolist()):
        if name not in VARIANTS:
            yield name, table[table["method"] == name]


def _keeps_rows(name: str) -> bool:
    """Whether a structure keeps rows; what is not registered any more is taken to average moments."""
    with suppress(CommandError):
        return METHODS[name].keeps_rows
    return False


def _look(name: str) -> style.Look:
    return RIVALS.get(name) or DEFAULTS.get(name) or style.look(name)


def curves(axes: Axes, measurements: pd.DataFrame, *, rows: bool, against: str) -> None:
    """Training loss against steps or seconds, structures and defaults in colour and first-order methods in grey.

    The structures are those that keep rows, or those that average moments. A line ends in a cross where the first seed
    diverged.
    """
    axes.set_yscale("log")
    seconds = against == "seconds"
    price = take(measurements, "timing", SECONDS).groupby("method")["value"].mean() if seconds else None
    for name, table in _judged(measurements, "loss"):
        if name not in RIVALS and _keeps_rows(name) != rows:
            continue
        shown = table[table["step"] > 0]
        shown = shown.assign(place=(1.0 if price is None else float(price[name])) * shown["step"])
        look, rival = _look(name), name in RIVALS
        line = {"color": look.color, "linestyle": DASHES.get(name, "-"), "linewidth": 1.0 if rival else 1.2}
        means = style.band(axes, shown, "place", label=look.label, zorder=2 if rival else 3, **line)
        if len(means) and len(means) < shown["place"].nunique():
            axes.plot(means.index[-1:], means[-1:], "x", color=look.color, markersize=6, markeredgewidth=1.4, zorder=4)
    if seconds:
        axes.set_xscale("log")
    axes.set(xlabel="seconds of training" if seconds else "steps", ylabel="training loss")


def targets(axes: Axes, measurements: pd.DataFrame, *, seconds: bool, named: bool) -> None:
    """Steps or seconds to the loss (filled) and to the accuracy (hollow) of every method, and how many runs failed."""
    axes.set_xscale("log")
    present = [name for name, _ in _judged(measurements, "steps_to_loss")]
    for quantity, offset in (("steps_to_loss", 0.16), ("steps_to_accuracy", -0.16)):
        table = take(measurements, "judging", quantity, method=tuple(present))
        if seconds:
            table = seconds_to(pd.concat([table, take(measurements, "timing", SECONDS)]), quantity)
        for place, name in enumerate(reversed(present)):
            runs = table[table["method"] == name]
            style.across(axes, runs["value"], place + offset, _look(name), hollow=quantity != "steps_to_loss")
            failed = int((runs["status"] != "ok").sum())
            if failed:
                summary = Summary.of(np.log(runs["value"].to_numpy(dtype=float)))
                end = float(np.exp(np.nanmax([summary.mean, *summary.interval(0.95)])))
                note(axes, end, place + offset, f"{failed}/{len(runs)} failed", va="center", xytext=(7, 0))
    axes.set_yticks(range(len(present)), [_look(name).label if named else "" for name in reversed(present)])
    axes.margins(x=0.3)
    axes.set_xlabel("seconds to the target" if seconds else "steps to the target")
    axes.set_title("filled: loss, hollow: accuracy")


def wins(axes: Axes, measurements: pd.DataFrame, *, seconds: bool, named: bool) -> None:
    """Seeds at which a structure, or a default, took fewer steps, or less time, to the loss than a rival, and those with more.

    A square is blue where it wins at all seeds, red where it loses at all.
    """
    table = take(measurements, "judging", "steps_to_loss")
    if seconds:
        table = seconds_to(pd.concat([table, take(measurements, "timing", SECONDS)]), "steps_to_loss")
    present = [name for name, _ in _judged(measurements, "steps_to_loss")]
    rivals = [name for name in present if name in RIVALS]
    structures = [name for name in present if name not in RIVALS]
    if not (rivals and structures):
        raise NotStored("structures and rivals")
    found = [[Comparison(one, rival).difference(table)["value"] for rival in rivals] for one in structures]
    balance = [[-float(np.sign(differences).mean()) for differences in row] for row in found]
    axes.imshow(balance, cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
    for y, row in enumerate(found):
        for x, differences in enumerate(row):
            won, lost = int((differences < 0).sum()), int((differences > 0).sum())
            axes.text(x, y, f"{won}:{lost}", ha="center", va="center", fontsize=SMALL)
    axes.grid(visible=False)
    axes.set_xticks(range(len(rivals)), [_look(name).label for name in rivals], rotation=20, ha="right")
    axes.set_yticks(range(len(structures)), [_look(name).label if named else "" for name in structures])
    axes.set_title(f"seeds with {'less : more time' if seconds else 'fewer : more steps'} to the loss")


def ingredients(axes: Axes, measurements: pd.DataFrame, *, seconds: bool, named: bool) -> None:
    """Steps to the loss, or seconds of a step, with an ingredient over those without it, left of 1 a gain."""
    axes.set_xscale("log")
    experiment, quantity = ("timing", SECONDS) if seconds else ("judging", "steps_to_loss")
    wide = take(measurements, experiment, quantity).pivot_table("value", "seed", "method")
    shown = [one for one in reversed(INGREDIENTS) if {one.method, one.without} <= set(wide.columns)]
    if not shown:
        raise NotStored("the comparison of a method with and without its ingredients")
    for place, one in enumerate(shown):
        style.across(axes, wide[one.method] / wide[one.without], place, _look(DEFAULT if one.of_default else KFAC.key))
    axes.axvline(1.0, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(shown)), [one.label if named else "" for one in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.15)
    plain_ticks(axes.xaxis)
    axes.set_xlabel("seconds of a step, with / without" if seconds else "steps to the loss, with / without")


def rates(axes: Axes, measurements: pd.DataFrame) -> None:
    """Share of the residual that one step of the optimiser leaves, filled at η = 1/α and hollow at 1/(2α), by structure.

    The dashed line is the limit of the latter at infinite width; that of the former is 0.
    """
    axes.set_xscale("log")
    table = take(measurements, "isotropic", "rate")
    present = [name for name in reversed(isotropic.STRUCTURES) if (table["structure"] == name).any()]
    for scale in isotropic.SCALES:
        for place, name in enumerate(present):
            group = table[(table["structure"] == name) & (table["scale"] == scale)]
            style.across(axes, group["value"], place, style.look(name), hollow=scale < 1)
    axes.axvline(0.5, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    note(axes, 0.5, len(present) - 0.5, "1/2", xytext=(2, 0))
    axes.set_yticks(range(len(present)), [style.look(name).label for name in present])
    axes.set_ylim(-0.5, len(present) - 0.1)
    axes.margins(x=0.15)
    axes.set_xlabel(r"$\|f_1-y\|\,/\,\|f_0-y\|$")
    axes.set_title(r"filled: $\eta=1/\alpha$, hollow: $\eta=1/(2\alpha)$")


def contraction(axes: Axes, measurements: pd.DataFrame) -> None:
    """‖r‖² against steps, as in the Jacobian-rank analysis."""
    jacobian_rank.contraction(axes, take(measurements, "contraction", "squared"))
