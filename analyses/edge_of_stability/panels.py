"""The panels of the edge-of-stability figures, each one relation between stored measurements and its prediction."""

from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.edge_of_stability.config import middle
from analyses.edge_of_stability.experiments import published as readme
from analyses.edge_of_stability.experiments.losses import CE
from analyses.edge_of_stability.experiments.structures import HESSIAN, KINDS
from analyses.edge_of_stability.points import BAND
from analyses.edge_of_stability.windows import SETTLING
from curvlab.study import style
from curvlab.study.panels import DASHED, NEUTRAL, Rows, groups, level, note, one_each, take

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of step sizes and runs, in order; each comes with a marker of its own."""
MARKERS = ("o", "s", "^", "D", "v", "P")
SHOWN = 12
"""Markers on a curve."""
TITLES = {
    "gd": "gradient descent",
    "heavy-ball": "heavy ball",
    "nesterov": "Nesterov",
    "adam": "Adam",
    "adam-frozen": "Adam, frozen",
}
RATIO = r"$S$ / threshold"
SHARPNESS = r"sharpness $\lambda_{\max}(H)$"


def curve(axes: Axes, table: pd.DataFrame, x: str, index: int, label: str | None = None) -> None:
    """Draw the mean over seeds as a line with markers and its 95 % t-interval as a band, see `style.band`."""
    style.band(
        axes, table, x, color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], label=label,
        markevery=max(1, table[x].nunique() // SHOWN), markersize=3, linewidth=1.0, zorder=3,
    )  # fmt: skip


def threshold(axes: Axes, value: float, index: int | None = None, label: str | None = None) -> None:
    """Draw a threshold, in the colour of the run it belongs to."""
    color = NEUTRAL if index is None else COLOURS[index % len(COLOURS)]
    axes.axhline(value, color=color, linestyle=DASHED, linewidth=0.9, zorder=1, label=label)


def _named_threshold(axes: Axes, eta: float, place: float, **options: str) -> None:
    """Draw 2/η, and write so at an abscissa."""
    threshold(axes, 2 / eta)
    note(axes, place, 2 / eta, rf"$2/\eta$, $\eta={eta:g}$", xytext=(0, 2), **options)


def _by_eta(axes: Axes, measurements: pd.DataFrame, quantity: str, optimiser: str) -> dict[float, pd.DataFrame]:
    """Draw a quantity of an optimiser's runs against step, and return it by η."""
    runs = dict(groups(take(measurements, "training", quantity, optimiser=optimiser), "eta"))
    for index, (eta, group) in enumerate(runs.items()):
        curve(axes, group, "step", index, rf"$\eta={eta:g}$" if optimiser == "gd" else None)
    axes.set_xlabel("step")
    return runs


def sharpness_against_step(axes: Axes, measurements: pd.DataFrame, *, optimiser: str = "gd") -> None:
    """Sharpness against step at every η, each seed thin, thresholds (dashed), and where the edge is judged from (dotted)."""
    axes.set_yscale("log")
    runs = _by_eta(axes, measurements, "sharpness", optimiser)
    crossings = measurements[(measurements["experiment"] == "training") & (measurements["quantity"] == "crossing")]
    for index, (eta, group) in enumerate(runs.items()):
        color = COLOURS[index % len(COLOURS)]
        for _, run in group.groupby("seed"):
            axes.plot(run["step"], run["value"], color=color, linewidth=0.3, alpha=0.4, zorder=2)
        label = "threshold" if not index and optimiser == "gd" else None
        threshold(axes, float(group["threshold"].iloc[0]), index, label)
        own = crossings[(crossings["optimiser"] == optimiser) & (crossings["eta"] == eta)]["value"]
        axes.axvline(own.median() + SETTLING, color=color, linestyle=":", linewidth=0.7, zorder=1)
    alone = rf", $\eta={next(iter(runs)):g}$" if len(runs) == 1 else ""
    axes.set(ylabel=SHARPNESS, title=TITLES[optimiser] + alone)


def loss_against_step(axes: Axes, measurements: pd.DataFrame, *, optimiser: str = "gd") -> None:
    """Training loss against step at every η."""
    axes.set_yscale("log")
    _by_eta(axes, measurements, "loss", optimiser)
    axes.set(ylabel="training loss", title=TITLES[optimiser])


