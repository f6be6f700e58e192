"""A claim is a statement that can fail, fixed in code before the run, and a verdict is what became of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd

from curvlab.study.cells import Cell, matches, phrase
from curvlab.study.estimates import Estimate
from curvlab.study.statistics.rules import Rule
from curvlab.tools.text import unknown

Outcome = Literal["supported", "refuted", "inconclusive", "outside the assumptions", "not measured"]
Likely = Literal["supported", "refuted", "open"]
Group = Literal["self-check", "paper", "derived", "exploration"]
GROUPS: dict[Group, str] = {
    "paper": "claims of the paper",
    "derived": "claims derived from the paper",
    "exploration": "explorations beyond the paper",
    "self-check": "checks of the code against itself",
}
"""The groups of claims, in the order of a report, each a family of its own."""


@dataclass(frozen=True)
class Expected:
    """The verdict that the theory, or an earlier run, makes us expect, and why.

    Attributes:
        outcome: The verdict.
        reason: Why.
        explored: Number of seeds, from seed 0 on, that its author had seen; the claim is never judged with them.
    """

    outcome: Likely
    reason: str
    explored: int = 0

    def __str__(self) -> str:
        seen = f" (set after seeds 0 to {self.explored - 1} were seen)" if self.explored else ""
        reason = f". {self.reason.rstrip('.')}" if self.reason else ""
        return f"{self.outcome}{reason}{seen}"


def supported(reason: str, *, explored: int = 0) -> Expected:
    """The claim should hold."""
    return Expected("supported", reason, explored)


def refuted(reason: str, *, explored: int = 0) -> Expected:
    """The claim should fail."""
    return Expected("refuted", reason, explored)


def undecided(reason: str, *, explored: int = 0) -> Expected:
    """The claim is open: nobody knows. Python's own `open` has the word, so the function is called otherwise."""
    return Expected("open", reason, explored)


def no_assumptions(measurements: pd.DataFrame) -> str | None:  # noqa: ARG001
    """The measurements are never outside the assumptions as a whole."""
    return None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, where it comes from, what is measured for it and how it is decided.

    Attributes:
        id: Short name without spaces, unique in its analysis.
        statement: What is claimed, in one sentence.
        rule: What it says of which quantities: the estimand, and how it is decided.
        group: A claim of the paper, one derived from it, an exploration, or a check of the code. Groups are families of
            their own: the correction for many claims runs within one.
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
        bound_from: Where the rule's margin or bound comes from, such as an equation. A margin without a source is one of
            many: the verdict then tells what it would be at half and at twice that.
        given: The id of a claim without which this one has no meaning: it is decided only if that one is supported.
        experiment: The experiment to which it belongs, which the analysis fills in.
        varies: What a seed varies in that experiment, which the analysis fills in.
    """

    id: str
    statement: str
    rule: Rule
    source: str
    measured: str
    expected: Expected
    group: Group
    at: Mapping[str, object] = field(default_factory=dict)
    estimate: Estimate | None = None
    assumptions: Callable[[pd.DataFrame], str | None] = no_assumptions
    bound_from: str = ""
    given: str = ""
    experiment: str = ""
    varies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id or any(character.isspace() for character in self.id):
            raise ValueError(f"a claim's id is a word without spaces, got {self.id!r}")
        if self.group not in GROUPS:
            raise ValueError(unknown(f"group of claim {self.id}", self.group, GROUPS))

    def of(self, experiment: str, varies: tuple[str, ...]) -> "Claim":
        """The claim as one of an experiment."""
        return replace(self, experiment=experiment, varies=varies)

    @property
    def where(self) -> Mapping[str, object]:
        """Coordinates of the cells that it needs, the experiment among them."""
        return {"experiment": self.experiment, **self.at} if self.experiment else self.at

    @property
    def unplanned(self) -> str:
        """Why it is not measured where no cell is planned that it needs."""
        return f"the configuration plans no cell with {phrase(self.where)}"

    def needs(self, cell: Cell) -> bool:
        """Whether it needs a cell."""
        return matches(cell, self.where)

    def reads(self, measurements: pd.DataFrame, cells: Sequence[Cell] | None) -> pd.DataFrame:
        """The observations of the quantities and cells that it declares.

        Args:
            measurements: In long form.
            cells: Those of the measurements; None if every row belongs to every claim.
        """
        rows = measurements
        if cells is not None and self.where:
            rows = rows[rows["cell"].isin([cell.key for cell in cells if self.needs(cell)])]
        return rows[rows["quantity"].isin(self.rule.names)]

    def estimated(self, measurements: pd.DataFrame) -> pd.DataFrame:
        """What it is decided on."""
        return (self.estimate or self.rule.reduced)(measurements)


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
        estimate: Of the estimand; of an identity the value that is largest against its tolerance.
        low: Lower end of the interval, at the level at which Holm's procedure tested the claim.
        high: Upper end.
        confidence: Confidence of that interval.
        low_95: Lower end of the interval of 95 %, without a correction.
        high_95: Upper end.
        seeds: Number of seeds that it stands on.
        scale: How the values are compared: by differences (linear), ratios (log), order (rank) or as successes (share).
        values: The value of each of them; of a spread, of each arm at each of them; of a rule without a test, what is
            worst at each of them (of an identity as a share of its tolerance).
        p_value: p-value of the test that was passed: for refutation if the claim is refuted, else for
            support.
        p_adjusted: The same after Holm's correction.
        detectable: The smallest effect that the test for support finds with a probability of 80 %, in words.
        sensitivity: What the verdict would be at half and at twice a margin that has no source, in words.
        note: What a reader has to know besides.

    Numbers that do not exist, such as the p-value of an identity, are NaN.
    """

    claim: str
    outcome: Outcome
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    confidence: float = math.nan
    low_95: float = math.nan
    high_95: float = math.nan
    seeds: int = 0
    scale: str = ""
    values: tuple[float, ...] = ()
    p_value: float = math.nan
    p_adjusted: float = math.nan
    detectable: str = ""
    sensitivity: str = ""
    note: str = ""


def contradicts(claim: Claim, verdict: Verdict) -> bool:
    """Whether the verdict is the opposite of what the claim's author expected."""
    return opposite(claim.expected.outcome, verdict.outcome)


def opposite(expected: Likely, outcome: Outcome) -> bool:
    """Whether an outcome is the opposite of an expected one."""
    return {expected, outcome} == {"supported", "refuted"}
