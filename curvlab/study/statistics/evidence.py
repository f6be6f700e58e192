"""What the seeds say of a location, a share or a spread: an estimate, its interval, and one-sided p-values.

Each sort of evidence is a valid test on a domain of its own; ``docs/calibration.md`` has their error rates and power.

- `StudentT`: the mean, for values that are symmetrically distributed over seeds, with tails as of a normal or heavier.
- `LogStudentT`: the geometric mean, for positive values whose logarithms are so.
- `SignTest`: the median, for any distribution.
- `BinomialTest`: a share, for values that are 0 or 1.
- `ArmsTest`: how far the means of several arms lie apart, by permutation within the seeds or pair by pair.

No test of the mean of a skewed distribution is valid at a dozen seeds (Bahadur and Savage, Annals of Mathematical
Statistics 27, 1956), nor is there a logarithm of zero: there `located` takes the median, and the evidence says so.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import betainc, betaincinv, nctdtr, ndtri, stdtr, stdtrit

from curvlab.tools.text import number

Values = Float[np.ndarray, " seeds"]
Centre = Literal["mean", "geometric mean", "median"]
Scale = Literal["linear", "log", "rank", "share"]
"""How values are compared: by their differences, their ratios, their order, or as successes."""

POWER = 0.8
SKEWED = 0.01
"""Level of the test of skewness beyond which a location is not judged by Student's t alone."""
ENOUGH_FOR_SKEWNESS = 8
"""Seeds from which that test is made."""
PERMUTATIONS = 19_999


@runtime_checkable
class Evidence(Protocol):
    """What the seeds say of one number."""

    scale: ClassVar[Scale]

    @property
    def estimate(self) -> float:
        """The number's estimate."""

    @property
    def seeds(self) -> int:
        """How many seeds there are."""

    @property
    def note(self) -> str:
        """What a reader has to know of it besides; empty if nothing."""

    def below(self, bound: float) -> float:
        """p-value of H₀: the number is at least ``bound``, against less."""

    def above(self, bound: float) -> float:
        """p-value of H₀: the number is at most ``bound``, against more."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided confidence interval, which excludes what `below` and `above` reject at (1 - confidence)/2."""

    def detectable(self, level: float) -> str:
        """The smallest effect that a test at this one-sided level finds with a probability of 80 %, in words."""


@dataclass(frozen=True, eq=False)
class StudentT:
    """The mean over at least two seeds that are not all equal, by Student's t."""

    values: Values
    note: str = ""
    scale: ClassVar[Scale] = "linear"

    @property
    def seeds(self) -> int:  # noqa: D102
        return len(self.values)

    @cached_property
    def estimate(self) -> float:  # noqa: D102
        return float(self.values.mean())

    @cached_property
    def error(self) -> float:
        """The standard error."""
        return float(self.values.std(ddof=1)) / math.sqrt(self.seeds)

    def below(self, bound: float) -> float:  # noqa: D102
        return float(stdtr(self.seeds - 1, (self.estimate - bound) / self.error))

    def above(self, bound: float) -> float:  # noqa: D102
        return float(stdtr(self.seeds - 1, (bound - self.estimate) / self.error))

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        half = -float(stdtrit(self.seeds - 1, (1 - confidence) / 2)) * self.error
        return self.estimate - half, self.estimate + half

    def shift(self, level: float) -> float:
        """The distance of the mean from a bound that is found with a probability of 80 %, by the noncentral t."""
        critical = -float(stdtrit(self.seeds - 1, level))
        low, high = 0.0, 2 * critical + 10
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            missed = float(nctdtr(self.seeds - 1, middle, critical))
            low, high = (middle, high) if missed > 1 - POWER else (low, middle)
        return high * self.error

    def detectable(self, level: float) -> str:  # noqa: D102
        return f"a mean {number(self.shift(level), digits=2)} beyond the bound"


@dataclass(frozen=True, eq=False)
class LogStudentT:
    """The geometric mean of positive values, by Student's t of their logarithms, which are not all equal; bounds are positive."""

    values: Values
    note: str = ""
    scale: ClassVar[Scale] = "log"

    @cached_property
    def _logarithms(self) -> StudentT:
        return StudentT(np.log(self.values))

    @property
    def seeds(self) -> int:  # noqa: D102
        return len(self.values)

    @property
    def estimate(self) -> float:  # noqa: D102
        return math.exp(self._logarithms.estimate)

    def below(self, bound: float) -> float:  # noqa: D102
        return self._logarithms.below(math.log(bound))

    def above(self, bound: float) -> float:  # noqa: D102
        return self._logarithms.above(math.log(bound))

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        low, high = self._logarithms.interval(confidence)
        return _exp(low), _exp(high)

    def detectable(self, level: float) -> str:  # noqa: D102
        return f"a factor of {number(_exp(self._logarithms.shift(level)), digits=3)} beyond the bound"


