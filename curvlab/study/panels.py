"""What figures share: a layout of panels, selections of measurements, lines and guides."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from textwrap import fill, shorten
from typing import Any, Literal, SupportsFloat

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from curvlab.study import style
from curvlab.study.cells import Cell, matches
from curvlab.study.claims import Failure

Panel = Callable[[Axes, pd.DataFrame], None]
"""Draws one relation into given axes from the measurements of a run; raises `NotStored` if they are absent."""
Rows = Sequence[Sequence[Panel]]
"""Panels in rows, of which some may be shorter."""

NEUTRAL = "#555555"
"""Colour of guides, remarks and predictions that hold for every structure."""
DASHED = (0, (4, 2))
SMALL = 6.5
"""Font size of remarks, in printer's points."""
REASON = 200
"""Characters of the reason why a cell failed."""


class NotStored(LookupError):
    """Measurements that a panel needs are not among the stored ones; the message names them.

    Args:
        what: What is missing, in words.
        where: Coordinates of the cells that measure it, its experiment among them.
    """

    def __init__(self, what: str, where: Mapping[str, object] | None = None) -> None:
        super().__init__(what)
        self.where = where or {}

    def because(self, failures: Sequence[Failure]) -> str:
        """Which of the cells that failed measure it, and why the first did; empty if none does."""

        def measures(cell: Cell) -> bool:
            return matches(cell, {name: wanted for name, wanted in self.where.items() if name in cell.coordinates})

        failed = [failure for failure in failures if self.where and measures(failure.cell)]
        if not failed:
            return ""
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"Failed: cell {failed[0].cell}: {shorten(failed[0].reason, REASON, placeholder=' …')}{more}"


@dataclass(frozen=True)
class PanelGrid:
    """A figure: panels in a grid, and the claims that it shows.

    Attributes:
        command: The command that measures what it draws.
        panels: Rows of panels, or measurements → these, where what was measured says which there are; see `one_each`.
        claims: Beginnings of the ids of its claims; the report leads from these to it.
        width: Of the figure.
        height: Of a row, in inches.
        columns: Of the legend.
        caption: What is shown, in a sentence or more; what the panels say of themselves, in the first paragraphs of their
            docstrings, if empty.
        failures: Cells without measurements; a panel that lacks those says why.
    """

    command: str
    panels: Rows | Callable[[pd.DataFrame], Rows]
    claims: tuple[str, ...]
    width: Literal["column", "double"] = "double"
    height: float = 2.1
    columns: int = 5
    caption: str = ""
    failures: tuple[Failure, ...] = ()

    def __call__(self, measurements: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:  # noqa: ARG002
        """Draw the figure from stored measurements; a panel without measurements says so."""
        rows = self._rows(measurements)
        columns = max(len(row) for row in rows)
        figure, grid = style.canvas(len(rows), columns, width=self.width, height=self.height)
        for places, row in zip(grid, rows, strict=True):
            for axes, panel in zip_longest(places, row):
                if panel is None:
                    axes.set_axis_off()
                    continue
                try:
                    panel(axes, measurements)
                except NotStored as missing:
                    axes.clear()
                    _say_missing(axes, missing, self.failures, self.command)
                if axes.get_yscale() == "log" and axes.get_ylim()[1] < 100 * axes.get_ylim()[0]:
                    plain_ticks(axes.yaxis)
        if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
            style.legend(figure, columns=self.columns)
        style.caption(figure, self.caption or _described(rows), measurements)
        return figure

    def _rows(self, measurements: pd.DataFrame) -> Rows:
        if not callable(self.panels):
            return self.panels
        try:
            return self.panels(measurements)
        except NotStored as missing:
            return [[partial(_raise, missing)]]


def _described(rows: Rows) -> str:
    """What panels say of themselves, each kind of panel once."""
    kinds = dict.fromkeys(_kind(panel) for row in rows for panel in row)
    described = [" ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()) for kind in kinds]
    shown = [words for words in described if words]
    if len(shown) < 2:
        return "".join(shown)
    order = "From left to right" if len(rows) == 1 else "Row by row, from left to right"
    return f"{order}: {' — '.join(words.rstrip('.') for words in shown)}."


def _raise(missing: NotStored, *_: object) -> None:
    raise missing


def one_each(panels: Sequence[Panel], columns: int = 3) -> Rows:
    """Lay panels out in rows, as many as it takes; the last may be shorter."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def plain_ticks(axis: Axis) -> None:
    """Label 1, 2 and 5 of every decade of a logarithmic axis as plain numbers, or a few numbers where it has not even one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(4))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _say_missing(axes: Axes, missing: NotStored, failures: Sequence[Failure], command: str) -> None:
    axes.set_axis_off()
    said = missing.because(failures) or f"{command}\nmeasures it."
    width = axes.bbox.width / axes.figure.dpi * style.CHARACTERS
    text = f"{missing}\nis not among the stored results{'.' if missing.because(failures) else ';'}\n{said}"
    lines = [fill(line, max(20, int(width)), break_on_hyphens=False) for line in text.splitlines()]
    axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=6, color=NEUTRAL, transform=axes.transAxes)


def _kind(panel: Panel) -> Callable[..., object]:
    """The function of a panel, without the arguments that were given to it."""
    found: Callable[..., object] = panel
    while isinstance(found, partial):
        found = found.func
    return found


