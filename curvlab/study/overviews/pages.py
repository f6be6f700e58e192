"""The scoreboard and the replication of an analysis as pages of their own, in the look of a report, and as Markdown."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from curvlab.study.claims import GROUPS
from curvlab.study.overviews.replication import ENOUGH, Pooled, pooled
from curvlab.study.overviews.standing import STATES, Judged, Run, Standing, State
from curvlab.study.report import Finding
from curvlab.study.report.forest import Strip, strips
from curvlab.study.report.markdown import table
from curvlab.study.report.page import anchor, template
from curvlab.study.report.text import plain_interval
from curvlab.tools.text import capitalised, number

SIGNS: Mapping[State, tuple[str, str]] = {
    "contradicted": ("≠", "refuted"),
    "replicated": ("=", "supported"),
    "open": ("○", "unmeasured"),
}
"""A sign and a class of CSS for every state."""


@dataclass(frozen=True)
class Cell:
    """A claim on a problem, as a page shows it.

    Attributes:
        problem: The problem.
        finding: The claim and its verdict there.
        address: Of the claim in the report of that run, from the page; empty if there is no report.
        run: When it was run and what else there is to know.
        strip: Its effect, on one axis with that of the other problems; None if there is none.
    """

    problem: str
    finding: Finding
    address: str
    run: str
    strip: Strip | None


@dataclass(frozen=True)
class Row:
    """A claim over problems, as a page shows it.

    Attributes:
        standing: The claim and its verdicts.
        anchor: Id of its element.
        cells: Problem → the claim there.
        pooled: The effect over all problems, or why there is none.
        strip: The drawing of that.
    """

    standing: Standing
    anchor: str
    cells: Mapping[str, Cell]
    pooled: Pooled | str
    strip: Strip | None


def scoreboard(found: Sequence[Standing], faults: Sequence[str], home: Path) -> str:
    """The page of all claims on all problems, to be stored in ``home``."""
    rows = _rows(found, home)
    papers: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        run = row.standing.first.run
        papers.setdefault(run.paper or "Without a paper", {}).setdefault(run.analysis, []).append(row)
    return template("overviews/scoreboard.html").render(
        papers={
            paper: [(name, _question(own[0]), _problems(own), _by_group(own)) for name, own in analyses.items()]
            for paper, analyses in papers.items()
        },
        summary=summary(found),
        against=[row for row in rows if row.standing.state == "contradicted"],
        faults=faults,
        states=STATES,
        signs=SIGNS,
    )


def replication(runs: Sequence[Run], found: Sequence[Standing], home: Path) -> str:
    """The page of one analysis on several problems, to be stored in ``home``."""
    rows = _rows(found, home)
    return template("overviews/replication.html").render(
        title=runs[0].analysis,
        paper=runs[0].paper,
        question=_question(rows[0]) if rows else "",
        problems=[run.problem for run in runs],
        summary=summary(found),
        against=[row for row in rows if row.standing.state == "contradicted"],
        groups=_by_group(rows),
        enough=ENOUGH,
        states=STATES,
        signs=SIGNS,
    )


def replication_in_markdown(runs: Sequence[Run], found: Sequence[Standing]) -> str:
    """The same as Markdown."""
    problems = [run.problem for run in runs]
    parts = [f"# {runs[0].analysis} on {', '.join(problems)}", summary(found)]
    if against := [one for one in found if one.state == "contradicted"]:
        parts += ["## Does not travel"]
        parts += ["\n".join(f"- {one.claim} {one.travels}: {one.first.finding.statement}" for one in against)]
    for group, name in GROUPS.items():
        if own := [one for one in found if one.group == group]:
            header = ["claim", "statement", *problems, "over problems", "pooled"]
            lines = [
                [one.claim, one.first.finding.statement, *(_words(one.judged.get(p)) for p in problems), one.travels,
                 pooled_words(pooled(one))]
                for one in own
            ]  # fmt: skip
            parts += [f"## {capitalised(name)}", table(header, lines)]
    return "\n\n".join(parts) + "\n"


def summary(found: Sequence[Standing]) -> str:
    """How many claims are in which state."""
    counts = Counter(one.state for one in found)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{len(found)} claim{'s' * (len(found) != 1)}: {states or 'none judged'}."


def pooled_words(found: Pooled | str) -> str:
    """The pooled effect as text, or a dash."""
    if isinstance(found, str):
        return "–"
    share = f"I² {100 * found.heterogeneity:.0f} %"
    return f"{number(found.estimate)} [{number(found.low)}, {number(found.high)}], {share}, {found.problems} problems"


def _words(judged: Judged | None) -> str:
    if judged is None:
        return "–"
    finding = judged.finding
    parts = [f"**{finding.outcome}**", number(finding.effect), plain_interval(finding)]
    return " ".join(part for part in parts if part != "–")


def _rows(found: Sequence[Standing], home: Path) -> list[Row]:
    return [_row(standing, place, home) for place, standing in enumerate(found)]


def _row(standing: Standing, place: int, home: Path) -> Row:
    effect = pooled(standing)
    findings = [one.finding for one in standing.judged.values()]
    drawn = strips([*findings, *([effect.like(findings[0])] if isinstance(effect, Pooled) else [])])
    cells = {
        problem: Cell(problem, one.finding, _address(one, home), _run(standing, problem), drawing)
        for (problem, one), drawing in zip(standing.judged.items(), drawn[: len(findings)], strict=True)
    }
    return Row(standing, anchor(place), cells, effect, drawn[-1] if isinstance(effect, Pooled) else None)


def _address(judged: Judged, home: Path) -> str:
    report = judged.run.results.folder / "report.html"
    if not report.exists():
        return ""
    path = quote(Path(os.path.relpath(report, home.resolve())).as_posix())
    return f"{path}#{anchor(judged.place)}" if judged.finding.is_measured else path


def _run(standing: Standing, problem: str) -> str:
    run = standing.judged[problem].run
    finding = standing.judged[problem].finding
    other = f"; here the claim is: {finding.statement} ({finding.rule})" if problem in standing.reworded else ""
    return f"run of {run.started:%Y-%m-%d %H:%M}, {finding.seeds} seed{'s' * (finding.seeds != 1)}{other}"


def _question(row: Row) -> str:
    return str(row.standing.first.run.results.environment.get("question") or "")


def _problems(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(problem for row in rows for problem in row.cells))


def _by_group(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [
        (name, own) for group, name in GROUPS.items() if (own := [row for row in rows if row.standing.group == group])
    ]
