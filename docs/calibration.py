"""Measure how often the judge errs, and write the tables into `docs/calibration.md`: `python docs/calibration.py`.

Every row draws values over seeds whose truth is known and lies where it is hardest, on the bound, and lets the judge's own
rules decide. It is seeded by its name, and takes some seconds; all of them take less than ten minutes on one core.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm

from curvlab.study import Equivalence, Inequality, Share, Spread, Wins
from curvlab.study.report.markdown import table
from curvlab.study.statistics.evidence import ArmsTest, Evidence, upper_rate
from curvlab.study.statistics.multiplicity import LOOKS, Looks
from curvlab.study.statistics.rules import OneValue, Tested

PAGE = Path(__file__).with_suffix(".md")
LEVELS = (0.05, 0.05 / 54)
"""Alone, and as the first of 54 claims in Holm's procedure."""
DRAWS = 100_000
DRAWS_BY_PERMUTATION = 30_000
DRAWS_OF_POWER = 4_000
SURE = 0.99
"""Confidence of all upper bounds of the table together."""

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Median and mean 0, standard deviation 1."""
    return random.normal(size=shape)


def student(degrees: float) -> Draw:
    """Heavy tails around 0."""
    return lambda random, shape: random.standard_t(degrees, size=shape)


def log_normal(sigma: float) -> Draw:
    """Geometric mean and median 1."""
    return lambda random, shape: random.lognormal(0.0, sigma, size=shape)


def with_mean_one(sigma: float) -> Draw:
    """Log-normal values with mean 1."""
    return lambda random, shape: random.lognormal(-sigma * sigma / 2, sigma, size=shape)


def even(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Values from -1 to 1, all as likely."""
    return random.uniform(-1.0, 1.0, size=shape)


