"""The race, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from curvlab.advice.candidates import Method
from curvlab.advice.race import Entrant
from curvlab.tools.canvas import canvas, use

LOOKS: Mapping[Method, tuple[str, str]] = {
    "natural gradient": ("#0072B2", "o"),
    "Adam": ("#D55E00", "s"),
    "SGD": ("#009E73", "^"),
}
"""Colour and marker of each method."""


def draw(entrants: Sequence[Entrant], before: float) -> Figure:
    """Draw the held-out loss against seconds in steps.

    Args:
        entrants: the best first; the first of each method is named and heavy.
        before: the loss that all started from.
    """
    with use():
        figure, axes = canvas()
        at, named = axes[0, 0], set()
        for entrant in entrants:
            method = entrant.candidate.method
            seen = [look for look in entrant.looks if look.loss < 10 * abs(before)]
            if not seen:
                continue
            colour, marker = LOOKS[method]
            times, losses = zip(*((look.seconds, look.loss) for look in seen), strict=True)
            first = method not in named
            weight = {"linewidth": 1.8, "alpha": 1.0, "zorder": 3} if first else {"linewidth": 0.6, "alpha": 0.5}
            at.plot(
                times,
                losses,
                marker=marker,
                color=colour,
                label=str(entrant.candidate) if first else None,
                **weight,
            )
            named.add(method)
        at.set_xscale("log")
        if min(min(line.get_ydata()) for line in at.lines) > 0:
            at.set_yscale("log")
        for axis in (at.xaxis, at.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        at.set_xlabel("seconds of training")
        at.set_ylabel(f"held-out loss (before: {before:.3g})")
        at.legend(fontsize=6)
    return figure
