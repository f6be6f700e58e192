"""The verdict table on the console."""

from collections.abc import Sequence

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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("claim", "verdict", "expected", "estimate", "interval", "seeds", "p"):
        table.add_column(title, justify="right" if title in ("estimate", "seeds", "p") else "left")
    for finding in found:
        if finding.is_measured:
            table.add_row(
                finding.claim,
                f"[{STYLES[finding.outcome]}]{finding.outcome}[/]",
                f"[bold]not {finding.expected}[/]" if finding.contradicted else finding.expected,
                number(finding.estimate),
                bounds(finding).replace("[", "\\["),
                str(finding.seeds or "–"),
                number(finding.p_adjusted, digits=2),
            )
    return table
