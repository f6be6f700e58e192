"""The panels of the Jacobian-rank analysis' figures, each one relation between stored measurements and its prediction."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

from analyses.jacobian_rank.experiments.structures import NEAR
from analyses.jacobian_rank.experiments.width import THEOREMS
from analyses.jacobian_rank.networks import TRAINED, UNITS
from analyses.jacobian_rank.points import DRIFTS
from curvlab.study import style
from curvlab.study.panels import (
    DASHED,
    NEUTRAL,
    at_base,
    groups,
    level,
    note,
    predicted,
    structures_of,
    take,
    width_axis,
)

NATURAL, DESCENT, KFAC = "full", "gradient-descent", "kfac"
"""Looks of natural gradient, gradient descent and K-FAC."""
NAMES = {"relu": "ReLU", "erf": "erf (hollow)"}
PATHS = {"natural-gradient": (NATURAL, "natural gradient"), "gradient-descent": (DESCENT, "gradient descent")}
"""Runs with paths of outputs, their looks and names."""
MARKERS = dict(zip(TRAINED, ("o", "s", "^"), strict=True))
WIDTH = "hidden width $m$ (units)"


def _activations(axes: Axes, table: pd.DataFrame, x: str, structure: str = NATURAL) -> dict[str, pd.DataFrame]:
    """Draw the measurements of each activation, smooth ones hollow, and return them."""
    found = {name: table[table["activation"] == name] for name in NAMES if (table["activation"] == name).any()}
    for index, (name, group) in enumerate(found.items()):
        shift = 3.0 * index - 1.5
        style.measured(axes, group, x, structure, label=NAMES[name], shift=shift, hollow=name != "relu")
    return found


def _geometric(table: pd.DataFrame, column: str, by: str) -> pd.Series:
    """Geometric mean of a column for each entry of another."""
    means: pd.Series = np.exp(np.log(table[column]).groupby(table[by]).mean())
    return means


def smallest_eigenvalue(axes: Axes, measurements: pd.DataFrame) -> None:
    """λ_min of the kernel at initialisation against width, and its limit (lines)."""
    axes.set_yscale("log")
    table = at_base(take(measurements, "rank", "smallest"), "samples")
    limits = at_base(take(measurements, "rank", "smallest_limit"), "samples")
    widths = width_axis(axes, table)
    for activation in _activations(axes, table, "width"):
        limit = float(limits.loc[limits["activation"] == activation, "value"].mean())
        style.theory(axes, [widths[0] * 0.8, widths[-1] * 1.25], [limit] * 2, NATURAL)
        note(axes, widths[0], limit, f"limit, {NAMES[activation].split()[0]}", xytext=(-8, 3))
    axes.margins(y=0.25)
    axes.set(xlabel=WIDTH, ylabel=r"$\lambda_{\min}(J J^\top)$ at initialisation")


def unit_rank(axes: Axes, measurements: pd.DataFrame) -> None:
    """Row rank of single units' blocks over the number of rows, against width."""
    table = at_base(take(measurements, "rank", "unit_rank"), "samples")
    width_axis(axes, table)
    _activations(axes, table, "width", "unit-wise")
    axes.set_ylim(0, 1.1)
    level(axes, 0.5)
    axes.set(xlabel=WIDTH, ylabel="row rank of a unit's block / rows")


def drift(axes: Axes, measurements: pd.DataFrame, *, at: str, title: str) -> None:
    """C_emp somewhere, along the run or in the ball of condition 2, against width, with the derived slopes."""
    axes.set_yscale("log")
    table = take(measurements, "training", f"constant_{at}", data="own", eta=0.5)
    widths = width_axis(axes, table)
    _against_slopes(axes, table, "width", np.array(widths))
    level(axes, 0.5)
    note(axes, widths[0], 0.5, "condition 2: below", va="top", xytext=(-6, -2))
    axes.set_ylim(bottom=0.3)
    axes.set(xlabel=WIDTH, ylabel=r"$3\|J-J_0\|_2\,/\,\sqrt{\lambda_{\min}(G_0)}$", title=title)


def worst_point(axes: Axes, measurements: pd.DataFrame) -> None:
    """C_emp at the worst point found in the ball against width, on few random inputs, and a bound on all points for erf (line)."""
    axes.set_yscale("log")
    table = take(measurements, "ball", "constant_worst")
    width_axis(axes, table)
    if "erf" in _activations(axes, table, "width"):
        predicted(axes, take(measurements, "ball", "constant_bound"), "width", NATURAL, label="bound, erf")
    level(axes, 0.5)
    axes.set(xlabel=WIDTH, ylabel=r"$3\|J-J_0\|_2\,/\,\sqrt{\lambda_{\min}(G_0)}$", title="in the ball, worst")


