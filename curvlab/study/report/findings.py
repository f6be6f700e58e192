"""A finding is a claim with its verdict, read back from a results folder: all that reports tell of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from curvlab.study.claims import Group, Likely, Outcome, opposite
from curvlab.study.faults import UsageError
from curvlab.study.measurements import records


@dataclass(frozen=True)
class Finding:
    """A row of the verdicts: the fields of `Verdict`, then what the claim says, of what, and how it is decided.

    Numbers that do not exist are NaN; an open end of ``region``, in which the estimand lies if the claim holds, is infinite.
    """

    claim: str
    outcome: Outcome
    estimate: float
    low: float
    high: float
    confidence: float
    low_95: float
    high_95: float
    seeds: int
    scale: str
    values: tuple[float, ...]
    p_value: float
    p_adjusted: float
    detectable: str
    sensitivity: str
    note: str
    statement: str
    source: str
    measured: str
    group: Group
    given: str
    experiment: str
    varies: tuple[str, ...]
    cells: str
    quantities: tuple[str, ...]
    sort: str
    rule: str
    bound_from: str
    estimand: str
    region: tuple[float, float]
    logarithmic: bool
    expected: Likely
    reason: str
    explored: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Finding":
        """The finding of a row of the verdicts.

        Raises:
            UsageError: an entry is missing, as in a results folder of an earlier version.
        """
        try:
            entries = {name: row[name] for name in cls.__annotations__}
        except KeyError as missing:
            raise UsageError(
                f"the verdicts have no {missing}: another version of curvlab wrote them; run the analysis again"
            ) from missing
        numbers = {name: _number(entries[name]) for name, hint in cls.__annotations__.items() if hint is float}
        several = {name: tuple(entries[name]) for name in ("varies", "quantities")}
        # JSON has no infinity, which is what anything takes of a tolerance of zero.
        several["values"] = tuple(math.inf if value is None else value for value in entries["values"])
        low, high = entries["region"]
        region = (-math.inf if low is None else low, math.inf if high is None else high)
        return cls(**entries | numbers | several | {"region": region})

    @property
    def contradicted(self) -> bool:
        """Whether the verdict is the opposite of what was expected."""
        return opposite(self.expected, self.outcome)

    @property
    def awaited(self) -> bool:
        """Whether a verdict was expected and there is none yet."""
        return self.outcome == "inconclusive" and self.expected != "open"

    @property
    def by_seed(self) -> tuple[float, ...]:
        """One value per seed in the unit of the estimand: of a spread, how far its arms lie apart at the seed."""
        if self.sort != "Spread" or not self.seeds:
            return self.values
        return tuple(float(spread) for spread in np.ptp(np.reshape(self.values, (self.seeds, -1)), axis=1))

    @property
    def effect(self) -> float:
        """The estimate in the unit of the estimand: of an identity, the largest share that is taken of a tolerance."""
        return max(self.values, default=math.nan) if self.sort == "Identity" else self.estimate

    @property
    def is_measured(self) -> bool:
        """Whether the configuration measures it."""
        return self.outcome != "not measured"


def _number(entry: float | None) -> float:
    return math.nan if entry is None else float(entry)


def findings(verdicts: pd.DataFrame) -> list[Finding]:
    """One finding per claim, in their order.

    Raises:
        UsageError: the verdicts are those of an earlier version.
    """
    return [Finding.of(row) for row in records(verdicts)]


def in_group(found: Sequence[Finding], group: Group) -> list[Finding]:
    """The findings of a group that were measured."""
    return [finding for finding in found if finding.group == group and finding.is_measured]


def not_measured(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The claims that are not measured at a configuration, by reason."""
    apart: dict[str, list[Finding]] = {}
    for finding in found:
        if not finding.is_measured:
            apart.setdefault(finding.note, []).append(finding)
    return apart
