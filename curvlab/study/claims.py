"""A claim is a statement that can fail, fixed in code before the run, and a verdict is what became of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from curvlab.study.cells import Cell

Outcome = Literal["supported", "refuted", "inconclusive", "outside the assumptions"]
Expectation = Literal["supported", "refuted", "open"]


@dataclass(frozen=True)
class Identity:
    """Holds to round-off: |value| ≤ tolerance for every observation, refuted by a single one that exceeds it.

    There is no p-value. The tolerance is a column of the estimate, because it follows from the condition
    number of what was solved. An observation within a tolerance above ``coarsest``, in the unit of the estimate,
    speaks neither for the claim nor against it; the claim is inconclusive if all are of this sort.
    """

    coarsest: float = 0.01

    def __str__(self) -> str:
        return f"|value| ≤ its tolerance for every observation, tolerances up to {self.coarsest:g} counting as support"


@dataclass(frozen=True)
class Equivalence:
    """The mean over seeds equals ``target`` up to ``margin`` (> 0), in the unit of the estimate.

    Supported if the t-interval lies inside target ± margin (TOST), refuted if it lies wholly outside.
    """

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

    bound: float
    direction: Literal["less", "greater"]

    def __post_init__(self) -> None:
        if not math.isfinite(self.bound):
            raise ValueError(f"an inequality needs a finite bound, got {self.bound}")

    def __str__(self) -> str:
        return f"mean {'<' if self.direction == 'less' else '>'} {self.bound:g}"


Rule = Identity | Equivalence | Inequality


def no_assumptions(measurements: pd.DataFrame) -> str | None:  # noqa: ARG001
    """The data are never outside the assumptions."""
    return None


def every_cell(cell: Cell) -> bool:  # noqa: ARG001
    """The claim needs every cell."""
    return True


@dataclass(frozen=True)
class Claim:
    """A statement, where it comes from, what is measured for it and how it is decided.

    Attributes:
        id: Short name without spaces, unique in its analysis.
        statement: What is claimed, in one sentence.
        source: Paper and theorem, equation or figure.
        measured: What is measured, in one sentence.
        rule: How it is decided.
        estimate: Measurements → one row per seed with the columns ``seed`` and ``value``; for an `Identity`
            one row per observation with ``value`` and ``tolerance``. It gets only the rows of the cells and
            quantities that the claim declares, and must give a value for every seed among them.
        expected: The verdict that the theory, or an earlier run, makes us expect.
        reason: Why that is expected.
        assumptions: A sentence where the measurements lie outside the claim's assumptions, else None.
        needs: Which cells the claim needs; one of them failing makes it inconclusive.
        quantities: The quantities that the estimate reads; empty for all of them.
    """

    id: str
    statement: str
    source: str
    measured: str
    rule: Rule
    estimate: Callable[[pd.DataFrame], pd.DataFrame]
    expected: Expectation
    reason: str
    assumptions: Callable[[pd.DataFrame], str | None] = no_assumptions
    needs: Callable[[Cell], bool] = every_cell
    quantities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id or any(character.isspace() for character in self.id):
            raise ValueError(f"a claim's id is a word without spaces, got {self.id!r}")


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
        outcome: Supported, refuted, inconclusive or outside the assumptions.
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
    return {claim.expected, verdict.outcome} == {"supported", "refuted"}
