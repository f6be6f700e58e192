"""Figures of the isotropy analysis, drawn from stored measurements only.

A panel draws one relation into given axes, so that figures of papers arrange the same panels. A figure is a `Layout`
of panels with the claims that it shows. A panel whose measurements are not stored says so, with the command.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from curvlab.study import style

COMMAND = "python -m analyses.ntk_isotropy"

Panel = Callable[[Axes, pd.DataFrame], None]
Draw = Callable[[pd.DataFrame, pd.DataFrame], Figure]

NEUTRAL = "#555555"
"""Colour of guides and of predictions that hold for every structure."""
DASHED = (0, (4, 2))
SEPARATION = 3.2
"""Displacement between structures at the same abscissa, in printer's points."""
LOWEST = 1e-17
"""Round-off below this is drawn here: a logarithmic axis has no zero."""


class NotStored(LookupError):
    """Measurements that a panel needs are not among the stored ones."""


@dataclass(frozen=True)
class Layout:
    """A figure: panels in a grid, and the claims that it shows.

    Attributes:
        panels: rows of panels.
        claims: beginnings of the ids of its claims; those that were judged enter the caption.
        width: of the figure.
        height: of a row, in inches.
        columns: of the legend.
        only: what the figure leaves out of the measurements, by column and values kept.
    """

    panels: Sequence[Sequence[Panel]]
    claims: tuple[str, ...]
    width: Literal["column", "double"] = "double"
    height: float = 2.1
    columns: int = 5

    def __call__(self, measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
        """Draw the figure from stored measurements and verdicts."""
        figure, grid = style.canvas(len(self.panels), len(self.panels[0]), width=self.width, height=self.height)
        for row, panels in zip(grid, self.panels, strict=True):
            for axes, panel in zip(row, panels, strict=True):
                try:
                    panel(axes, measurements)
                except NotStored as missing:
                    axes.clear()
                    say_missing(axes, str(missing))
        if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
            style.legend(figure, columns=self.columns)
        caption(figure, verdicts, self.claims)
        return figure


def say_missing(axes: Axes, what: str) -> None:
    """Write into empty axes what is not stored, and the command that measures it."""
    axes.set_axis_off()
    axes.text(
        0.5, 0.5, f"{what}\nnot measured in this run.\n{COMMAND}\nmeasures it.",
        ha="center", va="center", fontsize=6.5, color=NEUTRAL, transform=axes.transAxes, wrap=True,
    )  # fmt: skip


def caption(figure: Figure, verdicts: pd.DataFrame, claims: tuple[str, ...]) -> None:
    """Write below the figure its judged claims, of which `claims` are the beginnings of the ids, in lines of its width."""
    judged = [claim for claim in verdicts.get("claim", ()) if str(claim).startswith(claims)]
    if not judged:
        return
    style.caption(figure, verdicts, judged)
    entries = figure.get_supxlabel().replace("   ", "\t").replace(" ", "\u00a0").replace("\t", "   ")
    characters = int(figure.get_figwidth() * 22)
    figure.supxlabel(textwrap.fill(entries, characters, break_on_hyphens=False), fontsize=6)


def take(measurements: pd.DataFrame, part: str, quantity: str, **where: object) -> pd.DataFrame:
    """Return the finite observations of a quantity with given coordinates; a tuple lists the values allowed.

    Raises:
        NotStored: there are none.
    """
    table = measurements[(measurements["part"] == part) & (measurements["quantity"] == quantity)]
    for name, value in where.items():
        allowed = value if isinstance(value, tuple) else (value,)
        table = table[table[name].isin(allowed)] if name in table else table[:0]
    table = table[np.isfinite(table["value"])]
    if table.empty:
        raise NotStored(f"{part}: {quantity.replace('_', ' ')}")
    return table


def at_base(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Keep the point from which the run varies one thing at a time: the most frequent value of each coordinate."""
    for name in names or ("depth", "activation", "outputs"):
        table = table[table[name] == table[name].mode()[0]]
    return table


def structures_of(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, float]]:
    """Yield every structure of a table in the order of legends, its rows and its displacement in points."""
    present = [structure for structure in style.LOOKS if (table["structure"] == structure).any()]
    for index, structure in enumerate(present):
        yield structure, table[table["structure"] == structure], SEPARATION * (index - (len(present) - 1) / 2)


def swept(axes: Axes, table: pd.DataFrame) -> list[int]:
    """Make the x axis one of hidden widths, with a tick at each of the table's, and return them.

    Raises:
        NotStored: the problem has a width of its own.
    """
    widths = sorted(int(width) for width in table["width"].unique())
    if widths[0] == 0:
        raise NotStored("a dependence on the width: the problem has its own,")
    style.log_ticks(axes, widths)
    axes.set_xlabel("hidden width $M$ (neurons)")
    return widths


def predicted(axes: Axes, table: pd.DataFrame, x: str, structure: str, *, y: str = "value", dashed: bool = False) -> None:
    """Draw a prediction as a line of means over seeds, geometric on a logarithmic axis; a single point as a dash."""
    logarithmic = axes.get_yscale() == "log"
    table = table[table[y] > 0] if logarithmic else table
    if table.empty:
        return
    values = np.log(table[y]) if logarithmic else table[y]
    means = values.groupby(table[x]).mean()
    line = np.exp(means) if logarithmic else means
    if len(line) == 1:
        line = pd.Series([line.iloc[0]] * 2, index=[0.88 * line.index[0], 1.12 * line.index[0]])
    drawn = style.theory(axes, line.index, line, structure)
    if dashed:
        drawn.set_linestyle(DASHED)


def hollow(points: ErrorbarContainer) -> None:
    """Empty the markers of measured points."""
    points.lines[0].set_markerfacecolor("white")
    points.lines[0].set_markeredgecolor(points.lines[0].get_color())
    points.lines[0].set_markeredgewidth(0.8)


def guide(axes: Axes, x: Sequence[float], start: float, exponent: float, label: str) -> None:
    """Draw a power law for comparison, with its label at the left end."""
    y = start * (np.asarray(x, dtype=float) / x[0]) ** exponent
    axes.plot(x, y, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.annotate(label, (x[0], y[0]), (0, -3), textcoords="offset points", va="top", fontsize=6.5, color=NEUTRAL)


def note(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Write a small remark at data coordinates."""
    axes.annotate(text, (x, y), fontsize=6.5, color=NEUTRAL, **{"ha": "left", "va": "bottom", **options})  # type: ignore[arg-type]


def level(axes: Axes, y: float) -> None:
    """Draw a horizontal guide."""
    axes.axhline(y, color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)


# ----------------------------------------------------------------------------------------------------- response


def scale_against_depth(axes: Axes, measurements: pd.DataFrame) -> None:
    """α = tr M/R against depth at the smallest width; lines: derived, dashed: published where it differs."""
    axes.set_yscale("log")
    conditions = {"kind": "exact"}
    table = take(measurements, "response", "alpha_predicted", **conditions)
    table = at_base(table[table["width"] == table["width"].min()], "activation", "outputs")
    layers = take(measurements, "response", "layer_alpha").groupby("cell")["layer"].max()
    same = {"cell": tuple(table["cell"])}
    for structure, group, shift in structures_of(table):
        depth = group["cell"].map(layers)
        predicted(axes, group.assign(depth=depth), "depth", structure)
        alpha = take(measurements, "response", "alpha", structure=structure, **same)
        style.measured(axes, alpha.assign(depth=alpha["cell"].map(layers)), "depth", structure, shift=shift)
    try:
        published = take(measurements, "response", "alpha_published", structure="kfac", **same)
        predicted(axes, published.assign(depth=published["cell"].map(layers)), "depth", "kfac", dashed=True)
    except NotStored:
        pass
    axes.set(xlabel="depth $L$ (layers)", ylabel="scale α = tr $M$ / $R$")
    axes.xaxis.get_major_locator().set_params(integer=True)


def anisotropy_against_width(axes: Axes, measurements: pd.DataFrame) -> None:
    """‖M − ᾱI‖_F/‖ᾱI‖_F against width; grey: what round-off can do to the layer-wise family."""
    axes.set_yscale("log")
    table = at_base(take(measurements, "response", "anisotropy", kind="exact"))
    try:
        descent = at_base(take(measurements, "gradient-descent", "anisotropy"))
        table = pd.concat([table, descent.assign(structure="gradient-descent")])
    except NotStored:
        pass
    widths = swept(axes, table)
    for structure, group, shift in structures_of(table.assign(value=table["value"].clip(lower=LOWEST))):
        style.measured(axes, group, "width", structure, shift=shift)
    axes.set(ylabel=r"anisotropy $\|M-\bar\alpha I\|_F/\|\bar\alpha I\|_F$")
    try:
        exact = at_base(take(measurements, "response", "distance", structure=("full", "block-diagonal")))
    except NotStored:
        return
    axes.axhspan(LOWEST, exact["tolerance"].median(), color="#eeeeee", zorder=0)
    axes.set_ylim(bottom=table["value"].clip(lower=LOWEST).min() / 10)
    note(axes, widths[0], exact["tolerance"].median() / 2, "round-off × condition number", va="top")