@dataclass(frozen=True, eq=False)
class SignTest:
    """The median over seeds, by the exact sign test; a seed on the bound speaks for neither side."""

    values: Values
    note: str = ""
    scale: ClassVar[Scale] = "rank"

    @property
    def seeds(self) -> int:  # noqa: D102
        return len(self.values)

    @cached_property
    def estimate(self) -> float:  # noqa: D102
        return float(np.median(self.values))

    def below(self, bound: float) -> float:  # noqa: D102
        return _at_least(int(np.sum(self.values < bound)), self.seeds, 0.5)

    def above(self, bound: float) -> float:  # noqa: D102
        return _at_least(int(np.sum(self.values > bound)), self.seeds, 0.5)

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        outside = _critical(self.seeds, (1 - confidence) / 2)
        if outside > self.seeds:
            return -math.inf, math.inf
        ordered = np.sort(self.values)
        return float(ordered[self.seeds - outside]), float(ordered[outside - 1])

    def detectable(self, level: float) -> str:  # noqa: D102
        share = _found_share(self.seeds, level, 0.5)
        return _none(self.seeds) if share is None else f"{100 * share:.3g} % of all seeds beyond the bound"


@dataclass(frozen=True)
class BinomialTest:
    """The share of seeds with a property, by the exact binomial test and the interval of Clopper and Pearson (1934).

    Attributes:
        successes: How many seeds have it.
        seeds: How many there are.
        bound: The share that it is to be told from.
        less: Whether it is to be below that share, instead of above.
        note: What a reader has to know besides.
    """

    successes: int
    seeds: int
    bound: float = 0.5
    less: bool = False
    note: str = ""
    scale: ClassVar[Scale] = "share"

    @property
    def estimate(self) -> float:  # noqa: D102
        return self.successes / self.seeds

    def above(self, bound: float) -> float:  # noqa: D102
        return _at_least(self.successes, self.seeds, bound)

    def below(self, bound: float) -> float:  # noqa: D102
        return _at_least(self.seeds - self.successes, self.seeds, 1 - bound)

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        tail = (1 - confidence) / 2
        failures = self.seeds - self.successes
        low = float(betaincinv(self.successes, failures + 1, tail)) if self.successes else 0.0
        high = float(betaincinv(self.successes + 1, failures, 1 - tail)) if failures else 1.0
        return low, high

    def detectable(self, level: float) -> str:  # noqa: D102
        found = _found_share(self.seeds, level, 1 - self.bound if self.less else self.bound)
        if found is None:
            return _none(self.seeds)
        share = 1 - found if self.less else found
        return f"{100 * share:.3g} % of all seeds, against {100 * self.bound:.3g} %"


@dataclass(frozen=True, eq=False)
class Cautious:
    """The median of values on which Student's t does not rest well: decided only where the sign test and t agree."""

    sign: SignTest
    student: StudentT | LogStudentT
    note: str = ""
    scale: ClassVar[Scale] = "rank"

    @property
    def seeds(self) -> int:  # noqa: D102
        return self.sign.seeds

    @property
    def estimate(self) -> float:  # noqa: D102
        return self.sign.estimate

    def below(self, bound: float) -> float:  # noqa: D102
        return max(self.sign.below(bound), self.student.below(bound))

    def above(self, bound: float) -> float:  # noqa: D102
        return max(self.sign.above(bound), self.student.above(bound))

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        (low, high), (lower, higher) = self.sign.interval(confidence), self.student.interval(confidence)
        return min(low, lower), max(high, higher)

    def detectable(self, level: float) -> str:  # noqa: D102
        return f"{self.student.detectable(level)} and {self.sign.detectable(level)}"


