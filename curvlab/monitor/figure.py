"""Curves of a run, in a figure or, in a notebook, in one that follows it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, list[tuple[int, float]]]
"""Steps and values by name, ``quantity/number``."""

NAMED = 6
"""Curves of a panel that a legend names."""
COLUMNS = 3


def draw(curves: Curves, events: Iterable[Any] = ()) -> Figure:
    """Draw curves, one panel a quantity, with a line at every event.

    Args:
        curves: see `Curves`.
        events: with `step` and `quantity`.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in curves.items():
        quantity, _, number = name.partition("/")
        panels.setdefault(quantity, {})[number or quantity] = points
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, ceil(len(panels) / columns))
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=False):
        for number, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=number, marker=".", markersize=3, linewidth=1)
        for event in events:
            if event.quantity == quantity:
                axis.axvline(event.step, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=quantity, xlabel="step")
        if len(lines) <= NAMED:
            axis.legend(fontsize="x-small", frameon=False)
    for axis in list(figure.axes)[len(panels) :]:
        axis.remove()
    return figure


class LiveFigure:
    """A figure in a notebook that follows the run.

    It is drawn when the budget of the monitor allows, like a quantity, and at most once in so many seconds.

    Args:
        seconds: from one drawing to the next, at least.

    Raises:
        RuntimeError: outside of a notebook.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        try:
            from IPython import get_ipython
            from IPython.display import DisplayHandle, Image
        except ImportError as error:
            raise RuntimeError(f"A live figure needs IPython. {_ELSEWHERE}") from error
        if get_ipython() is None:
            raise RuntimeError(f"There is no notebook that would show a live figure. {_ELSEWHERE}")
        self.seconds = seconds
        self._image, self._handle = Image, DisplayHandle()
        self._shown: float | None = None

    @property
    def due(self) -> bool:
        """Whether the last drawing is long enough ago."""
        return self._shown is None or time.monotonic() - self._shown >= self.seconds

    def show(self, curves: Curves, events: Iterable[Any] = ()) -> None:
        """Draw, in place of what was drawn before."""
        store = io.BytesIO()
        draw(curves, events).savefig(store, format="png", dpi=90)
        image = self._image(data=store.getvalue())
        (self._handle.display if self._shown is None else self._handle.update)(image)
        self._shown = time.monotonic()


_ELSEWHERE = "Elsewhere, write to CSV(path) or TensorBoard(folder), or draw with monitor.plot()."
