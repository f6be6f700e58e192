"""Tables on the console, with verdicts in their colours."""

from collections.abc import Collection, Sequence

from rich import box
from rich.table import Table

from curvlab.study.claims import Outcome
from curvlab.study.report.findings import Finding
from curvlab.study.report.text import bounds
from curvlab.tools.text import number

STYLES: dict[Outcome, str] = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "outside the assumptions": "magenta",
    "not measured": "dim",
}


def console_table(found: Sequence[Finding]) -> Table:
    """The verdict table for a terminal."""
    rows = [
        [
            finding.claim,
            styled(finding),
            f"[bold]not {finding.expected}[/]" if finding.contradicted else finding.expected,
            number(finding.estimate),
            bounds(finding).replace("[", "\\["),
            str(finding.seeds or "–"),
            number(finding.p_adjusted, digits=2),
        ]
        for finding in found
        if finding.is_measured
    ]
    return table(
        ["claim", "verdict", "expected", "estimate", "interval", "seeds", "p"], rows, right={"estimate", "seeds", "p"}
    )


def styled(finding: Finding) -> str:
    """The outcome of a finding in its colour."""
    return f"[{STYLES[finding.outcome]}]{finding.outcome}[/]"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> Table:
    """A table for a terminal.

    Args:
        titles: Of the columns.
        rows: Their entries, in rich's markup.
        right: The titles of the columns that are aligned to the right.
    """
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        found.add_column(title, justify="right" if title in right else "left")
    for row in rows:
        found.add_row(*row)
    return found
