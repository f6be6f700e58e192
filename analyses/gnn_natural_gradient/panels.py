"""The panels of the figures of natural gradient on graphs, each one relation between stored measurements."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from analyses.clock import priced
from analyses.gnn_natural_gradient.arms import BEST_EPOCH
from analyses.gnn_natural_gradient.experiments.accuracy import CHOICES, CURVE, HEADLINE_QUANTITY, Choice
from analyses.gnn_natural_gradient.experiments.kronecker import STAGES
from analyses.gnn_natural_gradient.experiments.timing import SECONDS
from analyses.gnn_natural_gradient.recipe import ADAM, METHODS
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION_LOSS
from curvlab.study import style
from curvlab.study.panels import DASHED, NEUTRAL, NotStored, groups, level, note, side_by_side, take

LOOKS: Mapping[str, str] = {"sgd": "full", "sgd-kfac": "ekfac", "adam": "gradient-descent", "adam-kfac": "kfac"}
"""Looks of the methods."""
COMBINATIONS: Mapping[str, tuple[str, str]] = {
    "plain": ("gradient-descent", r"Adam, $\lambda$ in loss"),
    "loss": ("unit-wise", r"K-FAC, $\lambda$ in loss"),
    "fisher": ("block-diagonal", r"K-FAC, $\lambda$ in Fisher"),
    "both": ("kfac", r"K-FAC, $\lambda$ in both"),
}
SHADES = ("block-tridiagonal", "diagonal", "layer-wise", "ekfac", "full", "gradient-descent")
"""Looks of the powers γ, in turn."""
TEST = "test accuracy (%)"
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200)
"""Epochs of a curve that are drawn."""


def _first_split(table: pd.DataFrame) -> pd.DataFrame:
    kept: pd.DataFrame = table[table["split"] == table["split"].iloc[0]]
    return kept


def _by_method(axes: Axes, table: pd.DataFrame) -> None:
    """Draw a quantity of every method, published recipe filled and selected one hollow."""
    methods = [method for method in METHODS if (table["method"] == method).any()]
    for place, method in enumerate(methods):
        rows = table[table["method"] == method].assign(place=place)
        choices = ((rows[rows["choice"] == choice], LOOKS[method], "", choice == "selected") for choice in CHOICES)
        side_by_side(axes, "place", choices, 6.0)
    axes.set_xticks(range(len(methods)), [METHODS[method].title.replace(", ", ",\n") for method in methods])
    axes.set_xlim(-0.5, len(methods) - 0.5)


def accuracy(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test accuracy of every method, filled as published and hollow as selected; the published accuracy as a line."""
    table = _first_split(take(measurements, "accuracy", ACCURACY))
    split = table["split"].iloc[0]
    _by_method(axes, table)
    stored = measurements[(measurements["quantity"] == HEADLINE_QUANTITY) & (measurements["split"] == split)]
    for headline in stored["value"].unique():
        level(axes, headline)
        note(axes, -0.45, headline, f"published {headline:g}", xytext=(0, 1))
    axes.margins(y=0.15)
    axes.set(ylabel=TEST, title="hollow: selected" if stored.empty else f"{split} split; hollow: selected")


def epochs(axes: Axes, measurements: pd.DataFrame, *, seconds: bool = False) -> None:
    """Epochs or seconds to the lowest validation loss of every method."""
    axes.set_yscale("log")
    table = _first_split(take(measurements, "accuracy", BEST_EPOCH))
    if seconds:
        table = priced(table, take(measurements, "timing", SECONDS)).dropna(subset="value")
    _by_method(axes, table)
    axes.set(ylabel="seconds of training" if seconds else "epochs", title="to the lowest validation loss")


def curves(axes: Axes, measurements: pd.DataFrame, *, quantity: str, choice: Choice) -> None:
    """Validation loss or test accuracy along training."""
    table = _first_split(take(measurements, "accuracy", f"{CURVE}_{quantity}", choice=choice))
    table = table[table["epoch"].isin(SHOWN)]
    style.log_ticks(axes, sorted(int(epoch) for epoch in table["epoch"].unique()))
    of = table["method"]
    side_by_side(axes, "epoch", ((table[of == m], look, METHODS[m].title, False) for m, look in LOOKS.items()), 2.4)
    axes.margins(x=0.08)
    loss = quantity == VALIDATION_LOSS
    axes.set(xlabel="epoch", ylabel="validation loss (nat)" if loss else TEST, title=f"{choice} hyper-parameters")