def _against_slopes(axes: Axes, table: pd.DataFrame, x: str, widths: Float[np.ndarray, " K"]) -> None:
    """Draw the measurements of each activation, and a line of the derived slope through the last."""
    for activation, group in _activations(axes, table, x).items():
        exponent, _ = DRIFTS[activation]
        means = _geometric(group, "value", x)
        line = float(means.iloc[-1]) * (widths / widths[-1]) ** exponent
        dashes = "-" if activation == "relu" else DASHED
        axes.plot(widths, line, color=NEUTRAL, linestyle=dashes, linewidth=0.9, label=f"$m^{{{exponent:g}}}$", zorder=1)


def residual_against_step(axes: Axes, measurements: pd.DataFrame) -> None:
    """‖r‖² against steps at every η < 1."""
    table = take(measurements, "training", "squared", data="own", activation="relu")
    width = table.loc[table["eta"] == table["eta"].min(), "width"].max()
    contraction(axes, table[(table["width"] == width) & (table["eta"] < 1)])
    axes.set_title(f"$m={int(width)}$")


def contraction(axes: Axes, table: pd.DataFrame) -> None:
    """‖r‖² against steps at every η of a table: measured, the linear limit (1−η)^2k (lines), the bound (1−η)^k (dashed)."""
    axes.set_yscale("log")
    steps = np.array(sorted(table["step"].unique()))
    labels = (r"$(1-\eta)^{2k}$", r"bound $(1-\eta)^k$", "natural gradient")
    for eta, group in groups(table, "eta"):
        limit, bound, measured = labels
        style.theory(axes, steps, (1 - eta) ** (2 * steps), NATURAL, label=limit)
        axes.plot(steps, (1 - eta) ** steps, color=NEUTRAL, linestyle=DASHED, linewidth=0.9, label=bound)
        style.measured(axes, group, "step", NATURAL, label=measured)
        labels = ("", "", "")
        last = group[group["step"] == steps[-1]]["value"].mean()
        note(axes, steps[-1], last, rf"$\eta={eta:g}$", ha="left", va="center", xytext=(5, 0))
    axes.set_xlim(right=steps[-1] * 1.22)
    axes.set(xlabel="step $k$", ylabel=r"$\|r_k\|^2/\|r_0\|^2$")


def steps_against_condition(axes: Axes, measurements: pd.DataFrame) -> None:
    """Steps until a tenth of a residual along the least mode is left against κ(G), measured and predicted (lines)."""
    axes.set(xscale="log", yscale="log")
    for quantity, structure, label in (
        ("natural_steps", NATURAL, "natural gradient"),
        ("descent_steps", DESCENT, None),
    ):
        table = take(measurements, "modes", quantity)
        conditions = _geometric(table, "condition", "similarity")
        steps = _geometric(table, "predicted", "similarity")
        style.theory(axes, conditions, steps, structure)
        placed = table.assign(condition=table["similarity"].map(conditions))
        style.measured(axes, placed, "condition", structure, label=label)
    axes.set(xlabel=r"$\kappa(G)=\lambda_{\max}/\lambda_{\min}$", ylabel="steps until 0.1 is left")


def decay_against_leverage(axes: Axes, measurements: pd.DataFrame) -> None:
    """First-step decay of single samples under K-FAC against 1 − ηh, at the widest ReLU networks."""
    table = take(measurements, "kfac", "decay", activation="relu")
    table = table[table["width"] == table["width"].max()]
    ends = [float(table["predicted"].min()), float(table["predicted"].max())]
    style.theory(axes, ends, ends, KFAC, label="theory")
    color = style.look(KFAC).color
    axes.plot(
        table["predicted"], table["value"], ".", color=color, markersize=2.5, alpha=0.5, label="samples, all seeds"
    )
    axes.set(xlabel=r"$1-\eta h_i$", ylabel=r"$r_i(1)/r_i(0)$ under K-FAC")


def kfac_error(axes: Axes, measurements: pd.DataFrame) -> None:
    """Distance of K-FAC's residuals from the leverage law against width."""
    axes.set_yscale("log")
    table = take(measurements, "kfac", "error")
    width_axis(axes, table)
    _activations(axes, table, "width", KFAC)
    axes.set(xlabel=WIDTH, ylabel="distance from the leverage law\n" r"$\max|r_k-\hat r_k|\,/\,\|r_0\|$")


def movement_ratio(axes: Axes, measurements: pd.DataFrame) -> None:
    """Movement of the parameters over its closed form against η."""
    table = take(measurements, "training", "movement_ratio", data="own")
    width = table.loc[table["eta"] == table["eta"].min(), "width"].max()
    table = table[table["width"] == width]
    axes.set_xscale("log")
    style.log_ticks(axes, sorted(table["eta"].unique()))
    _activations(axes, table, "eta")
    level(axes, 1.0)
    axes.set(xlabel=r"step size $\eta$", ylabel="movement / closed form", title=f"$m={int(width)}$")


