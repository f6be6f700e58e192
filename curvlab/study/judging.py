"""The judge: claims and measurements in, verdicts out.

A claim that is tested is decided together with its group; `curvlab.study.statistics.decision` states the rule, by which
the chance that any true claim of a group is refuted is at most 5 %, and so is the chance that any false one is
supported. `Identity` and `Always` have no p-value and are outside that family: one observation refutes them.

Nothing is dropped in silence. The estimate sees only the cells and quantities that its claim declares; a
failed cell, a value that is not finite or a seed without an estimate makes the claim inconclusive, with that
as its note. Seeds that the author of an expectation had seen do not count.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from curvlab.study.cells import Cell
from curvlab.study.claims import Claim, Failure, Outcome, Verdict
from curvlab.study.measurements import OUTSIDE, faults, is_outside, locate, records
from curvlab.study.statistics.decision import Decision, decide
from curvlab.study.statistics.evidence import Evidence
from curvlab.study.statistics.multiplicity import Looks
from curvlab.study.statistics.rules import Observed, Tested, Unfit

log = logging.getLogger(__name__)


class _Undecidable(Exception):
    """Why a claim cannot be decided on the measurements at hand."""


class _Outside(Exception):
    """Why a claim says nothing of the measurements at hand."""


class _Explored(Exception):
    """Why the measurements at hand are not to be judged with."""


@dataclass(frozen=True)
class _Case:
    """A claim before its family is decided.

    Attributes:
        claim: The claim.
        verdicts: Its verdict at each look, as far as it does not depend on its family.
        evidence: What there is to be tested at each look; None where there is nothing.
        counts: Whether it is one of its family.
    """

    claim: Claim
    verdicts: tuple[Verdict, ...]
    evidence: tuple[Evidence | None, ...] = (None,)
    counts: bool = True


def judge(
    claims: Sequence[Claim],
    measurements: pd.DataFrame,
    failures: Sequence[Failure] = (),
    level: float = 0.05,
    *,
    planned: Sequence[Cell] | None = None,
    left_out: Sequence[Cell] = (),
    looks: Looks | None = None,
) -> list[Verdict]:
    """One verdict per claim, in the order of the claims; `curvlab.study.statistics.decision` states the rule.

    Args:
        claims: The family, and claims that no planned cell serves, which are not measured and in no family.
        measurements: In long form (`curvlab.study.measurements`). Without a ``cell`` column every row belongs
            to every claim.
        failures: Cells without measurements; claims that need one become inconclusive.
        level: Family-wise error level of support and of refutation, for each group of claims.
        planned: All cells that were to be measured; None if nothing was planned.
        left_out: Cells that were not to be measured this time; claims that need one are not measured, but count.
        looks: When a sequential run looks; None if it looks once, at all seeds.
    """
    admitted = None if planned is None else [*planned, *left_out]
    wanted = [claim for claim in claims if admitted is None or any(claim.needs(cell) for cell in admitted)]
    cells = [Cell.from_key(key) for key in measurements["cell"].unique()] if "cell" in measurements else None
    cases = []
    for claim in wanted:
        case = _without(claim, left_out)
        if case is None and looks is not None:
            case = _examine_looks(claim, measurements, cells, failures, looks, planned or ())
        cases.append(case or _examine(claim, measurements, cells, failures))
    found: dict[str, Verdict] = {}
    for group in dict.fromkeys(claim.group for claim in wanted):
        found |= _decided([case for case in cases if case.claim.group == group], level, looks)
    verdicts = {c.id: found.get(c.id) or Verdict(c.id, "not measured", note=c.unplanned) for c in claims}
    known = {claim.id: claim for claim in claims}
    return [_gated(claim, known, verdicts) for claim in claims]


def wants_seeds(claim: Claim, verdict: Verdict, level: float = 0.05) -> bool:
    """Whether more seeds can decide a claim: its own test, that is, whatever becomes of one that gives it its meaning."""
    tested = isinstance(claim.rule, Tested) and verdict.outcome == "inconclusive" and verdict.seeds > 0
    return tested and not verdict.p_adjusted <= level


def _decided(cases: Sequence[_Case], level: float, looks: Looks | None) -> dict[str, Verdict]:
    """The verdicts of one group."""
    tests = [(case, case.claim.rule) for case in cases if isinstance(case.claim.rule, Tested)]
    counted = [(case, rule) for case, rule in tests if case.counts]
    decisions = decide([(rule, case.evidence) for case, rule in counted], level, looks)
    verdicts = {case.claim.id: case.verdicts[-1] for case in cases}
    for (case, rule), decision in zip(counted, decisions, strict=True):
        if decision and (decision.supported is not None or case.evidence[-1] is not None):
            margins = "" if case.claim.bound_from else _sensitivity(rule, decision)
            verdicts[case.claim.id] = _tested(replace(case.verdicts[decision.look], sensitivity=margins), decision)
    return verdicts


OUTCOMES: dict[bool | None, Outcome] = {True: "supported", False: "refuted", None: "inconclusive"}


def _tested(verdict: Verdict, decision: Decision) -> Verdict:
    """The verdict of a claim, with what was decided."""
    evidence = decision.evidence
    low_95, high_95 = evidence.interval(0.95)
    decided = replace(
        verdict,
        outcome=OUTCOMES[decision.supported],
        estimate=evidence.estimate,
        low=decision.low,
        high=decision.high,
        confidence=decision.confidence,
        low_95=low_95,
        high_95=high_95,
        seeds=evidence.seeds,
        scale=evidence.scale,
        p_value=decision.p_value,
        p_adjusted=decision.p_adjusted,
        detectable=decision.detectable,
    )
    return _noted(decided, evidence.note)


def _sensitivity(rule: Tested, decision: Decision) -> str:
    """The verdicts at half and twice the margin, in words; empty without a margin."""
    found = []
    for factor, words in ((0.5, "half"), (2.0, "twice")):
        if (other := rule.with_margin(factor)) is not None:
            found.append(f"{OUTCOMES[decision.outcome(other.p_values(decision.evidence))]} at {words} the margin")
    return ", ".join(found)


def _gated(claim: Claim, known: Mapping[str, Claim], verdicts: Mapping[str, Verdict]) -> Verdict:
    """The verdict of a claim, unless another does not hold without which it has no meaning."""
    verdict = verdicts[claim.id]
    if claim.given not in known or verdict.outcome == "not measured":
        return verdict
    gate = _gated(known[claim.given], known, verdicts)
    if gate.outcome == "supported":
        return verdict
    meaningless = gate.outcome in ("refuted", "outside the assumptions")
    outcome: Outcome = "outside the assumptions" if meaningless else "inconclusive"
    return _noted(
        replace(verdict, outcome=outcome), f"it has a meaning only if {gate.claim} holds, which is {gate.outcome}"
    )


def _examine(
    claim: Claim,
    measurements: pd.DataFrame,
    cells: Sequence[Cell] | None,
    failures: Sequence[Failure],
) -> _Case:
    """Everything about a claim that does not depend on the other claims."""
    try:
        rows, left_out = _inside(_unexplored(claim, _select(claim, measurements, cells, failures)))
        if (reason := claim.assumptions(rows)) is not None:
            raise _Outside(reason)
        _check_finite(rows)
        estimate = claim.estimated(rows)
        _check_estimate(claim, estimate, rows)
        rule = claim.rule
        if isinstance(rule, Observed):
            return _settled(claim, rule, estimate, left_out)
        if isinstance(rule, Tested):
            return _to_test(claim, rule, estimate, left_out)
        raise TypeError(f"a rule is Observed or Tested, claim {claim.id} has a {type(rule).__name__}")
    except _Explored as reason:
        return _Case(claim, (Verdict(claim.id, "not measured", note=str(reason)),), counts=False)
    except _Outside as reason:
        return _Case(claim, (Verdict(claim.id, "outside the assumptions", note=str(reason)),))
    except (_Undecidable, Unfit) as reason:
        return _Case(claim, (Verdict(claim.id, "inconclusive", note=str(reason)),))
    except Exception as error:
        log.exception("claim %s cannot be judged", claim.id)
        note = f"its assumptions or its estimate raised {type(error).__name__}: {error}"
        return _Case(claim, (Verdict(claim.id, "inconclusive", note=note),))


def _examine_looks(
    claim: Claim,
    measurements: pd.DataFrame,
    cells: Sequence[Cell] | None,
    failures: Sequence[Failure],
    looks: Looks,
    planned: Sequence[Cell],
) -> _Case:
    """The same for a sequential run, look after look, as far as the claim was measured."""
    partial = _partial_seeds(claim, looks, planned)
    cases: list[_Case] = []
    for look in range(len(looks.seeds)):
        hidden = partial if isinstance(claim.rule, Observed) else partial | {*looks.after(look)}
        rows = measurements[~measurements["seed"].isin(hidden)]
        case = _examine(claim, rows, cells, [failure for failure in failures if failure.cell["seed"] not in hidden])
        if not isinstance(claim.rule, Tested) or not case.counts:
            return case
        if cases and case.evidence[0] is not None and case.verdicts[0].seeds <= cases[-1].verdicts[0].seeds:
            break
        cases.append(case)
    verdicts, evidence = zip(*((case.verdicts[0], case.evidence[0]) for case in cases), strict=True)
    return _Case(claim, verdicts, evidence)


def _partial_seeds(claim: Claim, looks: Looks, planned: Sequence[Cell]) -> set[int]:
    """The seeds at which only a part of what a claim needs is planned, for the sake of other claims.

    There are none for a claim about every single observation.
    """
    if isinstance(claim.rule, Observed) and claim.estimate is None:
        return set()
    counts = Counter(int(cell["seed"]) for cell in planned if claim.needs(cell))
    later = looks.after(0)
    most = max((count for seed, count in counts.items() if seed in range(looks.first, later.start)), default=0)
    return {seed for seed, count in counts.items() if seed in later and count < most}


def _without(claim: Claim, left_out: Sequence[Cell]) -> _Case | None:
    """The case of a claim that needs a cell which was left out; None if it needs none."""
    cell = next((cell for cell in left_out if claim.needs(cell)), None)
    if cell is None:
        return None
    note = f"--experiments leaves out {cell['experiment']}; it counts as undecided"
    return _Case(claim, (Verdict(claim.id, "not measured", note=note),))


def _settled(claim: Claim, rule: Observed, estimate: pd.DataFrame, left_out: str) -> _Case:
    """The case of a claim that has to hold at every observation."""
    settled = rule.settle(estimate)
    outcome: Outcome = "supported" if settled.holds else "refuted"
    seeds = int(estimate["seed"].nunique())
    verdict = Verdict(claim.id, outcome, settled.estimate, seeds=seeds, values=settled.values, note=settled.note)
    return _Case(claim, (_noted(verdict, left_out),))


def _to_test(claim: Claim, rule: Tested, estimate: pd.DataFrame, left_out: str) -> _Case:
    """The case of a claim that is tested with its family."""
    estimate = estimate.sort_values("seed", kind="stable")
    values = tuple(float(value) for value in estimate["value"])
    verdict = Verdict(claim.id, "inconclusive", seeds=estimate["seed"].nunique(), values=values, note=left_out)
    if verdict.seeds < 2:
        alone = replace(verdict, estimate=values[0] if len(values) == 1 else math.nan)
        return _Case(claim, (_noted(alone, "one seed has no interval; run with --seeds 2 or more"),))
    return _Case(claim, (verdict,), (rule.evidence(estimate),))


def _noted(verdict: Verdict, note: str) -> Verdict:
    return replace(verdict, note="; ".join(part for part in (verdict.note, note) if part))


def _unexplored(claim: Claim, rows: pd.DataFrame) -> pd.DataFrame:
    """The observations of seeds that the author of the claim's expectation had not seen.

    Raises:
        _Explored: there is none.
    """
    explored = claim.expected.explored
    if not explored or "seed" not in rows:
        return rows
    kept = rows[~rows["seed"].between(0, explored - 1)]
    if kept.empty:
        raise _Explored(
            f"its expectation was set after seeds 0 to {explored - 1} were seen, which do not judge it: "
            "run with --first-seed 1000"
        )
    return kept


def _inside(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The observations within the assumptions, and in words those that are not.

    Raises:
        _Outside: none is.
    """
    apart = is_outside(rows)
    if not apart.any():
        return rows, ""
    reasons = rows.loc[apart, "status"].str.removeprefix(f"{OUTSIDE}: ").value_counts()
    text = "; ".join(f"{count} of {len(rows)} observations: {reason}" for reason, count in reasons.items())
    if apart.all():
        raise _Outside(text)
    return rows[~apart], f"outside the assumptions and left out: {text}"


