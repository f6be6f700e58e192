"""The panels of the spectrum figures, each one relation between stored measurements."""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.spectrum.config import GGN, HESSIAN
from analyses.spectrum.measure import LINEAR, WHOLE
from curvlab.study import style
from curvlab.study.panels import NEUTRAL, Rows, one_each, take

OWN = {HESSIAN: style.Look("#AAAAAA", ">", "Hessian"), GGN: style.Look("#666666", "*", "GGN")}
"""Looks of what is no structure: greys."""


def look(matrix: str) -> style.Look:
    """The look of a matrix."""
    return OWN.get(matrix) or style.look(matrix)


def _by_matrix(axes: Axes, table: pd.DataFrame, x: str, separation: float) -> None:
    """Draw the measurements above 0 of every matrix side by side."""
    present = _present(table)
    for place, name in enumerate(present):
        group = table[(table["matrix"] == name) & (table["value"] > 0)]
        shift = place - (len(present) - 1) / 2
        style.measured(axes, group, x, look(name), shift=separation * shift)


def _present(table: pd.DataFrame) -> list[str]:
    found = set(table["matrix"])
    return [*(name for name in OWN if name in found), *style.in_order(found.difference(OWN))]


def top_eigenvalues(axes: Axes, measurements: pd.DataFrame) -> None:
    """The leading eigenvalues of every matrix."""
    axes.set_yscale("log")
    table = take(measurements, "spectra", "eigenvalue", layer=WHOLE)
    _by_matrix(axes, table, "index", 3.0)
    axes.margins(x=0.15)
    axes.set_xticks(sorted(int(index) for index in table["index"].unique()))
    axes.set(xlabel="eigenvalue, from the largest", ylabel=r"$\lambda_i$")


def traces(axes: Axes, measurements: pd.DataFrame) -> None:
    """The trace of every matrix."""
    axes.set_yscale("log")
    table = take(measurements, "spectra", "trace", layer=WHOLE)
    names = _present(table)
    for place, name in enumerate(names):
        style.measured(axes, table[table["matrix"] == name].assign(place=place), "place", look(name), label="")
    axes.set_xticks(range(len(names)), [look(name).label for name in names], rotation=35, ha="right")
    axes.set(ylabel="trace")


def largest_by_layer(axes: Axes, measurements: pd.DataFrame) -> None:
    """The largest eigenvalue of every layer's diagonal block, and of the whole matrix."""
    axes.set_yscale("log")
    table = take(measurements, "spectra", "eigenvalue", index=1)
    layers = list(dict.fromkeys(table["layer"]))
    places = {layer: index for index, layer in enumerate([*layers[1:], layers[0]])}
    _by_matrix(axes, table.assign(place=table["layer"].map(places)), "place", 9.0)
    names = [f"layer {layer}" if layer != WHOLE else "all parameters" for layer in places]
    axes.set_xticks(range(len(places)), names)
    axes.set(ylabel=r"$\lambda_{\max}$ of the block")


def densities(measurements: pd.DataFrame) -> Rows:
    """One panel for every matrix that was measured."""
    table = take(measurements, "spectra", "density")
    return one_each([partial(density, matrix=name) for name in _present(table)])


def density(axes: Axes, measurements: pd.DataFrame, *, matrix: str) -> None:
    """Spectral density of one matrix over the symmetric logarithm of λ, of every seed."""
    table = take(measurements, "spectra", "density", matrix=matrix)
    for _, group in table.groupby("seed"):
        ordered = group.sort_values("place")
        axes.plot(ordered["eigenvalue"], ordered["value"], color=look(matrix).color, linewidth=0.8, alpha=0.8)
    modulus = float(table["eigenvalue"].abs().max())
    axes.set_xscale("symlog", linthresh=LINEAR * modulus)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.axvline(0, color=NEUTRAL, linewidth=0.5)
    largest = 10.0 ** np.floor(np.log10(modulus))
    ticks = [sign * largest / by for sign in (-1, 1) for by in (1, 100)]
    low, high = axes.get_xlim()
    axes.set_xticks([0.0, *(tick for tick in ticks if low < tick < high)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=r"$\lambda$", ylabel="share per unit", title=look(matrix).label)
