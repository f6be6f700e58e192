"""Commands that look at several runs, or at none yet: preregister, several problems, scoreboard, difference."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from curvlab.study import preregistration
from curvlab.study.analysis import Analysis
from curvlab.study.execution import Plan
from curvlab.study.faults import UsageError
from curvlab.study.options import parse, pop_option
from curvlab.study.overviews import pages
from curvlab.study.overviews.difference import Change, Difference, difference
from curvlab.study.overviews.replication import pooled
from curvlab.study.overviews.standing import Judged, Run, Standing, finished, standings
from curvlab.study.report import Finding
from curvlab.study.report.console import styled, table
from curvlab.study.results import latest
from curvlab.study.runner import CONTRADICTED, DONE, main
from curvlab.tools.progress import say
from curvlab.tools.storage import write
from curvlab.tools.text import number


def preregister(analysis: Analysis[Any], arguments: Sequence[str]) -> int:
    """Write down what an analysis claims with these options; runs with the same claims refer to it.

    Raises:
        UsageError: there is a damaged file in its place.
        SystemExit: as `parse` raises it.
    """
    config = parse(
        analysis.defaults, arguments, prog=f"curvlab preregister {analysis.name}", description=analysis.description
    )
    claims = preregistration.registered(analysis, config)
    found = preregistration.preregister(analysis, config)
    say(
        Console(),
        f"{len(claims)} claims, fingerprint {preregistration.fingerprint(claims)[:12]}, written down {found.written}",
    )
    say(Console(), f"Preregistration: {found.path}")
    return DONE


def run_on(analysis: Analysis[Any], problems: Sequence[str], arguments: Sequence[str]) -> int:
    """Run an analysis on several problems and show which verdicts travel; a run that cannot be finished ends it.

    Raises:
        UsageError: options that leave no results to compare.
        CommandError: a problem is unknown, or without its data; raised before anything is measured.
        SystemExit: as `parse` raises it.
    """
    if pop_option("problem", arguments)[0] is not None:
        raise UsageError("--problem and --problems exclude each other")
    for problem in problems:
        options = [*arguments, "--problem", problem]
        prog = f"curvlab run {analysis.name}"
        config = parse(analysis.defaults, options, prog=prog, description=analysis.description)
        Plan.of(analysis, config)
    if config.redraw or config.list_claims:
        raise UsageError("--redraw and --list-claims are for one problem: --problem")
    code = DONE
    runs = []
    for problem in problems:
        code = max(code, main(analysis, [*arguments, "--problem", problem]))
        if code not in (DONE, CONTRADICTED):
            return code
        if not (config.dry_run or config.shard) and (folder := latest(config.results, analysis.name)):
            runs.append(Run.of(folder))
    if runs:
        _replicated(runs, standings(runs), config.results / analysis.name)
    return code


def _replicated(runs: Sequence[Run], found: Sequence[Standing], home: Path) -> None:
    """Show one analysis on several problems, and write its pages."""
    write(home / "replication.html", pages.replication(runs, found, home).encode())
    write(home / "replication.md", pages.replication_in_markdown(runs, found).encode())
    problems = [run.problem for run in runs]
    rows = [
        [
            one.claim,
            *(_verdict(one.judged.get(problem)) for problem in problems),
            one.travels,
            pages.pooled_words(pooled(one)),
        ]
        for one in sorted(found, key=lambda one: one.state != "contradicted")
    ]
    console = _console()
    console.print(table(["claim", *problems, "over problems", "pooled effect"], rows))
    say(console, pages.summary(found))
    say(console, f"Page: {home / 'replication.html'}")


def scoreboard(results: Path) -> int:
    """Show every claim on every problem over all results, and write ``scoreboard.html`` into their folder.

    Raises:
        UsageError: there are no results.
    """
    runs, faults = finished(results)
    found = standings(runs)
    path = results / "scoreboard.html"
    write(path, pages.scoreboard(found, faults, results).encode())
    console = _console()
    by_analysis: dict[str, list[Standing]] = {}
    for one in found:
        by_analysis.setdefault(one.first.run.analysis, []).append(one)
    for analysis, own in by_analysis.items():
        problems = list(dict.fromkeys(problem for one in own for problem in one.judged))
        rows = [[one.claim, *(_verdict(one.judged.get(problem)) for problem in problems), one.travels] for one in own]
        console.print(table([analysis, *problems, "over problems"], rows))
    say(console, pages.summary(found))
    for fault in faults:
        say(console, f"Left out: {fault}")
    say(console, f"Page: {path}")
    return DONE


def diff(first: Path, second: Path) -> int:
    """Show what changed between two runs of an analysis.

    Raises:
        UsageError: one is no results folder, or they are of different analyses.
    """
    found = difference(Run.of(first), Run.of(second))
    console = _console()
    for what, changed in (("option", found.options), ("environment", found.environment)):
        for name, (before, after) in changed.items():
            say(console, f"{what} {name}: {before} → {after}")
    rows = [_compared(change, found) for change in found.telling]
    if rows:
        console.print(table(["claim", "before", "after", "estimate before", "after", "change"], rows))
    same = sum(change.same for change in found.changes)
    rest = len(found.changes) - len(rows)
    say(
        console,
        f"{len(found.changes)} claims: {len(rows)} changed, {rest} did not ({same} with the same values at every seed)",
    )
    return DONE


def _compared(change: Change, found: Difference) -> list[str]:
    both: list[Finding | None] = [change.before, change.after]
    outcomes = [styled(one) if one else "–" for one in both]
    return [change.claim, *outcomes, *(number(one.effect) if one else "–" for one in both), found.words(change)]


def _verdict(judged: Judged | None) -> str:
    if judged is None:
        return "–"
    effect = number(judged.finding.effect, digits=3)
    return styled(judged.finding) + (f" {effect}" if effect != "–" else "")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)
