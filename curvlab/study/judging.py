"""The judge: claims and measurements in, verdicts out.

A claim with a t-test is decided together with its family; `curvlab.study.decision` states the rule, by which
the chance that any true claim is refuted is at most 5 %, and so is the chance that any false one is supported.
An `Identity` has no p-value and is outside that family: one observation above its tolerance refutes it.

Nothing is dropped in silence. The estimate sees only the cells and quantities that its claim declares; a
failed cell, a value that is not finite or a seed without an estimate makes the claim inconclusive, with that
as its note.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool

from curvlab.study.cells import Cell
from curvlab.study.claims import Claim, Failure, Identity, Outcome, Verdict
from curvlab.study.decision import decide
from curvlab.study.inference import Summary
from curvlab.study.measurements import OUTSIDE, faults, is_outside, locate, records

log = logging.getLogger(__name__)


class _Undecidable(Exception):
    """Why a claim cannot be decided on the measurements at hand."""


class _Outside(Exception):
    """Why a claim says nothing of the measurements at hand."""


@dataclass(frozen=True)
class _Case:
    """A claim before its family is decided: a verdict that stands already, or the summary that is to be tested."""

    claim: Claim
    verdict: Verdict
    summary: Summary | None = None


def judge(
    claims: Sequence[Claim],
    measurements: pd.DataFrame,
    failures: Sequence[Failure] = (),
    level: float = 0.05,
    *,
    planned: Sequence[Cell] | None = None,
) -> list[Verdict]:
    """One verdict per claim, in the order of the claims; `curvlab.study.decision` states the rule.

    Args:
        claims: The family, and claims that no planned cell serves, which are not measured and in no family.
        measurements: In long form (`curvlab.study.measurements`). Without a ``cell`` column every row belongs
            to every claim.
        failures: Cells without measurements; claims that need one become inconclusive.
        level: Family-wise error level of support and of refutation.
        planned: All cells that were to be measured; None if nothing was planned.
    """
    wanted = [claim for claim in claims if planned is None or any(claim.needs(cell) for cell in planned)]
    found = {verdict.claim: verdict for verdict in _judge_family(wanted, measurements, failures, level)}
    return [found.get(c.id) or Verdict(c.id, "not measured", note=c.unplanned) for c in claims]


def _judge_family(
    claims: Sequence[Claim], measurements: pd.DataFrame, failures: Sequence[Failure], level: float
) -> list[Verdict]:
    cells = [Cell.from_key(key) for key in measurements["cell"].unique()] if "cell" in measurements else None
    cases = [_examine(claim, measurements, cells, failures) for claim in claims]
    tests = [(case, case.claim.rule) for case in cases if not isinstance(case.claim.rule, Identity)]
    decisions = decide([rule for _, rule in tests], [case.summary for case, _ in tests], level)
    verdicts = {case.claim.id: case.verdict for case in cases}
    for (case, _), decision in zip(tests, decisions, strict=True):
        if decision is not None:
            verdicts[case.claim.id] = replace(case.verdict, **vars(decision))
    return [verdicts[claim.id] for claim in claims]


def _examine(
    claim: Claim, measurements: pd.DataFrame, cells: Sequence[Cell] | None, failures: Sequence[Failure]
) -> _Case:
    """Everything about a claim that does not depend on the other claims."""
    try:
        rows, left_out = _inside(_select(claim, measurements, cells, failures))
        if (reason := claim.assumptions(rows)) is not None:
            raise _Outside(reason)
        _check_finite(rows)
        estimate = claim.estimated(rows)
        _check_estimate(claim, estimate, rows)
    except _Outside as reason:
        return _Case(claim, Verdict(claim.id, "outside the assumptions", note=str(reason)))
    except _Undecidable as reason:
        return _Case(claim, Verdict(claim.id, "inconclusive", note=str(reason)))
    except Exception as error:
        log.exception("claim %s cannot be judged", claim.id)
        note = f"its assumptions or its estimate raised {type(error).__name__}: {error}"
        return _Case(claim, Verdict(claim.id, "inconclusive", note=note))
    if isinstance(claim.rule, Identity):
        return _Case(claim, _noted(_judge_identity(claim, claim.rule, estimate), left_out))
    summary = Summary.of(estimate["value"].to_numpy(dtype=float))
    verdict = Verdict(claim.id, "inconclusive", estimate=summary.mean, seeds=summary.seeds, note=left_out)
    if summary.seeds < 2:
        return _Case(claim, _noted(verdict, "one seed has no interval; run with --seeds 2 or more"))
    if summary.error == 0.0:
        verdict = _noted(verdict, f"all {summary.seeds} seeds give this value: exact sign test, not t")
    return _Case(claim, verdict, summary)


def _noted(verdict: Verdict, note: str) -> Verdict:
    return replace(verdict, note="; ".join(part for part in (verdict.note, note) if part))


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
    rows = measurements
    if cells is not None and claim.where:
        rows = rows[rows["cell"].isin([cell.key for cell in cells if claim.needs(cell)])]
    if claim.quantities:
        rows = rows[rows["quantity"].isin(claim.quantities)]
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
    identity = claim.rule if isinstance(claim.rule, Identity) else None
    missing = {"value", "tolerance" if identity else "seed"} - set(estimate.columns)
    if missing:
        raise ValueError(f"the estimate has no column {' and no column '.join(sorted(missing))}")
    if estimate.empty:
        raise _Undecidable("its estimate is empty")
    if identity:
        tolerance = estimate["tolerance"].to_numpy(dtype=float)
        if not (np.isfinite(tolerance) & (tolerance >= 0)).all():
            raise _Undecidable("a tolerance of its estimate is negative or not finite")
    elif estimate["seed"].duplicated().any():
        raise ValueError("the estimate has several rows per seed; seeds are the unit of replication")
    finite = np.isfinite(estimate["value"].to_numpy(dtype=float))
    if not finite.all():
        named = f" at seed {estimate.loc[~finite, 'seed'].iloc[0]}" if "seed" in estimate else ""
        raise _Undecidable(f"its estimate is not finite{named}")
    if identity and not _telling(identity, estimate).any():
        raise _Undecidable(
            f"every tolerance of its estimate is above {identity.coarsest:g}: too ill-conditioned to tell"
        )
    if "seed" in rows and "seed" in estimate:
        dropped = sorted(set(rows["seed"].dropna()) - set(estimate["seed"]))
        if dropped:
            raise _Undecidable(f"its estimate has no value for seed {', '.join(map(str, dropped))}")


def _telling(rule: Identity, estimate: pd.DataFrame) -> Bool[np.ndarray, " rows"]:
    """Which observations speak for an identity or against it."""
    tolerances = estimate["tolerance"].to_numpy(dtype=float)
    telling: Bool[np.ndarray, " rows"]
    telling = (tolerances <= rule.coarsest) | (np.abs(estimate["value"].to_numpy(dtype=float)) > tolerances)
    return telling


def _judge_identity(claim: Claim, rule: Identity, estimate: pd.DataFrame) -> Verdict:
    values = np.abs(estimate["value"].to_numpy(dtype=float))
    tolerances = estimate["tolerance"].to_numpy(dtype=float)
    broken = values > tolerances
    telling = _telling(rule, estimate)
    values, tolerances, broken = values[telling], tolerances[telling], broken[telling]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(tolerances > 0, values / tolerances, np.where(broken, math.inf, 0.0))
    worst = int(np.argmax(share))
    note = (
        f"{broken.sum()} of {len(values)} observations exceed their tolerance; "
        f"worst |value| {values[worst]:.2g} against {tolerances[worst]:.2g}, "
        f"largest tolerance {tolerances.max():.2g}"
        + (f"; {np.sum(~telling)} more are too ill-conditioned to count" if not telling.all() else "")
    )
    seeds = int(estimate["seed"].nunique()) if "seed" in estimate else 0
    outcome: Outcome = "refuted" if broken.any() else "supported"
    return Verdict(claim.id, outcome, estimate=float(values[worst]), seeds=seeds, note=note)