def unlabelled(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test accuracy against γ with λ in the loss, in the Fisher matrix or in both; λ = 0 as lines of the same colour."""
    table = take(measurements, "unlabelled", ACCURACY)
    style.log_ticks(axes, sorted(table["gamma"].unique()))
    axes.margins(x=0.15, y=0.12)
    of = table["combination"]
    side_by_side(
        axes, "gamma", ((table[of == name], look, label, False) for name, (look, label) in COMBINATIONS.items())
    )
    none = take(measurements, "accuracy", ACCURACY, choice="published", split=table["split"].iloc[0])
    ends = [float(table["gamma"].min()), float(table["gamma"].max())]
    if ends[0] < ends[1]:
        for method, look in (("adam", "gradient-descent"), ("adam-kfac", "kfac")):
            mean = none.loc[none["method"] == method, "value"].mean()
            label = rf"{METHODS[method].title}, $\lambda=0$ (mean)"
            axes.plot(ends, [mean] * 2, color=style.look(look).color, linestyle=":", linewidth=1.1, label=label)
    axes.set(xlabel=r"power $\gamma$ of $\lambda=(e/E)^\gamma$", ylabel=TEST)


def _swept(measurements: pd.DataFrame, optimiser: str, name: str) -> pd.DataFrame:
    """Test accuracies against one hyper-parameter; runs of the published value are in the experiment "accuracy"."""
    table = take(measurements, "sensitivity", ACCURACY, optimiser=optimiser)
    table = table[table[name].notna()]
    if table.empty:
        raise NotStored(f"sensitivity: {name}")
    split = table["split"].iloc[0]
    base = take(measurements, "accuracy", ACCURACY, method=f"{optimiser}-kfac", choice="published", split=split)
    return pd.concat([table, base.assign(**{name: float(getattr(ADAM, name))})])


def epsilon(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test accuracy against damping, SGD and Adam."""
    axes.set_xscale("log")
    methods = {optimiser: f"{optimiser}-kfac" for optimiser in ("sgd", "adam")}
    side_by_side(axes, "epsilon", (
        (_swept(measurements, optimiser, "epsilon"), LOOKS[method], METHODS[method].title, False)
        for optimiser, method in methods.items()
    ))  # fmt: skip
    axes.set(xlabel=r"damping $\varepsilon$", ylabel=TEST)


def refresh(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test accuracy against the refresh interval."""
    shown = _swept(measurements, "adam", "refresh")
    style.log_ticks(axes, sorted(shown["refresh"].unique()))
    style.measured(axes, shown, "refresh", LOOKS["adam-kfac"], label=METHODS["adam-kfac"].title)
    axes.margins(x=0.15)
    axes.set(xlabel="refresh interval (epochs)", ylabel=TEST)


def joint(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test accuracy against damping for every power γ, unlabelled nodes in loss and Fisher matrix."""
    table = take(measurements, "sensitivity", ACCURACY, optimiser="joint")
    centre = take(measurements, "unlabelled", ACCURACY, combination="both")
    table = pd.concat([table, centre.assign(epsilon=ADAM.epsilon)])
    axes.set_xscale("log")
    powers = zip(groups(table, "gamma"), SHADES, strict=False)
    side_by_side(axes, "epsilon", ((rows, look, rf"$\gamma={gamma:g}$", False) for (gamma, rows), look in powers))
    axes.set(xlabel=r"damping $\varepsilon$", ylabel=TEST, title=r"$\lambda$ in both")


CHANGES: Mapping[str, tuple[str, str]] = {
    **{
        f"K-FAC, {METHODS[method].title}, {choice}": (f"{method}-kfac {choice}", f"{method} {choice}")
        for method in ("adam", "sgd")
        for choice in CHOICES
    },
    "64 units, Adam": ("adam wide", "adam published"),
    "64 units, K-FAC": ("adam-kfac wide", "adam-kfac published"),
    "K-FAC, Adam, 64 units": ("adam-kfac wide", "adam wide"),
    "factor of $\\hat{A}X$, not $X$": ("adam-kfac published", "not aggregated"),
    "given labels, not drawn ones": ("adam-kfac published", "drawn labels"),
}
"""What changes, and the arms with and without it."""


def changes(axes: Axes, measurements: pd.DataFrame) -> None:
    """Change of the test accuracy by one change of the recipe, seed by seed."""
    table = _first_split(take(measurements, "accuracy", ACCURACY))
    split = table["split"].iloc[0]
    others = measurements[(measurements["experiment"] == "ablations") & (measurements["quantity"] == ACCURACY)]
    wide = pd.concat([table, others[others["split"] == split]]).pivot_table("value", "seed", "arm")
    present = [(label, arms) for label, arms in CHANGES.items() if {*arms} <= set(wide.columns)]
    for place, (_, (first, second)) in enumerate(reversed(present)):
        style.across(axes, wide[first] - wide[second], place, style.look("kfac"))
    axes.axvline(0.0, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(present)), [label for label, _ in reversed(present)])
    axes.set_ylim(-0.6, len(present) - 0.4)
    axes.margins(x=0.15)
    axes.set(xlabel="change of test accuracy (points)")


def _by_stage(axes: Axes, table: pd.DataFrame) -> pd.DataFrame:
    """Make the x axis one of stages of training, and return measurements with their place on it."""
    stages = [stage for stage in STAGES if (table["stage"] == stage).any()]
    axes.set_xticks(range(len(stages)), stages)
    axes.set_xlim(-0.5, len(stages) - 0.5)
    return table.assign(place=table["stage"].map(stages.index))


def cosines(axes: Axes, measurements: pd.DataFrame, *, space: str) -> None:
    """Cosine of K-FAC's step and of the gradient with the step of the exact Fisher block."""
    table = _by_stage(axes, take(measurements, "kronecker", "cosine", space=space))
    directions = (("gradient", "gradient-descent", "gradient"), ("kfac", "kfac", r"$A\otimes G$"))
    of = table["direction"]
    side_by_side(
        axes, "place", ((table[of == direction], look, label, False) for direction, look, label in directions), 6.0
    )
    level(axes, 1.0)
    axes.set(ylabel="cosine with the natural step", title=space)


def errors(axes: Axes, measurements: pd.DataFrame) -> None:
    """Relative distance of A ⊗ G from the exact block of each layer, as it is (filled) and at its best multiple (hollow)."""
    axes.set_yscale("log")
    for quantity, hollow in (("error", False), ("scaled_error", True)):
        table = _by_stage(axes, take(measurements, "kronecker", quantity))
        layers = zip(sorted(table["layer"].unique()), ("full", "block-diagonal"), ("layer 1", "layer 2"), strict=False)
        shown = (
            (table[table["layer"] == layer], look, "" if hollow else label, hollow) for layer, look, label in layers
        )
        side_by_side(axes, "place", shown, 6.0)
    level(axes, 1.0)
    axes.set(ylabel=r"$\|A\otimes G-F\|\,/\,\|F\|$", title="hollow: best multiple")