def whole(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Whole numbers around 0, many of them on it."""
    return np.round(random.normal(size=shape))


def yes(share: float) -> Draw:
    """1 at a share of all seeds, else 0."""
    return lambda random, shape: (random.random(size=shape) < share).astype(float)


def shifted(draw: Draw, by: float) -> Draw:
    """The same values, further up."""
    return lambda random, shape: draw(random, shape) + by


def scaled(draw: Draw, by: float) -> Draw:
    """The same values times a factor."""
    return lambda random, shape: draw(random, shape) * by


@dataclass(frozen=True)
class Row:
    """Values of a known truth, and the rules that decide on them.

    Attributes:
        name: What is claimed.
        data: What the values are.
        seeds: How many there are.
        draw: Makes them, one row per experiment.
        supports: The rule, on the bound of which the truth lies, so that to support it is an error.
        refutes: The rule that is true, if only just; None if it is the same.
        means: The mean of each arm, in units of the noise; none if there are no arms.
        looks: When a sequential run looks.
    """

    name: str
    data: str
    seeds: int
    draw: Draw
    supports: Tested
    refutes: Tested | None = None
    means: tuple[float, ...] = ()
    looks: Looks | None = None

    @property
    def title(self) -> tuple[str, str, str]:
        """What stands in the first columns of its line."""
        return self.name, self.data, str(self.seeds)

    @property
    def draws(self) -> int:
        """How many experiments it takes."""
        return DRAWS_BY_PERMUTATION if self.supports == Spread("q", "arm") else DRAWS

    def decisions(self, count: int) -> np.ndarray:
        """How often it is supported and refuted, at each level: ``[level, way]``."""
        seed = int.from_bytes(hashlib.sha256(repr(self.title).encode()).digest()[:8])
        random = np.random.default_rng(seed)
        found = np.zeros((len(LEVELS), 2), dtype=int)
        for values in self._values(random, count):
            p_values = np.array([self._p_values(values[:seeds]) for seeds in self._ends])
            limits = np.array([[self._limit(level, look) for look in range(len(self._ends))] for level in LEVELS])
            found += (p_values[None] <= limits[:, :, None]).any(axis=1)
        return found

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.looks.seeds if self.looks else (self.seeds,)

    def _limit(self, level: float, look: int) -> float:
        return self.looks.nominal(level, look) if self.looks else level

    def _values(self, random: np.random.Generator, count: int) -> np.ndarray:
        if not self.means:
            return self.draw(random, (count, self.seeds))
        flat = self.draw(random, (count, self.seeds * len(self.means)))
        return flat.reshape(count, self.seeds, len(self.means)) + np.array(self.means)

    def _evidence(self, rule: Tested, values: np.ndarray) -> Evidence:
        return rule.evidence_of(values) if isinstance(rule, OneValue) else ArmsTest(values)

    def _p_values(self, values: np.ndarray) -> tuple[float, float]:
        support, refutation = self.supports.p_values(self._evidence(self.supports, values))
        if self.refutes:
            refutation = self.refutes.p_values(self._evidence(self.refutes, values))[1]
        return support, refutation


def inequality(centre: str, data: str, seeds: int, draw: Draw, bound: float) -> Row:
    """A location against a bound on which it lies."""
    return Row(f"{centre} < bound", data, seeds, draw, Inequality("q", "less", bound, centre=centre))


def equivalence(centre: str, data: str, draw: Draw, truth: float) -> Row:
    """A location on an end of a wide margin, and in the middle of one that is nothing against the noise."""
    end, inside = (Equivalence("q", truth + at, margin, centre=centre) for at, margin in ((4.0, 4.0), (0.0, 1e-9)))
    return Row(f"{centre} = target ± margin", data, 12, draw, end, inside)


def sequential(name: str, data: str, draw: Draw, rule: Tested) -> Row:
    """A claim for which seeds are added until it is decided."""
    return Row(name, f"{data}; 12, then 24, then 48 seeds", LOOKS[-1], draw, rule, looks=Looks(LOOKS))


SIGMAS = (0.25, 0.5, 1.0, 1.5, 2.0)
MEDIAN, GEOMETRIC, MEAN = "median", "geometric mean", "mean"
SAME = (0.0, 0.0, 0.0)
"""Means of three arms."""

INSIDE: list[Row] = [
    *(inequality(MEAN, "normal", seeds, normal, 0.0) for seeds in (8, 12, 24)),
    *(inequality(MEAN, f"heavy tails (Student's t, {k:g} degrees)", 12, student(k), 0.0) for k in (3, 1.5)),
    *(inequality(GEOMETRIC, f"log-normal, σ = {sigma:g}", 12, log_normal(sigma), 1.0) for sigma in SIGMAS),
    *(inequality(GEOMETRIC, "log-normal, σ = 1", seeds, log_normal(1.0), 1.0) for seeds in (8, 24)),
    *(inequality(MEDIAN, "log-normal, σ = 2", seeds, log_normal(2.0), 1.0) for seeds in (8, 12, 24)),
    inequality(MEDIAN, "heavy tails (Student's t, 1.5 degrees)", 12, student(1.5), 0.0),
    inequality(MEDIAN, "whole numbers, many on the bound", 12, whole, 0.0),
    equivalence(MEAN, "normal", normal, 0.0),
    equivalence(MEAN, "heavy tails (Student's t, 3 degrees)", student(3.0), 0.0),
    equivalence(GEOMETRIC, "log-normal, σ = 1", log_normal(1.0), 1.0),
    equivalence(MEDIAN, "log-normal, σ = 2", log_normal(2.0), 1.0),
    *(Row("share > 0.5", "yes or no", seeds, yes(0.5), Share("q", "greater", 0.5)) for seeds in (8, 12, 24)),
    Row("share > 0.9", "yes or no", 12, yes(0.9), Share("q", "greater", 0.9)),
    Row("wins", "differences, normal", 12, normal, Wins("q", "less")),
    Row("wins", "differences, log-normal with σ = 2 around the median", 12, shifted(log_normal(2.0), -1.0), Wins("q", "less")),
    Row("wins", "differences, whole numbers with ties", 12, whole, Wins("q", "less")),
    Row("spread > 0", "three arms, normal", 12, normal, Spread("q", "arm"), means=SAME),
    Row("spread > 0", "three arms, log-normal, σ = 2", 12, log_normal(2.0), Spread("q", "arm"), means=SAME),
    Row("spread > 1", "three arms, normal, two of them just so far apart", 12, scaled(normal, 0.1), Spread("q", "arm", 1.0),
        means=(0.0, 0.5, 1.0)),
    inequality(MEAN, "all seeds on the bound", 12, scaled(normal, 0.0), 0.0),
    sequential("mean < bound", "normal", normal, Inequality("q", "less", 0.0, centre=MEAN)),
    sequential("geometric mean < bound", "log-normal, σ = 1", log_normal(1.0), Inequality("q", "less", 1.0, centre=GEOMETRIC)),
    sequential("wins", "differences, normal", normal, Wins("q", "less")),
]  # fmt: skip
"""Rules on the data that they are declared for."""

OUTSIDE: list[Row] = [
    *(inequality(MEAN, f"log-normal, σ = {sigma:g}", 12, with_mean_one(sigma), 1.0) for sigma in SIGMAS),
    inequality(MEAN, "evenly spread, without tails", 12, even, 0.0),
    inequality(MEAN, "yes at a tenth of all seeds, else no", 12, yes(0.1), 0.1),
]
"""Rules on data that ask for another."""


def power_of(effect: float) -> list[Row]:
    """Claims that are true by some standard deviations, where the last is false by as much."""
    share = float(norm.cdf(effect))
    below, apart = shifted(normal, -effect), (0.0, 0.0, effect)
    return [
        Row("mean < bound", "normal", 12, below, Inequality("q", "less", 0.0, centre=MEAN)),
        Row("mean < bound", "heavy tails (Student's t, 3 degrees)", 12, shifted(student(3.0), -effect * 3**0.5),
            Inequality("q", "less", 0.0, centre=MEAN)),
        Row("geometric mean < bound", "log-normal, any σ", 12, scaled(log_normal(1.0), np.exp(-effect)),
            Inequality("q", "less", 1.0, centre=GEOMETRIC)),
        Row("median < bound", "normal", 12, below, Inequality("q", "less", 0.0, centre=MEDIAN)),
        Row("mean = target ± margin", "normal, in the middle", 12, normal, Equivalence("q", 0.0, effect, centre=MEAN)),
        Row("share > 0.5", f"yes at {100 * share:.0f} % of all seeds", 12, yes(share), Share("q", "greater", 0.5)),
        Row("wins", "differences, normal", 12, below, Wins("q", "less")),
        Row("spread > 0", "three arms, normal, one apart", 12, normal, Spread("q", "arm"), means=apart),
        Row("spread > 0.5", "three arms, normal, one further apart", 12, normal, Spread("q", "arm", 0.5),
            means=(0.0, 0.0, 0.5 + effect)),
        sequential("mean < bound", "normal", below, Inequality("q", "less", 0.0, centre=MEAN)),
    ]  # fmt: skip


def kept(level: float, upper: float) -> bool:
    """Whether an upper bound on the rate of errors says that the level is kept."""
    return upper <= 1.1 * level + 0.001


def upper_bound(events: int, count: int) -> float:
    """The upper bound on a rate, at a confidence that holds for the whole table."""
    return upper_rate(events, count, 1 - (1 - SURE) / (2 * len(LEVELS) * len(INSIDE)))


def errors(rows: Sequence[Row]) -> str:
    """The table of errors."""
    ways = [f"{way}, level {level:.2g}" for level in LEVELS for way in ("falsely supported", "falsely refuted")]
    lines = []
    for row in rows:
        events = row.decisions(row.draws)
        uppers = [[upper_bound(int(n), row.draws) for n in level] for level in events]
        holds = all(kept(level, upper) for level, pair in zip(LEVELS, uppers, strict=True) for upper in pair)
        pairs = zip(events.ravel(), np.ravel(uppers), strict=True)
        rates = [f"{count / row.draws:.2g} (≤ {upper:.2g})" for count, upper in pairs]
        lines.append([*row.title, *rates, "yes" if holds else "no"])
    return table(["rule", "values", "seeds", *ways, "kept"], lines)


def powers() -> str:
    """The table of power, at effects of one and two standard deviations."""
    effects = [f"{effect} sd, level {level:.2g}" for effect in (1, 2) for level in LEVELS]
    lines = []
    for small, large in zip(power_of(1.0), power_of(2.0), strict=True):
        found = [row.decisions(DRAWS_OF_POWER)[:, 0] / DRAWS_OF_POWER for row in (small, large)]
        data = small.data if small.data == large.data else f"{small.data}, and at {large.data.removeprefix('yes at ')}"
        lines.append([small.name, data, *(f"{power:.2f}" for pair in found for power in pair)])
    return table(["rule", "values", *effects], lines)


TABLES: dict[str, Callable[[], str]] = {
    "errors": lambda: errors(INSIDE),
    "errors outside": lambda: errors(OUTSIDE),
    "power": powers,
}


def updated(page: str) -> str:
    """The text of the page with tables made anew."""
    for name, made in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        page = place.sub(rf"\1\n{made()}\n\n\2", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
