"""``report.md`` and the verdict table on the console."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
from rich import box
from rich.table import Table

from curvlab.study.claims import Claim, Failure, Outcome, Verdict, contradicts
from curvlab.study.execution import Plan
from curvlab.study.measurements import faults, locate, records
from curvlab.study.options import C
from curvlab.tools.text import number

STYLES: dict[Outcome, str] = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "outside the assumptions": "magenta",
    "not measured": "dim",
}

RULE = """\
Tests are t-tests over seeds, in both directions. Holm's procedure runs over all claims of this run that have a p-value,
once for support and once for refutation, so that the probability of refuting any true claim is at most 5 %,
and so is the probability of supporting any false one. Intervals are t-intervals at the level at which Holm's
procedure tested the claim. p is the adjusted p-value of refutation for a refuted claim and of support for
every other; an identity has none."""


def bounds(verdict: Verdict) -> str:
    """The interval, or a dash."""
    return "–" if math.isnan(verdict.low) else f"[{number(verdict.low)}, {number(verdict.high)}]"


def interval(verdict: Verdict) -> str:
    """The interval with its confidence, or a dash."""
    return bounds(verdict) + ("" if math.isnan(verdict.low) else f" ({100 * verdict.confidence:.4g} %)")


def notes(verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each verdict that needs an explanation, and one for all claims that are not measured for one reason."""
    explained = [v for v in verdicts if v.note and v.outcome not in ("supported", "not measured")]
    unmeasured = [f"not measured: {', '.join(ids)}: {reason}" for reason, ids in not_measured(verdicts).items()]
    return [*(f"{v.claim} is {v.outcome}: {v.note}" for v in explained), *unmeasured]


def not_measured(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """The claims that are not measured at a configuration, by reason."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "not measured":
            found.setdefault(verdict.note, []).append(verdict.claim)
    return found


def _measured(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> list[tuple[Claim, Verdict]]:
    pairs = zip(claims, verdicts, strict=True)
    return [(claim, verdict) for claim, verdict in pairs if verdict.outcome != "not measured"]


def summary(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> str:
    """How many claims had which outcome, and which contradict the expectation."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in STYLES if counts[outcome])
    against = [claim.id for claim, verdict in zip(claims, verdicts, strict=True) if contradicts(claim, verdict)]
    tail = f" Against expectation: {', '.join(against)}." if against else ""
    return f"{len(claims)} claim{'s' * (len(claims) != 1)}: {outcomes or 'none judged'}.{tail}"


def console_table(claims: Sequence[Claim], verdicts: Sequence[Verdict]) -> Table:
    """The verdict table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("claim", "verdict", "expected", "estimate", "interval", "seeds", "p"):
        table.add_column(title, justify="right" if title in ("estimate", "seeds", "p") else "left")
    for claim, verdict in _measured(claims, verdicts):
        table.add_row(
            claim.id,
            f"[{STYLES[verdict.outcome]}]{verdict.outcome}[/]",
            f"[bold]not {claim.expected.outcome}[/]" if contradicts(claim, verdict) else claim.expected.outcome,
            number(verdict.estimate),
            bounds(verdict).replace("[", "\\["),
            str(verdict.seeds or "–"),
            number(verdict.p_adjusted, digits=2),
        )
    return table


def markdown(
    plan: Plan[C],
    title: str,
    verdicts: Sequence[Verdict],
    measurements: pd.DataFrame,
    failures: Sequence[Failure],
    figures: Sequence[str],
    commands: Mapping[str, str],
) -> str:
    """The report; ``commands`` maps what a command does to the command."""
    analysis, claims = plan.analysis, plan.claims
    header = ["claim", "statement", "verdict", "expected", "estimate", "interval", "seeds", "p"]
    rows = [
        [
            claim.id,
            claim.statement,
            f"**{verdict.outcome}**",
            claim.expected.outcome + (" (contradicted)" if contradicts(claim, verdict) else ""),
            number(verdict.estimate),
            interval(verdict),
            str(verdict.seeds or "–"),
            number(verdict.p_adjusted),
        ]
        for claim, verdict in _measured(claims, verdicts)
    ]
    introduction = [f"# {title}", analysis.question, *([f"Paper: {analysis.paper}"] if analysis.paper else [])]
    parts = [*introduction, summary(claims, verdicts), _table(header, rows), RULE]
    if apart := not_measured(verdicts):
        parts.append("## Not measured at this configuration")
        parts.append(_table(["claims", "because"], [[", ".join(ids), reason] for reason, ids in apart.items()]))
    parts.append("## Claims")
    for claim, verdict in _measured(claims, verdicts):
        entries = {
            "Source": claim.source,
            "Measured": claim.measured,
            "Decided by": str(claim.rule),
            "Expected": str(claim.expected),
            "Verdict": verdict.outcome + (f": {verdict.note}" if verdict.note else ""),
        }
        parts.append(f"### {claim.id}\n\n{claim.statement}")
        parts.append("\n".join(f"- {name}: {entry}" for name, entry in entries.items()))
    if failures:
        parts.append(f"## Cells without measurements ({len(failures)})")
        parts.append(_table(["cell", "reason"], [[str(f.cell), f.reason] for f in failures]))
    nonfinite = measurements[faults(measurements)]
    if len(nonfinite):
        parts.append(f"## Non-finite values ({len(nonfinite)})")
        parts.append("\n".join(f"- {locate(row)}" for row in records(nonfinite.head(50))))
    if "status" in measurements and measurements["status"].notna().any():
        counts = measurements["status"].value_counts()
        parts.append("## Status of the observations")
        parts.append(_table(["status", "observations"], [[str(s), str(n)] for s, n in counts.items()]))
    if figures:
        parts.append("## Figures")
        parts.append("\n\n".join(f"![{name}](figures/{name}.png)" for name in figures))
    parts.append("## Commands")
    parts.append("\n".join(f"- {purpose}: `{command}`" for purpose, command in commands.items()))
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_line(cells) for cells in (header, ["---"] * len(header), *rows))


def _line(cells: Sequence[str]) -> str:
    plain = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(plain)} |"
