"""Reports of a results folder: ``report.html``, ``report.md`` and the verdict table on the console, all from what is stored."""

from curvlab.study.report.console import console_table
from curvlab.study.report.findings import Finding, findings
from curvlab.study.report.html import html
from curvlab.study.report.markdown import markdown
from curvlab.study.report.text import notes, redraw, summary
from curvlab.study.results import Results
from curvlab.tools.storage import write

__all__ = [
    "Finding", "console_table", "findings", "html", "markdown", "notes", "redraw", "summary", "write_reports",
]  # fmt: skip


def write_reports(results: Results) -> None:
    """Write both reports into a results folder.

    Raises:
        UsageError: the folder is one of an earlier version.
    """
    found = findings(results.verdicts)
    write(results.folder / "report.md", markdown(results, found).encode())
    write(results.folder / "report.html", html(results, found).encode())
