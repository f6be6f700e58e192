"""One look for every figure: theory as lines, measurements as points with t-intervals over seeds.

Column width, vector text, and a colour-blind-safe palette (Okabe & Ito 2008) in which every structure has its
own colour *and* marker, the same in all figures, so that none has to be told apart by colour alone.
"""

import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from curvlab.study.inference import Summary
from curvlab.tools.canvas import COLUMN as COLUMN
from curvlab.tools.canvas import DOUBLE as DOUBLE
from curvlab.tools.canvas import RC as RC
from curvlab.tools.canvas import canvas as canvas
from curvlab.tools.canvas import use as use
from curvlab.tools.looks import Look as Look
from curvlab.tools.looks import in_order as in_order
from curvlab.tools.looks import look as look
from curvlab.tools.storage import write

CONFIDENCE = 0.95
"""Of the intervals; they are not adjusted for multiplicity, unlike those of the verdicts."""
CHARACTERS = 23
"""Characters of small print to an inch."""


def theory(axes: Axes, x: Collection[Any], y: Collection[Any], structure: str, *, label: str | None = None) -> Line2D:
    """Draw a prediction as a line in the structure's colour; it enters the legend only with a ``label``."""
    (line,) = axes.plot(np.asarray(x), np.asarray(y), color=look(structure).color, label=label, zorder=2)
    return line


def _interval(values: Float[np.ndarray, " seeds"], logarithmic: bool) -> Float[np.ndarray, " 3"]:
    """Mean over seeds and the ends of its t-interval, of log values on a logarithmic axis."""
    summary = Summary.of(np.log(values) if logarithmic else values)
    found = np.array([summary.mean, *summary.interval(CONFIDENCE)])
    return np.exp(found) if logarithmic else found


def _points(look: Look, hollow: bool) -> dict[str, Any]:
    """How measured points are drawn."""
    return {
        "marker": look.marker,
        "linestyle": "none",
        "color": look.color,
        "ecolor": look.color,
        "markerfacecolor": "white" if hollow else look.color,
        "markeredgecolor": look.color if hollow else "#333333",
        "markeredgewidth": 0.8 if hollow else 0.4,
        "elinewidth": 1.0,
        "capsize": 2.0,
        "zorder": 3,
    }


def measured(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    structure: str | Look,
    *,
    shift: float = 0.0,
    label: str | None = None,
    hollow: bool = False,
) -> ErrorbarContainer:
    """Draw means over seeds as points with t-intervals, one point per value of the column ``x``.

    On a logarithmic axis (set the scale first) mean and interval are those of log y, hence positive and
    symmetric as drawn. A point of a single seed has no interval. Values that are not finite cannot be drawn; the
    legend counts them.

    Args:
        axes: Where to draw.
        table: One row per seed and point, with the columns ``value`` and, if there are several, ``seed``.
        x: Column with the abscissa.
        structure: Key of the look, or the look itself.
        shift: Displacement to the right in printer's points, so that structures at the same place stay apart.
        label: Entry in the legend; the structure's name if None.
        hollow: Whether the markers are empty.

    Raises:
        ValueError: several rows per seed and point, or a value on a logarithmic axis that is not positive.
    """
    style = look(structure) if isinstance(structure, str) else structure
    logarithmic = axes.get_yscale() == "log"
    if logarithmic and (table["value"] <= 0).any():
        raise ValueError(f"{style.label} has values ≤ 0, which a logarithmic axis cannot show")
    if "seed" in table and table.duplicated([x, "seed"]).any():
        raise ValueError(f"{style.label} has several rows per {x} and seed; seeds are the unit of replication")
    finite = np.isfinite(table["value"])
    positions, points, ends = [], [], []
    for position, group in table[finite].groupby(x):
        mean, low, high = _interval(group["value"].to_numpy(dtype=float), logarithmic)
        positions.append(position)
        points.append(mean)
        ends.append((mean - low, high - mean))
        shown = [end for end in (low, high, mean) if np.isfinite(end)]
        axes.update_datalim([(position, end) for end in shown])
    left_out = "" if finite.all() else f" ({(~finite).sum()} of {len(finite)} not finite)"
    container = axes.errorbar(
        np.array(positions),
        np.array(points),
        yerr=np.array(ends).T,
        label=(style.label if label is None else label) + left_out,
        transform=axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans),
        **_points(style, hollow),
    )
    axes.autoscale_view()  # a shifted artist does not count towards the limits; `update_datalim` put its data there
    return container