def _select(
    claim: Claim, measurements: pd.DataFrame, cells: Sequence[Cell] | None, failures: Sequence[Failure]
) -> pd.DataFrame:
    """The rows that the claim declares: those of the cells that it needs and the quantities that it reads."""
    failed = [failure for failure in failures if claim.needs(failure.cell)]
    if failed:
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise _Undecidable(f"no measurement in cell {failed[0].cell}{others}: {failed[0].reason}")
    rows = claim.reads(measurements, cells)
    if rows.empty:
        raise _Undecidable("nothing was measured for it")
    return rows


def _check_finite(rows: pd.DataFrame) -> None:
    faulty = faults(rows)
    if faulty.any():
        others = f" (and {faulty.sum() - 1} more)" if faulty.sum() > 1 else ""
        raise _Undecidable(f"non-finite measurement: {locate(records(rows[faulty])[0])}{others}")


def _check_estimate(claim: Claim, estimate: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Refuse an estimate that would drop or repeat something in silence."""
    keys = list(claim.rule.keys)
    if missing := sorted({*claim.rule.columns, *keys} - set(estimate.columns)):
        raise ValueError(f"the estimate has no column {' and no column '.join(missing)}")
    if estimate.empty:
        raise _Undecidable("its estimate is empty")
    if keys and estimate.duplicated(keys).any():
        raise ValueError(f"the estimate has several rows per {' and '.join(keys)}; seeds are the unit of replication")
    finite = np.isfinite(estimate["value"].to_numpy(dtype=float))
    if not finite.all():
        raise _Undecidable(f"its estimate is not finite at seed {estimate.loc[~finite, 'seed'].iloc[0]}")
    if "seed" in rows:
        dropped = sorted(set(rows["seed"].dropna()) - set(estimate["seed"]))
        if dropped:
            raise _Undecidable(f"its estimate has no value for seed {', '.join(map(str, dropped))}")
