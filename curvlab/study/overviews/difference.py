"""What changed between two runs of an analysis, and whether the change is within the noise of their seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import fisher_exact, mannwhitneyu, ttest_ind_from_stats

from curvlab.study.faults import UsageError
from curvlab.study.overviews.standing import Run
from curvlab.study.preregistration import differing
from curvlab.study.report import Finding
from curvlab.study.statistics.evidence import SignTest, located
from curvlab.tools.text import number

SIGNIFICANT = 0.05
APART = frozenset({"started", "run", "measured_since", "command", "program", "claims", "fingerprint", "preregistered"})
"""Entries of the environment that differ between any two runs, or follow from the options and the claims."""
PARTS = ("statement", "rule", "bound_from", "cells", "estimand", "group", "given", "varies", "expected", "reason")
"""Entries of a finding in which a claim itself can differ."""
Values = Float[np.ndarray, " seeds"]


@dataclass(frozen=True)
class Change:
    """A claim in two runs.

    Attributes:
        claim: Its id.
        before: Its finding in the first run; None if it has none there.
        after: The same in the second.
        reworded: In what the claim itself is another, in words.
        same: Whether its values are the same at every seed, up to round-off.
        p_value: Of no difference between the values of the two runs; NaN where they cannot be compared.
    """

    claim: str
    before: Finding | None
    after: Finding | None
    reworded: tuple[str, ...]
    same: bool
    p_value: float

    @property
    def decided_otherwise(self) -> bool:
        """Whether its verdict is another, or only one run has it."""
        return (self.before and self.before.outcome) != (self.after and self.after.outcome)


@dataclass(frozen=True)
class Difference:
    """Two runs side by side.

    Attributes:
        changes: One per claim of either run.
        options: Options that differ, each with both values.
        environment: Versions, commits, data and hardware that differ, each with both values.
    """

    changes: list[Change]
    options: dict[str, tuple[object, object]]
    environment: dict[str, tuple[object, object]]

    @property
    def level(self) -> float:
        """The level at which a change is more than noise, so that 5 % is the chance of one among all that are compared."""
        return SIGNIFICANT / max(1, sum(not math.isnan(change.p_value) for change in self.changes))

    def significant(self, change: Change) -> bool:
        """Whether a change is more than noise."""
        return change.p_value <= self.level

    @property
    def telling(self) -> list[Change]:
        """The claims that a reader has to look at: with another verdict, with other words, or changed by more than noise."""
        return [c for c in self.changes if c.decided_otherwise or c.reworded or self.significant(c)]

    def words(self, change: Change) -> str:
        """What became of a claim."""
        if change.before is None or change.after is None:
            return "only in one run"
        if change.same:
            noise = "the same values"
        elif math.isnan(change.p_value):
            noise = "not compared"
        else:
            more = "more than" if self.significant(change) else "within"
            noise = f"{more} noise (p = {number(change.p_value, digits=2)})"
        return "; ".join([*([f"another claim: {', '.join(change.reworded)}"] if change.reworded else []), noise])


def difference(first: Run, second: Run) -> Difference:
    """Compare two runs of an analysis, claim by claim.

    The values of a claim are compared on its own scale: by Welch's t, of logarithms for a geometric mean, by Mann and
    Whitney's test where the order counts, or by Fisher's exact test for a share. Where both runs have the same seeds, the
    changes from seed to seed are tested as well (`located`, `SignTest`), and twice the smaller p-value counts. A spread is
    compared by how far its arms lie apart at each seed. An identity holds up to round-off, which is not compared.

    Raises:
        UsageError: they are runs of different analyses.
    """
    if first.analysis != second.analysis:
        raise UsageError(f"these are runs of different analyses, {first.analysis} and {second.analysis}")
    before, after = ({finding.claim: finding for finding in run.findings} for run in (first, second))
    facts = [_flat({n: e for n, e in run.results.environment.items() if n not in APART}) for run in (first, second)]
    known = [run.results.environment.get("claims") or {} for run in (first, second)]
    paired = first.results.config.get("first_seed") == second.results.config.get("first_seed")
    return Difference(
        changes=[
            _change(name, before.get(name), after.get(name), [one.get(name) for one in known], paired)
            for name in dict.fromkeys([*before, *after])
        ],
        options=differing(first.results.config, second.results.config),
        environment=differing(*facts),
    )


def _change(claim: str, first: Finding | None, second: Finding | None, known: list[str | None], paired: bool) -> Change:
    if first is None or second is None:
        return Change(claim, first, second, (), False, math.nan)
    reworded = tuple(part.replace("_", " ") for part in PARTS if getattr(first, part) != getattr(second, part))
    if not reworded and None not in known and known[0] != known[1]:
        reworded = ("what is computed for it",)
    one, other = (np.asarray(finding.by_seed, dtype=float) for finding in (first, second))
    same = len(one) == len(other) > 0 and np.allclose(one, other, rtol=1e-9, atol=0.0, equal_nan=True)
    comparable = first.sort == second.sort != "Identity" and min(len(one), len(other)) >= 2
    if not comparable or not np.isfinite([*one, *other]).all():
        p_value = math.nan
    elif same:
        p_value = 1.0
    else:
        scale = first.scale if first.scale == second.scale != "" else "rank"
        p_value = _unpaired(scale, one, other)
        if paired and first.explored == second.explored and len(one) == len(other):
            p_value = min(1.0, 2 * min(p_value, _paired(scale, one, other)))
    return Change(claim, first, second, reworded, same, p_value)


def _paired(scale: str, first: Values, second: Values) -> float:
    """p-value of no difference between values that belong together, one by one."""
    change = _scaled(scale, second) - _scaled(scale, first)
    evidence = located("mean", change) if scale in ("linear", "log") else SignTest(change[change != 0])
    return min(1.0, 2 * evidence.below(0.0), 2 * evidence.above(0.0))


def _unpaired(scale: str, first: Values, second: Values) -> float:
    """p-value of no difference between the values of different seeds."""
    if scale == "share":
        return float(fisher_exact(np.array([[part.sum(), len(part) - part.sum()] for part in (first, second)])).pvalue)
    values = [_scaled(scale, part) for part in (first, second)]
    moments = [(part.mean(), part.std(ddof=1), len(part)) for part in values]
    if scale == "rank" or all(deviation == 0 for _, deviation, _ in moments):
        return float(mannwhitneyu(first, second).pvalue)
    return float(ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False).pvalue)


def _scaled(scale: str, values: Values) -> Values:
    """Values as they are compared: of a log scale the logarithms."""
    return np.log(values) if scale == "log" else values


def _flat(entries: Mapping[str, Any], group: str = "") -> dict[str, object]:
    """Nested entries by names such as ``packages.torch``."""
    found: dict[str, object] = {}
    for name, entry in entries.items():
        found |= _flat(entry, f"{group}{name}.") if isinstance(entry, Mapping) else {f"{group}{name}": entry}
    return found