def across(axes: Axes, values: pd.Series, place: float, look: Look, *, hollow: bool = False) -> None:
    """Draw the mean of one value per seed, with its t-interval along x, at a height; both of log x on a logarithmic axis."""
    mean, low, high = _interval(values.to_numpy(dtype=float), axes.get_xscale() == "log")
    axes.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], **_points(look, hollow))


def band(axes: Axes, table: pd.DataFrame, x: str, **line: Any) -> pd.Series:
    """Draw means over seeds as a line with t-intervals as a band, where every seed has a value; both of log y on a log axis.

    Args:
        axes: Where to draw.
        table: Values by seed and x.
        x: Column with the abscissa.
        line: How the line is drawn; its ``color`` is that of the band, too.

    Returns:
        The means that are drawn, by abscissa.
    """
    values = table.pivot_table("value", "seed", x).dropna(axis=1)
    logarithmic = axes.get_yscale() == "log"
    mean, low, high = np.array([_interval(v, logarithmic) for v in values.to_numpy(dtype=float).T]).reshape(-1, 3).T
    axes.plot(values.columns, mean, **line)
    axes.fill_between(values.columns, low, high, color=line["color"], alpha=0.15, linewidth=0, zorder=1)
    return pd.Series(mean, values.columns)


def log_ticks(axes: Axes, positions: Collection[Any]) -> None:
    """A logarithmic x axis with ticks at the measured positions and nowhere else."""
    axes.set_xscale("log")
    axes.set_xticks(list(positions), [f"{position:g}" for position in positions])
    axes.set_xticks([], minor=True)


def legend(figure: Figure, columns: int = 3) -> None:
    """One legend above all axes, each label once, in the order in which they were drawn."""
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)


def caption(figure: Figure, shown: str, measurements: pd.DataFrame) -> None:
    """Say below a figure, in the reports, what it shows, over how many seeds and with which confidence.

    The files of the figure stay without it, for papers have captions of their own.

    Args:
        figure: The figure, drawn.
        shown: What is shown, in a sentence.
        measurements: Of the run.
    """
    seeds = measurements["seed"].nunique() if "seed" in measurements else 0
    counted = f"the {seeds} seeds of the run" if seeds > 1 else "one seed"
    bars = any(isinstance(drawn, ErrorbarContainer) for axes in figure.axes for drawn in axes.containers)
    bands = any(isinstance(drawn, PolyCollection) for axes in figure.axes for drawn in axes.collections)
    parts = [words for words, there in (("bars", bars), ("bands", bands)) if there]
    how = (
        f"Means over {counted}, geometric on logarithmic axes; {' and '.join(parts)} are t-intervals of {100 * CONFIDENCE:g} %, "
        "not corrected for the number of claims."
        if parts
        else f"Drawn from {counted}."
    )
    figure.set_label(f"{shown} {how}".strip())


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write ``path`` with the endings .pdf, for papers, and .png, for looking; both atomically and with one layout."""
    pdf, png = (path.with_name(f"{path.name}.{ending}") for ending in ("pdf", "png"))
    with use():
        figure.set_dpi(RC["savefig.dpi"])
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for target in (pdf, png):
        buffer = io.BytesIO()
        with use():
            figure.savefig(buffer, format=target.suffix[1:])
        write(target, buffer.getvalue())
    return pdf, png
