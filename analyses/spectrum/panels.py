"""The panels of the spectrum figures, each one relation between stored measurements."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.drawing import NEUTRAL, NotStored
from analyses.spectrum.config import GGN, HESSIAN
from analyses.spectrum.measure import WHOLE
from curvlab.study import style
from curvlab.study.inference import Summary

OWN = {HESSIAN: ("#999999", "h", "Hessian"), GGN: ("#882255", "*", "GGN")}
"""Looks of what is no structure."""
DENSITIES = (
    (HESSIAN, GGN, "full"),
    ("block-diagonal", "kfac", "ekfac"),
    ("block-tridiagonal", "unit-wise", "diagonal"),
)


def look(matrix: str) -> tuple[str, str, str]:
    """Colour, marker and name of a matrix."""
    if matrix in OWN:
        return OWN[matrix]
    found = style.look(matrix)
    return found.color, found.marker, found.label


def _matrices(table: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    present = [name for name in (*OWN, *style.LOOKS) if (table["matrix"] == name).any()]
    for place, name in enumerate(present):
        yield place, name, table[table["matrix"] == name]


def _take(measurements: pd.DataFrame, quantity: str) -> pd.DataFrame:
    table = measurements[measurements["quantity"] == quantity]
    if table.empty:
        raise NotStored(quantity)
    return table


def _points(axes: Axes, table: pd.DataFrame, x: str, matrix: str, shift: float, label: str | None) -> None:
    """Draw means over seeds with 95 % t-intervals; of the logarithms on a logarithmic axis, where only values > 0 show."""
    color, marker, _ = look(matrix)
    logarithmic = axes.get_yscale() == "log"
    shown = table[table["value"] > 0] if logarithmic else table
    for position in sorted(shown[x].unique()):
        group = shown[shown[x] == position]
        values = group["value"].to_numpy(dtype=float)
        summary = Summary.of(np.log(values) if logarithmic else values)
        low, high = summary.interval(0.95)
        mean, low, high = np.exp([summary.mean, low, high]) if logarithmic else (summary.mean, low, high)
        axes.errorbar(
            [float(position) + shift], [mean], yerr=[[mean - low], [high - mean]], fmt=marker, color=color,
            markersize=4, markeredgecolor="#333333", markeredgewidth=0.4, elinewidth=1.0, capsize=1.5, label=label,
        )  # fmt: skip
        label = None


def top_eigenvalues(axes: Axes, measurements: pd.DataFrame) -> None:
    """The leading eigenvalues of every matrix."""
    axes.set_yscale("log")
    table = _take(measurements, "eigenvalue")
    table = table[table["layer"] == WHOLE]
    for place, name, group in _matrices(table):
        _points(axes, group, "index", name, 0.08 * (place - 4), look(name)[2])
    axes.set_xticks(sorted(int(index) for index in table["index"].unique()))
    axes.set(xlabel="eigenvalue, from the largest", ylabel=r"$\lambda_i$")


def traces(axes: Axes, measurements: pd.DataFrame) -> None:
    """The trace of every matrix."""
    table = _take(measurements, "trace")
    table = table[table["layer"] == WHOLE]
    names = []
    for place, name, group in _matrices(table):
        _points(axes, group.assign(place=place), "place", name, 0.0, None)
        names.append(look(name)[2])
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set(ylabel="trace")


def largest_by_layer(axes: Axes, measurements: pd.DataFrame) -> None:
    """The largest eigenvalue of every layer's diagonal block, and of the whole matrix."""
    axes.set_yscale("log")
    table = _take(measurements, "eigenvalue")
    table = table[table["index"] == 1]
    layers = list(dict.fromkeys(table["layer"]))
    places = {layer: index for index, layer in enumerate([*layers[1:], layers[0]])}
    for place, name, group in _matrices(table):
        _points(axes, group.assign(place=group["layer"].map(places)), "place", name, 0.08 * (place - 4), look(name)[2])
    names = [f"layer {layer}" if layer != WHOLE else "all parameters" for layer in places]
    axes.set_xticks(range(len(places)), names)
    axes.set(ylabel=r"$\lambda_{\max}$ of the block")


def density(axes: Axes, measurements: pd.DataFrame, *, matrix: str) -> None:
    """Spectral density of one matrix over the symmetric logarithm of λ, of every seed and the mean."""
    table = _take(measurements, "density")
    table = table[table["matrix"] == matrix]
    if table.empty:
        raise NotStored(f"density of {matrix}")
    color, _, title = look(matrix)
    for _, group in table.groupby("seed"):
        ordered = group.sort_values("place")
        axes.plot(ordered["eigenvalue"], ordered["value"], color=color, linewidth=0.8, alpha=0.8)
    scale = float(table["eigenvalue"].abs().max()) / 1000
    axes.set_xscale("symlog", linthresh=scale)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.axvline(0, color=NEUTRAL, linewidth=0.5)
    largest = 10.0 ** np.floor(np.log10(1000 * scale))
    ticks = [sign * largest / by for sign in (-1, 1) for by in (1, 100)]
    low, high = axes.get_xlim()
    axes.set_xticks([0.0, *(tick for tick in ticks if low < tick < high)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=r"$\lambda$", ylabel="share per unit", title=title)