def take(measurements: pd.DataFrame, experiment: str, quantity: str, **where: object) -> pd.DataFrame:
    """Return the finite observations of an experiment's quantity with given coordinates; a tuple lists the values allowed.

    Raises:
        NotStored: there are none.
    """
    kept = (measurements["quantity"] == quantity) & np.isfinite(measurements["value"])
    for name, value in ({"experiment": experiment} | where).items():
        allowed = value if isinstance(value, tuple) else (value,)
        kept &= measurements[name].isin(allowed) if name in measurements else False
    if not kept.any():
        raise NotStored(f"{experiment}: {quantity.replace('_', ' ')}", {"experiment": experiment} | where)
    found: pd.DataFrame = measurements.loc[kept]
    return found


def at_base(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Keep the point from which a run varies one thing at a time: the most frequent value of each coordinate."""
    kept = table
    for name in names or ("depth", "activation", "outputs"):
        kept = kept.loc[kept[name] == kept[name].mode()[0]]
    return kept


def groups(table: pd.DataFrame, name: str) -> Iterator[tuple[float, pd.DataFrame]]:
    """Yield every value of a numeric column, ascending, with its rows."""
    for value in sorted(float(value) for value in table[name].unique()):
        yield value, table.loc[table[name] == value]


def structures_of(table: pd.DataFrame, separation: float = 3.2) -> Iterator[tuple[str, pd.DataFrame, float]]:
    """Yield every structure of a table in the order of legends, its rows and its displacement.

    Args:
        table: Measurements.
        separation: Displacement between structures at the same abscissa, in printer's points.
    """
    present = style.in_order(table["structure"].dropna())
    for index, structure in enumerate(present):
        yield structure, table[table["structure"] == structure], separation * (index - (len(present) - 1) / 2)


def width_axis(axes: Axes, table: pd.DataFrame) -> list[int]:
    """Make the x axis one of hidden widths, with a tick at each of the table's, and return them.

    Raises:
        NotStored: the problem has a width of its own.
    """
    widths = sorted(int(width) for width in table["width"].unique())
    if widths[0] == 0:
        raise NotStored("A dependence on the width (the problem has its own)")
    style.log_ticks(axes, widths)
    axes.margins(x=0.2)
    axes.set_xlabel("hidden width $M$ (units)")
    return widths


def predicted(
    axes: Axes, table: pd.DataFrame, x: str, structure: str, *, y: str = "value", label: str | None = None
) -> None:
    """Draw a prediction as a line of means over seeds, geometric on a logarithmic axis; a single point as a dash."""
    logarithmic = axes.get_yscale() == "log"
    shown = table[table[y] > 0] if logarithmic else table
    if shown.empty:
        return
    means = (np.log(shown[y]) if logarithmic else shown[y]).groupby(shown[x]).mean()
    line = np.exp(means) if logarithmic else means
    if len(line) == 1:
        line = pd.Series([line.iloc[0]] * 2, index=[0.88 * line.index[0], 1.12 * line.index[0]])
    style.theory(axes, line.index, line, structure, label=label)


def by_structure(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    *,
    theory: pd.DataFrame | None = None,
    separation: float = 3.2,
    **options: Any,
) -> None:
    """Draw the measured points of every structure side by side.

    Args:
        axes: Where to draw.
        table: Measurements.
        x: Column with the abscissa.
        theory: Predictions, drawn as lines; None for none.
        separation: Between structures, see `structures_of`.
        options: Of `style.measured`.
    """
    for index, (structure, group, shift) in enumerate(structures_of(table, separation)):
        if theory is not None:
            label = None if index else "theory"
            predicted(axes, theory[theory["structure"] == structure], x, structure, label=label)
        style.measured(axes, group, x, structure, shift=shift, **options)


def side_by_side(
    axes: Axes, x: str, groups: Iterable[tuple[pd.DataFrame, str, str | None, bool]], separation: float = 3.0
) -> None:
    """Draw the measured points of several groups beside one another; those without any take no place.

    Args:
        axes: Where to draw.
        x: Column with the abscissa.
        groups: Measurements, key of the look, entry in the legend (that of the look if None), and whether it is hollow.
        separation: Between groups, in printer's points.
    """
    shown = [group for group in groups if len(group[0])]
    for index, (table, look, label, hollow) in enumerate(shown):
        shift = separation * (index - (len(shown) - 1) / 2)
        style.measured(axes, table, x, look, label=label, shift=shift, hollow=hollow)


def inverse_root(axes: Axes, table: pd.DataFrame) -> None:
    """Draw M^(−1/2) for comparison, below the measured points of a table; nothing at a single width."""
    widths = np.array(sorted(table["width"].unique()), dtype=float)
    if len(widths) < 2:
        return
    means = np.log(table["value"]).groupby([table["structure"].fillna(""), table["width"]]).mean()
    lowest = float(np.exp(means.groupby("width").min() + 0.5 * np.log(widths / widths[0])).min())
    between = float(np.sqrt(widths[0] * widths[1]))
    axes.plot(
        widths, 0.6 * lowest * np.sqrt(widths[0] / widths), color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1
    )
    below = 0.6 * lowest * float(np.sqrt(widths[0] / between))
    note(axes, between, below, "$M^{-1/2}$", ha="right", va="top", xytext=(0, -1))


def level(axes: Axes, y: SupportsFloat) -> None:
    """Draw a horizontal guide."""
    axes.axhline(float(y), color=NEUTRAL, linestyle=DASHED, linewidth=0.8, zorder=1)


def note(axes: Axes, x: SupportsFloat, y: SupportsFloat, text: str, **options: Any) -> None:
    """Write a small remark at data coordinates; ``xytext`` displaces it by printer's points."""
    placed = {"ha": "left", "va": "bottom", "xytext": (0, 0), "color": NEUTRAL} | options
    axes.annotate(text, (float(x), float(y)), textcoords="offset points", fontsize=SMALL, **placed)
