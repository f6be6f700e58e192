"""The rules by which claims are decided, each with the estimand that it declares.

`Identity` and `Always` settle a claim by every single observation, without a p-value. All other rules are tests over
seeds: they say which evidence the seeds give, and its p-values for the claim and against it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from curvlab.study.statistics.evidence import ArmsTest, BinomialTest, Centre, Evidence, SignTest, located, upper_rate
from curvlab.tools.text import unknown

Quantities = str | tuple[str, ...]
Direction = Literal["less", "greater"]
PValues = tuple[float, float]


class Unfit(ValueError):
    """Values over seeds of which a rule says nothing, and why."""


@dataclass(frozen=True)
class Settled:
    """What a rule without a test makes of the observations.

    Attributes:
        holds: Whether the claim holds.
        estimate: The worst observation.
        note: What that rests on.
        values: The worst of each seed, in the order of the seeds; of an identity as a share of its tolerance.
    """

    holds: bool
    estimate: float
    note: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Rule(ABC):
    """How a claim is decided, and on which quantities.

    Attributes:
        quantities: Those that the claim reads, one or several.
    """

    quantities: Quantities

    columns: ClassVar[tuple[str, ...]] = ("seed", "value")
    """What an estimate has to have."""
    each: ClassVar[bool] = True
    """Whether every observation counts, instead of one value per seed."""

    @property
    @abstractmethod
    def estimand(self) -> str:
        """What is estimated, in words."""

    @property
    def logarithmic(self) -> bool:
        """Whether values are compared by their ratios."""
        return False

    @property
    @abstractmethod
    def region(self) -> tuple[float, float]:
        """From where to where the estimand lies if the claim holds; an end that is open is infinite."""

    @property
    def names(self) -> tuple[str, ...]:
        """The quantities that the claim reads."""
        return (self.quantities,) if isinstance(self.quantities, str) else self.quantities

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that tell the rows of an estimate apart; none if every observation counts."""
        return () if self.each else ("seed",)

    def reduced(self, table: pd.DataFrame) -> pd.DataFrame:
        """The estimate of a claim that declares none: each observation, or the mean of those of a key."""
        if self.each:
            return table[list(self.columns)]
        return table.groupby(list(self.keys))["value"].mean().reset_index()


@dataclass(frozen=True)
class Observed(Rule):
    """A rule that every observation has to satisfy."""

    @abstractmethod
    def settle(self, estimate: pd.DataFrame) -> Settled:
        """Whether all observations satisfy it.

        Raises:
            Unfit: no observation speaks for or against it.
        """


@dataclass(frozen=True)
class Identity(Observed):
    """Holds to round-off: |value| ≤ tolerance for every observation, refuted by a single one that exceeds it.

    The tolerance is a column of the estimate, because it follows from the condition number of what was solved. An
    observation within a tolerance above ``coarsest``, in the unit of the estimate, speaks neither for the claim nor
    against it.
    """

    coarsest: float = 0.01
    columns: ClassVar[tuple[str, ...]] = ("seed", "value", "tolerance")
    estimand: ClassVar[str] = "|value| over its tolerance, the largest of a seed"
    logarithmic: ClassVar[bool] = True
    region: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __str__(self) -> str:
        return f"|value| ≤ its tolerance for every observation, tolerances up to {self.coarsest:g} counting as support"

    def settle(self, estimate: pd.DataFrame) -> Settled:  # noqa: D102
        values = np.abs(estimate["value"].to_numpy(dtype=float))
        tolerances = estimate["tolerance"].to_numpy(dtype=float)
        if not (np.isfinite(tolerances) & (tolerances >= 0)).all():
            raise Unfit("a tolerance of its estimate is negative or not finite")
        broken: Bool[np.ndarray, " rows"] = values > tolerances
        telling = (tolerances <= self.coarsest) | broken
        if not telling.any():
            raise Unfit(f"every tolerance of its estimate is above {self.coarsest:g}: too ill-conditioned to tell")
        values, tolerances, broken = values[telling], tolerances[telling], broken[telling]
        seeds = estimate["seed"].to_numpy()[telling]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(tolerances > 0, values / tolerances, np.where(broken, math.inf, 0.0))
        worst = int(np.argmax(share))
        apart = f"; {np.sum(~telling)} more are too ill-conditioned to count" if not telling.all() else ""
        note = (
            f"{broken.sum()} of {len(values)} observations exceed their tolerance; worst |value| {values[worst]:.2g} "
            f"against {tolerances[worst]:.2g}, largest tolerance {tolerances.max():.2g}{apart}"
        )
        return Settled(not broken.any(), float(values[worst]), note, _largest(share, seeds))


