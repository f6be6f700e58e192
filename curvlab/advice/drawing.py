"""The race, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from curvlab.advice.candidates import Method
from curvlab.advice.damping import ERRORS, Dampings
from curvlab.advice.race import Entrant
from curvlab.tools.canvas import canvas, use

LOOKS: Mapping[Method, tuple[str, str]] = {
    "natural gradient": ("#0072B2", "o"),
    "Adam": ("#D55E00", "s"),
    "SGD": ("#009E73", "^"),
}
"""Colour and marker of each method."""


def draw(entrants: Sequence[Entrant], before: float, dampings: Dampings | None = None) -> Figure:
    """Draw the held-out loss against seconds in steps, and the falls of the loss against damping.

    Args:
        entrants: the best first; the first of each method is named and heavy.
        before: the loss that all started from.
        dampings: of natural gradient, if there are any.
    """
    with use():
        figure, axes = canvas(columns=1 if dampings is None else 2, width="column" if dampings is None else "double")
        at, named = axes[0, 0], set()
        if dampings is not None:
            _falls(axes[0, 1], dampings, entrants[0].damping)
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


def _falls(at: Axes, dampings: Dampings, arrived: float | None) -> None:
    """Draw what one step at each damping did: the falls of its own batch and of others, and where training starts and arrives."""
    table = dampings.table.replace([inf, -inf], nan)
    if dampings.interval is not None:
        at.axvspan(*dampings.interval, color="#0072B2", alpha=0.12, linewidth=0, label="good dampings")
    at.axhline(0, color="#555555", linewidth=0.8)
    at.plot(table["damping"], table["fall"], color="#D55E00", marker="s", linestyle="none", label="own batch")
    if table["others"].notna().any():
        bars = (ERRORS * table["error"]).fillna(0.0)
        at.errorbar(
            table["damping"],
            table["others"],
            yerr=bars,
            color="#0072B2",
            fmt="o",
            capsize=2,
            label="others, ± 2 errors",
        )
    for place, style, label in ((dampings.start, "-", "start"), (arrived, ":", "end of race")):
        if place:
            at.axvline(place, color="#555555", linestyle=style, linewidth=0.9, label=label)
    at.set_xscale("log")
    kept = table[table["fall"] > 0]
    if len(kept):
        top = max(kept["fall"].max(), kept["others"].max() if kept["others"].notna().any() else 0.0)
        at.set_ylim(-0.6 * top, 1.2 * top)
    at.set_xlabel("damping of one step")
    at.set_ylabel("fall of the loss")
    at.legend(fontsize=6)