@dataclass(frozen=True, eq=False)
class ArmsTest:
    """How far the means of several arms, each measured at every seed, lie apart: the largest minus the smallest.

    Against 0 the arms are exchanged within each seed, `PERMUTATIONS` times: under no effect every exchange is as likely
    as what was seen. Against a margin the mean difference of every pair of arms is `located`: some pair lies further
    apart (with Bonferroni's correction for the pairs), or none does (each pair is equivalent). The interval is that of
    the pairs, against 0 too.

    Attributes:
        arms: The values, one column per arm.
        note: What a reader has to know besides.
    """

    arms: Float[np.ndarray, "seeds arms"]
    note: str = ""
    scale: ClassVar[Scale] = "linear"

    @property
    def seeds(self) -> int:  # noqa: D102
        return len(self.arms)

    @property
    def estimate(self) -> float:  # noqa: D102
        return float(np.ptp(self.arms.mean(axis=0)))

    @cached_property
    def _pairs(self) -> list[Evidence]:
        return [located("mean", first - second) for first, second in itertools.combinations(self.arms.T, 2)]

    def above(self, bound: float) -> float:  # noqa: D102
        if bound == 0.0:
            return self._exchanged
        beyond = (min(pair.above(bound), pair.below(-bound)) for pair in self._pairs)
        return min(1.0, 2 * len(self._pairs) * min(beyond))

    def below(self, bound: float) -> float:  # noqa: D102
        return max(max(pair.below(bound), pair.above(-bound)) for pair in self._pairs)

    @cached_property
    def _exchanged(self) -> float:
        orders = _exchanges(*self.arms.shape)
        totals = sum(values.take(order) for values, order in zip(self.arms, orders, strict=True))
        # Rounding must not tell an exchange that changes nothing from what was seen.
        seen = self.estimate * (1 - 1e-12)
        return float((1 + np.sum(np.ptp(totals, axis=1) >= seen * self.seeds)) / (1 + PERMUTATIONS))

    def interval(self, confidence: float) -> tuple[float, float]:  # noqa: D102
        level = (1 - confidence) / 2
        wide = [pair.interval(1 - level / len(self._pairs)) for pair in self._pairs]
        narrow = [pair.interval(confidence) for pair in self._pairs]
        low = max(max(low, -high, 0.0) for low, high in wide)
        return low, max(max(abs(low), abs(high)) for low, high in narrow)

    def detectable(self, level: float) -> str:  # noqa: D102
        one = level / (2 * len(self._pairs))
        shifts = [pair.shift(one) for pair in self._pairs if isinstance(pair, StudentT)]
        if len(shifts) < len(self._pairs):
            return next(pair.detectable(one) for pair in self._pairs if not isinstance(pair, StudentT))
        return f"two arms {number(max(shifts), digits=2)} apart beyond the margin"


def located(centre: Centre, values: Values) -> Evidence:
    """Evidence of a location: of the declared centre where there is a valid test, else of the median.

    Args:
        centre: What is claimed of.
        values: One value per seed, at least two.
    """
    if centre == "median":
        return SignTest(values)
    logarithmic = centre == "geometric mean"
    if logarithmic and (values <= 0).any():
        without = int(np.sum(values <= 0))
        return SignTest(values, f"{without} of {len(values)} values have no logarithm: of the median, by sign test")
    scaled = np.log(values) if logarithmic else values
    if scaled.std() == 0 or np.all(scaled == scaled[0]):
        return SignTest(values, f"all {len(values)} seeds give this value: exact sign test, not t")
    trouble = "only two values" if len(np.unique(scaled)) == 2 else "skewed" if _skewed(scaled) else ""
    student = LogStudentT if logarithmic else StudentT
    if trouble:
        note = f"{trouble}: of the median, decided only where t and the exact sign test agree"
        return Cautious(SignTest(values), student(values), note)
    return student(values)


def upper_rate(events: int, seeds: int, confidence: float = 0.95) -> float:
    """Upper confidence bound on the rate of what happened at some of the seeds (Clopper and Pearson)."""
    return 1.0 if events == seeds else float(betaincinv(events + 1, seeds - events, confidence))


def _skewed(values: Values) -> bool:
    """Whether the test of skewness of D'Agostino (Biometrika 57, 1970) rejects a normal distribution."""
    centred = values - values.mean()
    third, second = float(np.mean(centred**3)), float(np.mean(centred**2))
    return len(values) >= ENOUGH_FOR_SKEWNESS and abs(third) > _skewness_limit(len(values)) * second**1.5


@lru_cache
def _skewness_limit(n: int) -> float:
    """The skewness of a sample that this test rejects at the level `SKEWED`."""
    kurtosis = 3 * (n * n + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    squared = math.sqrt(2 * (kurtosis - 1)) - 1
    scaled = math.sqrt(2 / (squared - 1)) * math.sinh(-float(ndtri(SKEWED / 2)) * math.sqrt(math.log(squared) / 2))
    return scaled * math.sqrt(6 * (n - 2) / ((n + 1) * (n + 3)))


@lru_cache(maxsize=1)
def _exchanges(seeds: int, arms: int) -> UInt8[np.ndarray, "seeds permutations arms"]:
    """Orders of the arms at every seed, drawn at random; the same for all evidence of one shape."""
    same = np.broadcast_to(np.arange(arms, dtype=np.uint8), (seeds, PERMUTATIONS, arms))
    return np.random.default_rng(0).permuted(same, axis=2)


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def _at_least(count: int, trials: int, chance: float) -> float:
    """The probability of so many successes or more."""
    return 1.0 if count == 0 else float(betainc(count, trials - count + 1, min(max(chance, 0.0), 1.0)))


def _critical(trials: int, level: float, chance: float = 0.5) -> int:
    """The smallest number of successes that is significant against a chance; one more than the trials if there is none."""
    return next((k for k in range(trials + 1) if _at_least(k, trials, chance) <= level), trials + 1)


def _found_share(trials: int, level: float, chance: float) -> float | None:
    """The smallest share that is told from a chance with a probability of 80 %; None if there is none."""
    critical = _critical(trials, level, chance)
    return None if critical > trials else float(betaincinv(critical, trials - critical + 1, POWER))


def _none(seeds: int) -> str:
    return f"none: {seeds} seeds cannot decide it"
