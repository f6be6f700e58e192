"""One look for every figure: theory as lines, measurements as points with t-intervals over seeds.

Column width, vector text, and a colour-blind-safe palette (Okabe & Ito 2008) in which every structure has its
own colour *and* marker, the same in all figures, so that none has to be told apart by colour alone.
"""

import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from curvlab.study.inference import Summary
from curvlab.tools.storage import write
from curvlab.tools.text import unknown

COLUMN = 3.25
"""Width of one column, in inches."""
DOUBLE = 6.75
"""Width of both columns, in inches."""

LINE = 0.11
"""Height of a line of the caption, in inches."""
CHARACTERS = 23
"""Characters of the caption to an inch."""
UNBROKEN = "\u00a0"
"""A space at which no line is broken."""

RC: Mapping[Any, Any] = MappingProxyType(
    {
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "savefig.dpi": 300,
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.titlesize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.xmargin": 0.1,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.2,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
    }
)


@dataclass(frozen=True)
class Look:
    """How a structure is drawn: a colour, a marker and the name in legends."""

    color: str
    marker: str
    label: str


LOOKS = MappingProxyType(
    {
        "full": Look("#000000", "o", "full"),
        "block-diagonal": Look("#0072B2", "s", "block-diagonal"),
        "block-tridiagonal": Look("#D55E00", "^", "block-tridiagonal"),
        "layer-wise": Look("#F0E442", "v", "layer-wise"),
        "unit-wise": Look("#009E73", "D", "unit-wise"),
        "diagonal": Look("#CC79A7", "X", "diagonal"),
        "kfac": Look("#E69F00", "P", "K-FAC"),
        "ekfac": Look("#56B4E9", "p", "EKFAC"),
        "gradient-descent": Look("#7F7F7F", "*", "gradient descent"),
    }
)
"""The look of every structure, by the key that options and results use."""


def look(structure: str) -> Look:
    """The look of a structure.

    Raises:
        ValueError: an unknown structure; the message suggests the nearest.
    """
    if structure not in LOOKS:
        raise ValueError(unknown("structure", structure, LOOKS))
    return LOOKS[structure]


def use() -> AbstractContextManager[None]:
    """Context in which figures are made and saved in this style."""
    return mpl.rc_context(dict(RC))


def canvas(
    rows: int = 1, columns: int = 1, *, width: Literal["column", "double"] = "column", height: float = 2.3
) -> tuple[Figure, np.ndarray]:
    """A figure of a paper's width with axes ``[rows, columns]``; ``height`` is inches per row."""
    inches = COLUMN if width == "column" else DOUBLE
    figure, axes = plt.subplots(rows, columns, figsize=(inches, rows * height), squeeze=False)
    return figure, axes


def theory(axes: Axes, x: Collection[Any], y: Collection[Any], structure: str, *, label: str | None = None) -> Line2D:
    """Draw a prediction as a line in the structure's colour; it enters the legend only with a ``label``."""
    (line,) = axes.plot(np.asarray(x), np.asarray(y), color=look(structure).color, label=label, zorder=2)
    return line


def measured(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    structure: str,
    *,
    y: str = "value",
    confidence: float = 0.95,
    shift: float = 0.0,
    label: str | None = None,
) -> ErrorbarContainer:
    """Draw means over seeds as points with t-intervals, one point per value of the column ``x``.

    On a logarithmic axis (set the scale first) mean and interval are those of log y, hence positive and
    symmetric as drawn. A point of a single seed has no interval. Values that are not finite cannot be drawn; the
    legend counts them.

    Args:
        axes: Where to draw.
        table: One row per seed and point; the seed, if it is there, in the column ``seed``.
        x: Column with the abscissa.
        structure: Key of the look.
        y: Column with the values.
        confidence: Of the intervals; they are not adjusted for multiplicity, unlike those of the verdicts.
        shift: Displacement to the right in printer's points, so that structures at the same place stay apart.
        label: Entry in the legend; the structure's name if None.

    Raises:
        ValueError: several rows per seed and point, or a value on a logarithmic axis that is not positive.
    """
    logarithmic = axes.get_yscale() == "log"
    if logarithmic and (table[y] <= 0).any():
        raise ValueError(f"{y!r} of {structure} has values ≤ 0, which a logarithmic axis cannot show")
    if "seed" in table and table.duplicated([x, "seed"]).any():
        raise ValueError(f"{structure} has several rows per {x} and seed; seeds are the unit of replication")
    finite = np.isfinite(table[y])
    positions, points, ends = [], [], []
    for position, group in table[finite].groupby(x):
        values = group[y].to_numpy(dtype=float)
        summary = Summary.of(np.log(values) if logarithmic else values)
        drawn = np.array([*summary.interval(confidence), summary.mean])
        low, high, mean = np.exp(drawn) if logarithmic else drawn
        positions.append(position)
        points.append(mean)
        ends.append((mean - low, high - mean))
        shown = [end for end in (low, high, mean) if np.isfinite(end)]
        axes.update_datalim([(position, end) for end in shown])
    style = look(structure)
    left_out = "" if finite.all() else f" ({(~finite).sum()} of {len(finite)} not finite)"
    container = axes.errorbar(
        np.array(positions),
        np.array(points),
        yerr=np.array(ends).T,
        fmt=style.marker,
        color=style.color,
        markeredgecolor="#333333",
        markeredgewidth=0.4,
        ecolor=style.color,
        elinewidth=1.0,
        capsize=2.0,
        label=(style.label if label is None else label) + left_out,
        zorder=3,
        transform=axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans),
    )
    axes.autoscale_view()  # a shifted artist does not count towards the limits; `update_datalim` put its data there
    return container


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


def caption(figure: Figure, verdicts: pd.DataFrame, claims: Sequence[str]) -> None:
    """Write below a figure which claims it shows and what became of them; it grows by the lines that this takes."""
    outcomes = dict(zip(verdicts["claim"], verdicts["outcome"], strict=True))
    entries = [f"{claim}: {outcomes.get(claim, 'not judged')}".replace(" ", UNBROKEN) for claim in claims]
    lines = textwrap.wrap("   ".join(entries), int(CHARACTERS * figure.get_figwidth()), break_on_hyphens=False)
    figure.supxlabel("\n".join(lines), fontsize=6)
    figure.set_figheight(figure.get_figheight() + LINE * len(lines))


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