@dataclass(frozen=True)
class Always(Observed):
    """Every observation lies on one side of a bound or on it: a single one beyond refutes, whatever the others.

    It is the rule of what a theorem says of every step, sample or run, and with the opposite bound of what never
    happens. No finite number of seeds proves it: the verdict tells how often it can be violated at most.
    """

    direction: Direction
    bound: float

    def __post_init__(self) -> None:
        _check_direction(self.direction)
        _check_bound(self.bound)

    estimand: ClassVar[str] = "the worst observation of a seed"

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return _side(self.direction, self.bound)

    def __str__(self) -> str:
        return f"value {'≤' if self.direction == 'less' else '≥'} {self.bound:g} at every observation"

    def settle(self, estimate: pd.DataFrame) -> Settled:  # noqa: D102
        sign = 1.0 if self.direction == "less" else -1.0
        values = estimate["value"].to_numpy(dtype=float)
        beyond = sign * (values - self.bound)
        violated = beyond > 0
        seeds, hurt = estimate["seed"].nunique(), estimate.loc[violated, "seed"].nunique()
        worst = int(np.argmax(beyond))
        note = (
            f"{violated.sum()} violations in {len(estimate)} observations, at {hurt} of {seeds} seeds: "
            f"at most {100 * upper_rate(hurt, seeds):.2g} % of all seeds, at 95 % confidence"
        )
        by_seed = tuple(sign * value for value in _largest(sign * values, estimate["seed"].to_numpy()))
        return Settled(not violated.any(), float(values[worst]), note, by_seed)


@dataclass(frozen=True)
class Tested(Rule):
    """A rule that is a test over seeds."""

    each: ClassVar[bool] = False
    sides: ClassVar[int] = 2
    """How many one-sided tails the interval of a refutation leaves out."""

    @abstractmethod
    def evidence(self, estimate: pd.DataFrame) -> Evidence:
        """What the estimate at two seeds or more says.

        Raises:
            Unfit: the rule says nothing of such values.
        """

    def with_margin(self, factor: float) -> "Tested | None":  # noqa: ARG002
        """The rule with so many times its margin; None if it has none."""
        return None

    @abstractmethod
    def p_values(self, evidence: Evidence) -> PValues:
        """p-values of support, whose null hypothesis is that the claim is false, and of refutation, that it is true."""


@dataclass(frozen=True)
class OneValue(Tested):
    """A test of one value per seed."""

    def evidence(self, estimate: pd.DataFrame) -> Evidence:  # noqa: D102
        return self.evidence_of(estimate["value"].to_numpy(dtype=float))

    @abstractmethod
    def evidence_of(self, values: Float[np.ndarray, " seeds"]) -> Evidence:
        """What the values of two seeds or more say.

        Raises:
            Unfit: the rule says nothing of such values.
        """


@dataclass(frozen=True)
class Located(OneValue):
    """A rule on a location over seeds.

    Attributes:
        centre: The mean, of values that are symmetrically distributed or nearly so; the geometric mean, of positive
            ones such as ratios, residuals and errors; or the median.
    """

    _: KW_ONLY
    centre: Centre

    @property
    def estimand(self) -> str:  # noqa: D102
        return self.centre

    @property
    def logarithmic(self) -> bool:  # noqa: D102
        return self.centre == "geometric mean"

    def evidence_of(self, values: Float[np.ndarray, " seeds"]) -> Evidence:  # noqa: D102
        return located(self.centre, values)


@dataclass(frozen=True)
class Inequality(Located):
    """A location over seeds is less or greater than ``bound``; refuted if the opposite is significant.

    Attributes:
        direction: On which side.
        bound: Of what.
    """

    direction: Direction
    bound: float

    def __post_init__(self) -> None:
        _check_direction(self.direction)
        _check_bound(self.bound)
        _check_centre(self.centre)
        if self.centre == "geometric mean" and self.bound <= 0:
            raise ValueError(f"a geometric mean is positive: a bound of {self.bound} says nothing of it")

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return _side(self.direction, self.bound)

    def with_margin(self, factor: float) -> "Inequality | None":  # noqa: D102
        return replace(self, bound=factor * self.bound) if self.bound else None

    def __str__(self) -> str:
        return f"{self.centre} {'<' if self.direction == 'less' else '>'} {self.bound:g}"

    def p_values(self, evidence: Evidence) -> PValues:  # noqa: D102
        return _p_values_of_side(evidence, self.direction, self.bound)


@dataclass(frozen=True)
class Equivalence(Located):
    """A location over seeds equals ``target`` up to ``margin`` (> 0), in the unit of the estimate.

    Supported if it lies inside target ± margin (the larger of two one-sided p-values, TOST), refuted if it lies outside
    (twice the smaller of the two beyond the ends, because it may leave on either side).
    """

    target: float
    margin: float
    sides: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(
                f"an equivalence needs a finite target and a margin > 0, got {self.target} ± {self.margin}"
            )
        _check_centre(self.centre)
        if self.centre == "geometric mean" and self.target <= self.margin:
            raise ValueError(f"a geometric mean is positive: {self.target} ± {self.margin} reaches to 0 or below")

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return self.target - self.margin, self.target + self.margin

    def with_margin(self, factor: float) -> "Equivalence | None":  # noqa: D102
        margin = factor * self.margin
        return None if self.centre == "geometric mean" and margin >= self.target else replace(self, margin=margin)

    def __str__(self) -> str:
        return f"{self.centre} = {self.target:g} ± {self.margin:g}"

    def p_values(self, evidence: Evidence) -> PValues:  # noqa: D102
        low, high = self.target - self.margin, self.target + self.margin
        inside = max(evidence.above(low), evidence.below(high))
        return inside, min(1.0, 2 * min(evidence.below(low), evidence.above(high)))


