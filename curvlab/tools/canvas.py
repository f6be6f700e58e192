"""The paper that figures are drawn on: widths of columns, fonts, lines and grid, the same in all figures."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

COLUMN = 3.25
"""Width of one column, in inches."""
DOUBLE = 6.75
"""Width of both columns, in inches."""

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
