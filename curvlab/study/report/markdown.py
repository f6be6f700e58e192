"""``report.md``."""

from collections.abc import Mapping, Sequence

from curvlab.study.claims import GROUPS
from curvlab.study.report import text
from curvlab.study.report.answer import answer
from curvlab.study.report.findings import Finding, in_group, not_measured
from curvlab.study.results import Results
from curvlab.tools.text import capitalised, number


def markdown(results: Results, found: Sequence[Finding]) -> str:
    """The report as Markdown."""
    paper = str(results.environment.get("paper") or "")
    parts = [f"# {text.title(results)}", *([f"Paper: {paper}"] if paper else []), *answer(results, found)]
    if against := [finding for finding in found if finding.contradicted]:
        parts += ["## Against expectation", _short(against)]
    if awaited := [finding for finding in found if finding.awaited]:
        parts += ["## Expected, and undecided", _short(awaited)]
    parts += ["## Measured on", _listing(text.measured_on(results, found))]
    for group, name in GROUPS.items():
        if own := in_group(found, group):
            parts += [f"## {capitalised(name)}", _verdicts(own)]
    parts.append(text.DECIDED)
    if apart := not_measured(found):
        rows = [[", ".join(finding.claim for finding in missing), reason] for reason, missing in apart.items()]
        parts += ["## Not measured at this configuration", table(["claims", "because"], rows)]
    parts.append("## Claims")
    for finding in found:
        if finding.is_measured:
            parts += [f"### {finding.claim}\n\n{finding.statement}", _listing(text.particulars(finding))]
    if results.failures:
        parts.append(f"## Cells without measurements ({len(results.failures)})")
        parts.append(table(["cell", "reason"], [[str(f.cell), f.reason] for f in results.failures]))
    nonfinite_count, nonfinite = text.nonfinite(results.measurements)
    if nonfinite:
        parts.append(f"## Non-finite values ({nonfinite_count})")
        parts.append("\n".join(f"- {where}" for where in nonfinite))
    if statuses := text.statuses(results.measurements):
        parts += ["## Status of the observations", table(["status", "observations"], statuses)]
    if results.figures:
        parts.append("## Figures")
        parts += [_figure(figure.name, figure.caption, figure.fault) for figure in results.figures]
    parts += ["## Commands", _listing({purpose: f"`{line}`" for purpose, line in text.commands(results).items()})]
    return "\n\n".join(parts) + "\n"


def _short(found: Sequence[Finding]) -> str:
    return "\n".join(
        f"- {finding.claim} is {finding.outcome}: {finding.statement} Expected: {text.expectation(finding)}."
        for finding in found
    )


def _verdicts(found: Sequence[Finding]) -> str:
    rows = [
        [
            finding.claim,
            finding.statement,
            f"**{finding.outcome}**",
            finding.expected + (" (contradicted)" if finding.contradicted else ""),
            number(finding.estimate),
            text.plain_interval(finding),
            text.interval(finding),
            str(finding.seeds or "–"),
            number(finding.p_adjusted),
        ]
        for finding in found
    ]
    header = [
        "claim",
        "statement",
        "verdict",
        "expected",
        "estimate",
        "95 % interval",
        "corrected interval",
        "seeds",
        "p",
    ]
    return table(header, rows)


def _figure(name: str, caption: str, fault: str) -> str:
    if fault:
        return f"{name} could not be drawn: {fault}"
    return f"![{name}](figures/{name}.png)" + (f"\n\n{caption}" if caption else "")


def _listing(entries: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {entry}" for name, entry in entries.items())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars in its cells are escaped, and line breaks become spaces."""
    return "\n".join(_line(cells) for cells in (header, ["---"] * len(header), *rows))


def _line(cells: Sequence[str]) -> str:
    plain = (" ".join(cell.replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(plain)} |"