@dataclass(frozen=True)
class Share(OneValue):
    """The share of seeds with a property (values 1 and 0) is less or greater than ``bound``, by the binomial test."""

    direction: Direction
    bound: float

    def __post_init__(self) -> None:
        _check_direction(self.direction)
        if not 0 < self.bound < 1:
            raise ValueError(f"the bound of a share lies between 0 and 1, got {self.bound}")

    estimand: ClassVar[str] = "share of seeds"

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return _side(self.direction, self.bound)

    def __str__(self) -> str:
        return f"share of seeds {'<' if self.direction == 'less' else '>'} {self.bound:g}"

    def evidence_of(self, values: Float[np.ndarray, " seeds"]) -> Evidence:  # noqa: D102
        if not np.isin(values, (0.0, 1.0)).all():
            raise Unfit(f"a share needs 0 or 1 at each seed, got {values[~np.isin(values, (0.0, 1.0))][0]:g}")
        return BinomialTest(int(values.sum()), len(values), self.bound, self.direction == "less")

    def p_values(self, evidence: Evidence) -> PValues:  # noqa: D102
        return _p_values_of_side(evidence, self.direction, self.bound)


@dataclass(frozen=True)
class Wins(OneValue):
    """A difference that is paired by seed is negative (or positive) at more than half of all seeds, by the sign test.

    A tie speaks for neither side.
    """

    direction: Direction
    estimand: ClassVar[str] = "median difference, paired by seed"

    def __post_init__(self) -> None:
        _check_direction(self.direction)

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return _side(self.direction, 0.0)

    def __str__(self) -> str:
        return (
            f"difference {'< 0' if self.direction == 'less' else '> 0'} at more than half of all seeds, paired by seed"
        )

    def evidence_of(self, values: Float[np.ndarray, " seeds"]) -> Evidence:  # noqa: D102
        won = int(np.sum(values < 0 if self.direction == "less" else values > 0))
        ties = int(np.sum(values == 0))
        return SignTest(values, f"{won} wins, {len(values) - won - ties} losses, {ties} ties")

    def p_values(self, evidence: Evidence) -> PValues:  # noqa: D102
        return _p_values_of_side(evidence, self.direction, 0.0)


@dataclass(frozen=True)
class Spread(Tested):
    """The means of several arms, all measured at every seed, lie more than ``margin`` apart, the largest minus the smallest.

    Attributes:
        across: The column that names the arm.
        margin: By how much at least (0: apart at all, by permutation, which nothing refutes).
    """

    across: str
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"the margin of a spread is finite and at least 0, got {self.margin}")

    @property
    def keys(self) -> tuple[str, ...]:  # noqa: D102
        return ("seed", self.across)

    @property
    def estimand(self) -> str:  # noqa: D102
        return f"largest minus smallest mean over {self.across}"

    @property
    def region(self) -> tuple[float, float]:  # noqa: D102
        return _side("greater", self.margin)

    def with_margin(self, factor: float) -> "Spread | None":  # noqa: D102
        return replace(self, margin=factor * self.margin) if self.margin else None

    def __str__(self) -> str:
        return f"{self.estimand} > {self.margin:g}"

    def evidence(self, estimate: pd.DataFrame) -> Evidence:  # noqa: D102
        table = estimate.pivot_table("value", "seed", self.across)
        if table.shape[1] < 2:
            raise Unfit(f"a spread needs two values of {self.across} at least")
        if table.isna().to_numpy().any():
            raise Unfit(f"a spread needs every {self.across} at every seed")
        return ArmsTest(table.to_numpy(dtype=float))

    def p_values(self, evidence: Evidence) -> PValues:  # noqa: D102
        refutation = evidence.below(self.margin) if self.margin > 0 else 1.0
        return evidence.above(self.margin), refutation


def _side(direction: Direction, bound: float) -> tuple[float, float]:
    """Everything on one side of a bound."""
    return (-math.inf, bound) if direction == "less" else (bound, math.inf)


def _p_values_of_side(evidence: Evidence, direction: Direction, bound: float) -> PValues:
    """p-values of support and refutation of what lies on one side of a bound."""
    below, above = evidence.below(bound), evidence.above(bound)
    return (below, above) if direction == "less" else (above, below)


def _largest(values: Float[np.ndarray, " rows"], seeds: np.ndarray) -> tuple[float, ...]:
    """The largest value of each seed, in their order."""
    return tuple(float(values[seeds == seed].max()) for seed in np.unique(seeds))


def _check_direction(direction: str) -> None:
    if direction not in ("less", "greater"):
        raise ValueError(f"a direction is 'less' or 'greater', got {direction!r}")


def _check_centre(centre: str) -> None:
    if centre not in get_args(Centre):
        raise ValueError(unknown("centre", centre, get_args(Centre)))


def _check_bound(bound: float) -> None:
    if not math.isfinite(bound):
        raise ValueError(f"a bound is finite, got {bound}")