def alignment_against_step(axes: Axes, measurements: pd.DataFrame) -> None:
    """Share of the step's squared norm in the top eigenspace, at every η of gradient descent."""
    _by_eta(axes, measurements, "step_alignment", "gd")
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share of the step in\nthe top eigenspace")


def plateaus(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness at the edge against η, and 2/η (line)."""
    axes.set(xscale="log", yscale="log")
    table = take(measurements, "training", "plateau_sharpness", optimiser="gd")
    etas = np.array(sorted(table["eta"].unique()))
    style.theory(axes, etas, 2 / etas, "gradient-descent", label=r"$2/\eta$")
    style.measured(axes, table, "eta", "gradient-descent", label="sharpness at the edge")
    style.log_ticks(axes, list(etas))
    axes.set(xlabel=r"step size $\eta$", ylabel=SHARPNESS)


def ratios(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness at the edge over the threshold, of every optimiser, with the band that was fixed beforehand."""
    axes.set_yscale("log")
    table = take(measurements, "training", "plateau_ratio")
    names = []
    for place, ((optimiser, eta), group) in enumerate(table.groupby(["optimiser", "eta"])):
        style.measured(axes, group.assign(place=float(place)), "place", "gradient-descent", label="")
        names.append(f"{TITLES[str(optimiser)]} {eta:g}")
    axes.axhspan(1 - BAND, 1 + BAND, color=NEUTRAL, alpha=0.12, linewidth=0, zorder=0)
    level(axes, 1.0)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set(ylabel=RATIO)


def flow_sharpness(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness along gradient flow and gradient descent against time, and 2/η (dashed)."""
    axes.set_yscale("log")
    flow = take(measurements, "flow", "flow_sharpness", sweep="none")
    curve(axes, flow, "time", 0, "gradient flow")
    curve(axes, take(measurements, "flow", "descent_sharpness"), "time", 1, "gradient descent")
    _named_threshold(axes, flow["eta"].iloc[0], flow["time"].min())
    axes.set(xlabel=r"time $t=\eta k$", ylabel=SHARPNESS)


def flow_distance(axes: Axes, measurements: pd.DataFrame) -> None:
    """Distance of gradient descent from the flow against time, with the mean time of the crossing (dashed)."""
    axes.set_yscale("log")
    distance = take(measurements, "flow", "distance")
    curve(axes, distance[distance["value"] > 0], "time", 1)
    crossing = float(take(measurements, "flow", "crossing_time")["value"].mean())
    axes.axvline(crossing, color=NEUTRAL, linestyle=DASHED, linewidth=0.9)
    note(axes, crossing, axes.get_ylim()[1], "crossing", ha="right", va="top", xytext=(-3, -2))
    axes.set(xlabel=r"time $t=\eta k$", ylabel=r"$\|\theta_k-\theta(\eta k)\|$")


def catapults(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness over threshold of runs that start above it, as long as none has diverged."""
    axes.set_yscale("log")
    table = take(measurements, "schedules", "ratio", schedule="catapult")
    for index, (factor, group) in enumerate(table.groupby("factor")):
        curve(axes, group, "step", index + 3, rf"$S(0)={factor:g}\times 2/\eta$")
    level(axes, 1.0)
    axes.set(xlabel="step", ylabel=RATIO, ylim=(0.5, 10))


def dropped_rate(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness along a run whose η is lowered at a third of its steps, and both thresholds (dashed)."""
    axes.set_yscale("log")
    table = take(measurements, "schedules", "sharpness", schedule="drop")
    curve(axes, table, "step", 5, r"$\eta$ lowered")
    first = take(measurements, "training", "sharpness", optimiser="gd")["eta"].max()
    last = 2 / table["threshold"].iloc[0]
    for eta, side, step in ((first, "right", table["step"].max()), (last, "left", 0)):
        _named_threshold(axes, eta, step, ha=side)
    axes.set(xlabel="step", ylabel=SHARPNESS)


def _over_sharpest(table: pd.DataFrame, sharpness: pd.DataFrame) -> pd.DataFrame:
    """Divide every seed's values by the one at the step at which its sharpness is largest."""
    places = sharpness.loc[sharpness.groupby("seed")["value"].idxmax()].set_index("seed")["step"]
    there = table[table["step"] == table["seed"].map(places)].set_index("seed")["value"]
    return table.assign(value=table["value"] / table["seed"].map(there))


def late_drop(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness under both losses, and the mean of p(1 − p) under cross-entropy, over that at the sharpest step."""
    axes.set_yscale("log")
    sharpness, weight = (take(measurements, "losses", name, loss=CE) for name in ("sharpness", "weight"))
    squared = take(measurements, "training", "sharpness", optimiser="gd")
    squared = squared[squared["eta"] == middle(squared["eta"].unique())]
    curve(axes, _over_sharpest(sharpness, sharpness), "step", 0, "cross-entropy")
    curve(axes, _over_sharpest(squared, squared), "step", 1, "squared error")
    curve(axes, _over_sharpest(weight, sharpness), "step", 2, r"mean $p(1-p)$")
    level(axes, 0.5)
    axes.set(xlabel="step", ylabel="over that at the sharpest step")


def preconditioned(axes: Axes, measurements: pd.DataFrame, *, mode: str) -> None:
    """λ_max of the preconditioned Hessian over 2/η, or itself where the preconditioner is renewed, by structure."""
    axes.set_yscale("log")
    table = take(measurements, "preconditioned", "ratio" if mode == "frozen" else "sharpness", mode=mode)
    for structure in style.in_order(table["structure"]):
        group, look = table[table["structure"] == structure], style.look(structure)
        style.band(axes, group, "step", color=look.color, marker=look.marker, label=look.label, linewidth=1.0, zorder=3)
    if mode == "frozen":
        level(axes, 1.0)
    else:
        for value in (1, 3):
            level(axes, float(value))
    axes.set(xlabel="step", title=f"{mode} preconditioner")
    axes.set_ylabel(r"$\lambda_{\max}(P^{-1}H)\,\eta/2$" if mode == "frozen" else r"$\lambda_{\max}(P^{-1}H)$")


def largest(measurements: pd.DataFrame) -> Rows:
    """One panel for every approximation that was followed."""
    found = take(measurements, "structures", "largest")["approximation"]
    names = style.in_order(found[found != HESSIAN])
    return one_each([partial(largest_of, approximation=name) for name in names])


def largest_of(axes: Axes, measurements: pd.DataFrame, *, approximation: str) -> None:
    """λ_max of one approximation and of the Hessian along gradient descent, and 2/η (dashed)."""
    axes.set_yscale("log")
    reference = take(measurements, "structures", "largest", approximation=HESSIAN)
    curve(axes, reference, "step", 0, "Hessian")
    curve(axes, take(measurements, "structures", "largest", approximation=approximation), "step", 1, "approximation")
    threshold(axes, 2 / float(reference["eta"].iloc[0]), label=r"$2/\eta$")
    title = f"{approximation} Fisher" if approximation in KINDS else style.look(approximation).label
    axes.set(xlabel="step", ylabel=r"$\lambda_{\max}$", title=title)


def chebyshev(axes: Axes, measurements: pd.DataFrame) -> None:
    """Sharpness along the regression on Chebyshev polynomials T_k, and 2/η (dashed)."""
    axes.set_yscale("log")
    table = take(measurements, "chebyshev", "sharpness")
    for index, (degree, group) in enumerate(groups(table, "degree")):
        curve(axes, group, "step", index, rf"$T_{{{degree:g}}}$")
    _named_threshold(axes, 2 / float(table["threshold"].iloc[0]), table["step"].min())
    axes.set(xlabel="step", ylabel=SHARPNESS)


def published(axes: Axes, measurements: pd.DataFrame, *, quantity: Literal["loss", "sharpness"]) -> None:
    """Loss or sharpness of the README's run against step, each seed, and points of the published figures (open diamonds)."""
    for _, table in take(measurements, readme.PUBLISHED.name, quantity).sort_values("step").groupby("seed"):
        axes.plot(table["step"], table["value"], color=COLOURS[0], linewidth=1.0, label="here", zorder=2)
    points = [m.point[1:] for m in readme.MILESTONES.values() if m.point is not None and m.point[0] == quantity]
    axes.plot(
        *zip(*points, strict=True), linestyle="none", marker="D", markersize=4, markerfacecolor="white",
        markeredgecolor=COLOURS[1], label="published", zorder=3,
    )  # fmt: skip
    if quantity == "sharpness":
        threshold(axes, 2 / readme.ETA, label=r"$2/\eta$")
    axes.set_ylim(bottom=0)
    name = "training loss" if quantity == "loss" else SHARPNESS
    axes.set(xlabel="step", ylabel=name, title="CIFAR-10, 5000 images")
