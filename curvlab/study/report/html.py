"""``report.html``: one page that needs nothing beside it but the raw rows that it links to."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from curvlab.study.claims import GROUPS
from curvlab.study.report import text
from curvlab.study.report.answer import answer
from curvlab.study.report.findings import Finding, in_group, not_measured
from curvlab.study.report.forest import Strip, strip
from curvlab.study.report.page import MARKS, anchor, template
from curvlab.study.results import Drawn, Results, rows_of

SCALE = 0.45
"""CSS pixels to a pixel of an image, so that a figure of both columns is as wide as the page."""


@dataclass(frozen=True)
class Entry:
    """A claim as the page shows it.

    Attributes:
        finding: The claim and its verdict.
        anchor: Id of its element, which does not depend on what characters its own has.
        strip: Its drawing; None if there is nothing to draw.
        rows: Address of the rows that it reads, from the page; empty if there are none.
        figures: Names of the figures that are about it.
    """

    finding: Finding
    anchor: str
    strip: Strip | None
    rows: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it.

    Attributes:
        figure: What it is.
        source: The image as a data URL; empty if there is none.
        width: Of the image on a screen, in CSS pixels.
    """

    figure: Drawn
    source: str = ""
    width: int = 0


def html(results: Results, found: Sequence[Finding]) -> str:
    """The report as a page."""
    entries = [_entry(results, finding, place) for place, finding in enumerate(found)]
    by_claim = {entry.finding.claim: entry for entry in entries}
    nonfinite_count, nonfinite = text.nonfinite(results.measurements)
    return template("report/report.html").render(
        title=text.title(results),
        paper=str(results.environment.get("paper") or ""),
        complete=results.complete,
        answer=answer(results, found),
        against=[entry for entry in entries if entry.finding.contradicted],
        awaited=[entry for entry in entries if entry.finding.awaited],
        measured_on=text.measured_on(results, found),
        groups=[
            (group, name, [by_claim[finding.claim] for finding in own])
            for group, name in GROUPS.items()
            if (own := in_group(found, group))
        ],
        apart=not_measured(found),
        outcomes=[outcome for outcome in MARKS if any(finding.outcome == outcome for finding in found)],
        pictures=[_picture(results.folder, figure) for figure in results.figures],
        failures=results.failures,
        nonfinite=nonfinite,
        nonfinite_count=nonfinite_count,
        statuses=text.statuses(results.measurements),
        commands=text.commands(results),
        decided=text.DECIDED,
    )


def _entry(results: Results, finding: Finding, place: int) -> Entry:
    path = rows_of(results.folder, finding.claim)
    return Entry(
        finding,
        anchor=anchor(place),
        strip=strip(finding) if finding.is_measured else None,
        rows=quote(path.relative_to(results.folder).as_posix()) if path.exists() else "",
        figures=tuple(figure.name for figure in results.figures if finding.claim in figure.claims),
    )


def _picture(folder: Path, figure: Drawn) -> Picture:
    path = folder / "figures" / f"{figure.name}.png"
    if figure.fault or not path.exists():
        return Picture(figure)
    image = path.read_bytes()
    pixels = int.from_bytes(image[16:20])
    return Picture(figure, f"data:image/png;base64,{base64.b64encode(image).decode()}", round(pixels * SCALE))
