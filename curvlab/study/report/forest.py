"""The effect of a claim as a strip of a forest plot, on its own scale: seeds, estimate, intervals and where the claim holds.

Only the geometry is computed here, in the units of the drawing; ``macros.html`` draws it as inline SVG.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from curvlab.study.report.findings import Finding
from curvlab.tools.text import number

WIDTH, HEIGHT = 400.0, 74.0
MARGIN = 22.0
"""Free at the left and at the right, for labels and arrows."""
MIDDLE = 34.0
"""Height of the estimate, from above."""
AXIS = 56.0
"""Height of the axis."""
DOT = 2.4
"""Radius of a seed."""
LARGEST = 307
"""Largest power of ten that is labelled."""
STACK = 28.0
"""Height into which seeds at the same place are stacked above the estimate."""


@dataclass(frozen=True)
class Span:
    """A part of the axis.

    Attributes:
        low: Left end.
        high: Right end.
        more_below: Whether it goes on beyond the left edge.
        more_above: Whether it goes on beyond the right edge.
    """

    low: float
    high: float
    more_below: bool
    more_above: bool


@dataclass(frozen=True)
class Strip:
    """A drawing of one effect.

    Attributes:
        words: What it shows, for those who do not see it.
        region: Where the claim holds; None if that lies beyond the edges.
        limits: The ends of the region, where they are on the axis.
        interval: That of 95 %; None without one.
        corrected: That at which the claim was tested; None without one.
        estimate: Place of the estimate; None without one.
        seeds: Place and height of every seed, and its value.
        ticks: Places and labels.
    """

    words: str
    region: Span | None
    limits: list[float]
    interval: Span | None
    corrected: Span | None
    estimate: float | None
    seeds: list[tuple[float, float, str]]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class _Axis:
    """Values to places."""

    low: float
    high: float
    logarithmic: bool

    def _scaled(self, value: float) -> float:
        if not self.logarithmic:
            return value
        return math.log10(value) if 0 < value < math.inf else (-math.inf if value <= 0 else math.inf)

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return MARGIN + min(max(share, 0.0), 1.0) * (WIDTH - 2 * MARGIN)

    def span(self, low: float, high: float) -> Span | None:
        """The visible part of an interval; None if there is none."""
        if math.isnan(low) or math.isnan(high):
            return None
        first, last = self._scaled(low), self._scaled(high)
        if last < self.low or first > self.high:
            return None
        return Span(self.place(low), self.place(high), more_below=first < self.low, more_above=last > self.high)

    def holds(self, value: float) -> bool:
        return self.low <= self._scaled(value) <= self.high

    def ticks(self) -> list[tuple[float, str]]:
        decades = self.high - self.low if self.logarithmic else 0.0
        if decades > 0.8:
            digits = (1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 5)
            step = max(1, round(decades / 4))
            powers = range(max(math.floor(self.low), -LARGEST), min(math.ceil(self.high), LARGEST) + 1, step)
            values = [digit * 10.0**power for power in powers for digit in digits]
        else:
            ends = [10.0 ** min(end, LARGEST) if self.logarithmic else end for end in (self.low, self.high)]
            values = [float(value) for value in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(*ends)]
        return [(self.place(value), f"{value:.6g}") for value in values if self.holds(value)]


def strip(finding: Finding) -> Strip | None:
    """The drawing of a finding; None if it has neither an estimate nor a value of a seed."""
    return strips([finding])[0]


def strips(found: Sequence[Finding]) -> list[Strip | None]:
    """Drawings of findings on one axis, to be compared."""
    axis = _axis([finding for finding in found if any(map(math.isfinite, _values(finding)))])
    return [_strip(finding, axis) if axis and any(map(math.isfinite, _values(finding))) else None for finding in found]


def _strip(finding: Finding, axis: _Axis) -> Strip:
    estimate = finding.effect
    return Strip(
        words=_words(finding),
        region=axis.span(*finding.region),
        limits=[axis.place(end) for end in finding.region if math.isfinite(end) and axis.holds(end)],
        interval=axis.span(finding.low_95, finding.high_95),
        corrected=axis.span(finding.low, finding.high),
        estimate=None if math.isnan(estimate) else axis.place(estimate),
        seeds=_stacked(finding.by_seed, axis.place),
        ticks=axis.ticks(),
    )


def _values(finding: Finding) -> list[float]:
    return [*finding.by_seed, finding.effect]


def _axis(found: Sequence[Finding]) -> _Axis | None:
    """An axis with every value, the ends of the regions, and as much of the intervals as leaves these legible."""
    if not found:
        return None
    logarithmic = found[0].logarithmic

    def scaled(numbers: Iterable[float]) -> list[float]:
        finite = [value for value in numbers if math.isfinite(value) and (value > 0 or not logarithmic)]
        return [math.log10(value) for value in finite] if logarithmic else finite

    core = scaled(value for finding in found for value in [*_values(finding), *finding.region]) or [0.0]
    low, high = min(core), max(core)
    room = high - low or abs(low) * 0.1 or 1.0
    ends = scaled(end for f in found for end in (f.low_95, f.high_95, f.low, f.high))
    low = min([low, *(max(end, low - 0.6 * room) for end in ends)])
    high = max([high, *(min(end, high + 0.6 * room) for end in ends)])
    pad = 0.06 * (high - low or room)
    return _Axis(low - pad, high + pad, logarithmic)


def _stacked(values: Sequence[float], place: Callable[[float], float]) -> list[tuple[float, float, str]]:
    """Every value as a dot, above those beside it."""
    columns: dict[int, list[float]] = {}
    for value in sorted(values):
        columns.setdefault(round(place(value) / (2 * DOT)), []).append(value)
    return [
        (place(value), MIDDLE - 4.0 - row * min(2 * DOT, STACK / len(column)), number(value))
        for column in columns.values()
        for row, value in enumerate(column)
    ]


def _words(finding: Finding) -> str:
    low, high = finding.region
    where = (
        f"between {number(low)} and {number(high)}"
        if math.isfinite(low) and math.isfinite(high)
        else f"below {number(high)}"
        if math.isfinite(high)
        else f"above {number(low)}"
    )
    interval = (
        "" if math.isnan(finding.low_95) else f", 95 % interval {number(finding.low_95)} to {number(finding.high_95)}"
    )
    return f"{finding.estimand}: {number(finding.effect)}{interval}; the claim holds {where}"
