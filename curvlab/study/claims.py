"""A claim is a statement that can fail, fixed in code before the run, and a verdict is what became of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd

from curvlab.study.cells import Cell, matches, phrase
from curvlab.study.estimates import Estimate, by_seed, identities

Outcome = Literal["supported", "refuted", "inconclusive", "outside the assumptions", "not measured"]
Likely = Literal["supported", "refuted", "open"]
Quantities = str | tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """Holds to round-off: |value| ≤ tolerance for every observation of some quantities, refuted by a single one that exceeds it.

    There is no p-value. The tolerance is a column of the estimate, because it follows from the condition
    number of what was solved. An observation within a tolerance above ``coarsest``, in the unit of the estimate,
    speaks neither for the claim nor against it; the claim is inconclusive if all are of this sort.
    """

    quantities: Quantities
    coarsest: float = 0.01

    def __str__(self) -> str:
        return f"|value| ≤ its tolerance for every observation, tolerances up to {self.coarsest:g} counting as support"


@dataclass(frozen=True)
class Equivalence:
    """The mean over seeds equals ``target`` up to ``margin`` (> 0), in the unit of the estimate.

    Supported if the t-interval lies inside target ± margin (TOST), refuted if it lies wholly outside.
    """

    quantities: Quantities
    target: float
    margin: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(
                f"an equivalence needs a finite target and a margin > 0, got {self.target} ± {self.margin}"
            )

    def __str__(self) -> str:
        return f"mean = {self.target:g} ± {self.margin:g}"


@dataclass(frozen=True)
class Inequality:
    """The mean over seeds is less or greater than ``bound``; refuted if the opposite is significant."""

    quantities: Quantities
    direction: Literal["less", "greater"]
    bound: float

    def __post_init__(self) -> None:
        if self.direction not in ("less", "greater"):
            raise ValueError(f"the direction of an inequality is 'less' or 'greater', got {self.direction!r}")
        if not math.isfinite(self.bound):
            raise ValueError(f"an inequality needs a finite bound, got {self.bound}")

    def __str__(self) -> str:
        return f"mean {'<' if self.direction == 'less' else '>'} {self.bound:g}"


Rule = Identity | Equivalence | Inequality


@dataclass(frozen=True)
class Expected:
    """The verdict that the theory, or an earlier run, makes us expect, and why."""

    outcome: Likely
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome}, because {self.reason}"


def supported(reason: str) -> Expected:
    """The claim should hold."""
    return Expected("supported", reason)


def refuted(reason: str) -> Expected:
    """The claim should fail."""
    return Expected("refuted", reason)


def undecided(reason: str) -> Expected:
    """The claim is open: nobody knows. Python's own `open` has the word, so the function is called otherwise."""
    return Expected("open", reason)


def no_assumptions(measurements: pd.DataFrame) -> str | None:  # noqa: ARG001
    """The measurements are never outside the assumptions as a whole."""
    return None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, where it comes from, what is measured for it and how it is decided.

    Attributes:
        id: Short name without spaces, unique in its analysis.
        statement: What is claimed, in one sentence.
        rule: How it is decided, and on which quantities.
        source: Paper and theorem, equation or figure.
        measured: What is measured, in one sentence.
        expected: What its author expects: `supported`, `refuted` or open (`undecided`), each with the reason.
        at: Coordinates of the cells that it needs: a value, a tuple of those allowed, or a test of the value; they
            are cells of the claim's own experiment, unless ``experiment`` is among them. One of them failing makes the
            claim inconclusive; where the configuration plans none, it is not measured.
        estimate: Measurements → one row per seed with the columns ``seed`` and ``value``; for an `Identity`
            one row per observation with ``value`` and ``tolerance``. It gets only the rows of the cells and
            quantities that the claim declares, and must give a value for every seed among them. None is the mean
            over a seed's observations, and for an identity the observations themselves.
        assumptions: A sentence where the measurements together lie outside the claim's assumptions, else None. A single
            observation says so by its status, `curvlab.study.outside`.
        experiment: The experiment to which it belongs, which the analysis fills in.
    """

    id: str
    statement: str
    rule: Rule
    source: str
    measured: str
    expected: Expected
    at: Mapping[str, object] = field(default_factory=dict)
    estimate: Estimate | None = None
    assumptions: Callable[[pd.DataFrame], str | None] = no_assumptions
    experiment: str = ""

    def __post_init__(self) -> None:
        if not self.id or any(character.isspace() for character in self.id):
            raise ValueError(f"a claim's id is a word without spaces, got {self.id!r}")

    def of(self, experiment: str) -> "Claim":
        """The claim as one of an experiment."""
        return replace(self, experiment=experiment)

    @property
    def where(self) -> Mapping[str, object]:
        """Coordinates of the cells that it needs, the experiment among them."""
        return {"experiment": self.experiment, **self.at} if self.experiment else self.at

    @property
    def unplanned(self) -> str:
        """Why it is not measured where no cell is planned that it needs."""
        return f"the configuration plans no cell with {phrase(self.where)}"

    @property
    def quantities(self) -> tuple[str, ...]:
        """The quantities that its estimate reads."""
        return (self.rule.quantities,) if isinstance(self.rule.quantities, str) else self.rule.quantities

    def needs(self, cell: Cell) -> bool:
        """Whether it needs a cell."""
        return matches(cell, self.where)

    def estimated(self, measurements: pd.DataFrame) -> pd.DataFrame:
        """What it is decided on."""
        default = identities if isinstance(self.rule, Identity) else by_seed
        return (self.estimate or default)(measurements)


@dataclass(frozen=True)
class Failure:
    """A cell without measurements, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: The claim's id.
        outcome: Supported, refuted, inconclusive, outside the assumptions, or not measured at this configuration.
        estimate: Mean over seeds; for an identity the value that is largest against its tolerance.
        low: Lower end of the t-interval, at the level at which Holm's procedure tested the claim.
        high: Upper end.
        confidence: Confidence of that interval.
        seeds: Number of seeds.
        p_value: p-value of the test that was passed: for refutation if the claim is refuted, else for
            support.
        p_adjusted: The same after Holm's correction.
        note: What a reader has to know besides.

    Numbers that do not exist, such as the p-value of an identity, are NaN.
    """

    claim: str
    outcome: Outcome
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    confidence: float = math.nan
    seeds: int = 0
    p_value: float = math.nan
    p_adjusted: float = math.nan
    note: str = ""


def contradicts(claim: Claim, verdict: Verdict) -> bool:
    """Whether the verdict is the opposite of what the claim's author expected."""
    return {claim.expected.outcome, verdict.outcome} == {"supported", "refuted"}