def remaining_by_structure(axes: Axes, measurements: pd.DataFrame) -> None:
    """What five steps at η = 1/λ_max leave, by structure, over what gradient descent leaves."""
    axes.set_yscale("log")
    _by_structure(axes, take(measurements, "structures", "left"))
    level(axes, 1.0)
    axes.set(ylabel=r"$\|r_5\|^2$ over that of gradient descent")


def constant_by_structure(axes: Axes, measurements: pd.DataFrame) -> None:
    """C_emp along each structure's own run."""
    axes.set_yscale("log")
    _by_structure(axes, take(measurements, "structures", "constant"))
    level(axes, 0.5)
    note(axes, 0, 0.5, "condition 2: below", va="top", xytext=(-6, -2))
    axes.set_ylim(bottom=0.02)
    axes.set(ylabel=r"$3\|J-J_0\|_2\,/\,\sqrt{\lambda_{\min}(G_0)}$")


def distance_by_structure(axes: Axes, measurements: pd.DataFrame) -> None:
    """Distance of the outputs from the linear prediction of each structure's response, over the latter's move."""
    axes.set_yscale("log")
    _by_structure(axes, take(measurements, "structures", "distance"))
    level(axes, NEAR)
    axes.set(ylabel=r"distance from $(I-\eta M)^5 r_0$ / move")


def _by_structure(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the measurements of every structure side by side, in the three networks' markers."""
    present = list(structures_of(table))
    for place, (structure, group, _) in enumerate(present):
        for index, network in enumerate(TRAINED):
            shown = group[group["network"] == network].assign(place=float(place))
            label = network if not place else ""
            points = style.measured(axes, shown, "place", structure, label=label, shift=5.0 * (index - 1))
            points.lines[0].set_marker(MARKERS[network])
    axes.set_xticks(range(len(present)), [style.look(name).label for name, _, _ in present], rotation=35, ha="right")


def change_of_networks(axes: Axes, measurements: pd.DataFrame, *, network: str) -> None:
    """Relative change of the Jacobian along natural gradient against hidden units, with the derived slopes."""
    axes.set_yscale("log")
    table = take(measurements, "networks", "change_share", network=network)
    table = table[table["units"] >= UNITS[network]]
    units = np.array(sorted(table["units"].unique()))
    style.log_ticks(axes, [int(number) for number in units])
    axes.margins(x=0.2)
    _against_slopes(axes, table, "units", units)
    of = "channels" if network == "convolutional" else "hidden units"
    axes.set(xlabel=of, ylabel=r"$\|J-J_0\|_F\,/\,\|J_0\|_F$", title=network)


def needed_width(axes: Axes, measurements: pd.DataFrame) -> None:
    """Least width that reaches a theorem's conclusion against n, and the order that suffices for its proof (lines)."""
    axes.set(xscale="log", yscale="log")
    for run, structure, shift in (("natural", NATURAL, -3.0), ("descent", DESCENT, 3.0)):
        table = take(measurements, "width", "needed", run=run)
        sufficient = _geometric(table, "sufficient", "samples")
        style.theory(axes, sufficient.index, sufficient, structure)
        power = THEOREMS[run].power
        note(axes, sufficient.index[-1], sufficient.iloc[-1], rf"$n^{power}/\lambda_0^4$", ha="right", xytext=(-6, 2))
        style.measured(axes, table, "samples", structure, label=THEOREMS[run].method, shift=shift)
    style.log_ticks(axes, sorted(int(samples) for samples in table["samples"].unique()))
    axes.set(xlabel="samples $n$", ylabel="width $m$ that is needed, that suffices")


def output_paths(axes: Axes, measurements: pd.DataFrame, *, run: str, images: str = "digits") -> None:
    """Paths of single samples in the plane of two outputs, of the first seed, and their targets."""
    first = take(measurements, "paths", "output_1", run=run, problem=images)
    seed = first["seed"].min()
    second = take(measurements, "paths", "output_2", run=run, seed=seed, problem=images)
    first = first[first["seed"] == seed]
    structure, label = PATHS[run]
    look = style.look(structure)
    for index, sample in enumerate(sorted(first["sample"].unique())):
        x, y = (table[table["sample"] == sample].sort_values("step") for table in (first, second))
        labels = ("straight line", label, "target") if not index else (None, None, None)
        ends = [[table["value"].iloc[0], table["target"].iloc[0]] for table in (x, y)]
        axes.plot(*ends, color=NEUTRAL, linewidth=0.7, linestyle=DASHED, label=labels[0], zorder=1)
        axes.plot(
            x["value"], y["value"], marker=look.marker, color=look.color, ms=2.2, lw=0.6, label=labels[1], zorder=2
        )
        axes.plot(ends[0][1], ends[1][1], "x", color="#D55E00", markersize=6, label=labels[2], zorder=3)
    axes.set(xlabel="output 1", ylabel="output 2", title=label)
