"""What reports say of a claim and of a run, in words."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from curvlab.study.claims import Expected, Outcome
from curvlab.study.measurements import faults, locate, records
from curvlab.study.report.findings import Finding, not_measured
from curvlab.study.results import Results, final_name
from curvlab.tools.text import duration, number, size

OUTCOMES: Mapping[Outcome, str] = {
    "supported": "holds",
    "refuted": "fails",
    "inconclusive": "is undecided",
    "outside the assumptions": "lies outside its assumptions",
    "not measured": "is not measured",
}
"""What became of a claim, as a predicate."""

VARIED = {
    "initialisation": ("the initialisation of the weights", "other initialisations"),
    "data": ("the data", "other data"),
    "split": ("the split of the data", "other splits"),
    "batches": ("the order of the batches", "other orders of the batches"),
    "draws": ("the random draws of the method", "other draws"),
}
"""What a seed can vary, and what a verdict carries to if it does."""

LOCATED = 50
"""Values that are not finite of which a report says where they are."""

DECIDED = """\
Claims are tested over seeds, in both directions, each by the test that fits its estimand: Student's t of a mean or, of \
logarithms, of a geometric mean; the exact sign test of a median or of wins; the exact binomial test of a share; \
permutation of arms. Holm's procedure runs over the claims of a group that have a p-value, once for support and once for \
refutation, so that in each group the probability of refuting any true claim is at most 5 %, and so is the \
probability of supporting any false one. Intervals are given at 95 % and at the level at which Holm's procedure tested the \
claim. p is the adjusted p-value of refutation for a refuted claim and of support for every other. What has to \
hold at every observation has no p-value: a single violation refutes it."""


def listed(parts: Sequence[str], more: int = 0, others: str = "more", last: str = "and") -> str:
    """Parts of a sentence in a row.

    Args:
        parts: Those that are named.
        more: How many more there are.
        others: What these are called.
        last: The word before the last.
    """
    shown = [*parts, f"{more} {others}"] if more > 0 else [*parts]
    return " ".join([", ".join(shown[:-1]), last, shown[-1]]) if len(shown) > 1 else "".join(shown)


def varied(names: Iterable[str]) -> str:
    """What a seed varies, in words."""
    return listed([VARIED.get(name, (name, ""))[0] for name in names])


def expectation(finding: Finding) -> str:
    """What was expected and why."""
    return str(Expected(finding.expected, finding.reason, finding.explored))


def bounds(finding: Finding) -> str:
    """The interval, or a dash."""
    return _bounds(finding.low, finding.high)


def _bounds(low: float, high: float) -> str:
    return "–" if math.isnan(low) and math.isnan(high) else f"[{number(low)}, {number(high)}]"


def interval(finding: Finding) -> str:
    """The corrected interval with its confidence, or a dash."""
    found = bounds(finding)
    return found if found == "–" else f"{found} ({100 * finding.confidence:.4g} %)"


def plain_interval(finding: Finding) -> str:
    """The interval of 95 %, or a dash."""
    return _bounds(finding.low_95, finding.high_95)


def power(finding: Finding) -> str:
    """The smallest effect that the test finds, as a sentence; empty if there is no test."""
    if not finding.detectable:
        return ""
    return f"With {finding.seeds} seeds its test finds, with a probability of 80 %, {finding.detectable}."


def particulars(finding: Finding) -> dict[str, str]:
    """What else there is to say of a claim, by name."""
    entries = {
        "Source": finding.source,
        "Measured": finding.measured,
        "Cells": finding.cells,
        "Decided by": finding.rule + (f" (bound from {finding.bound_from})" if finding.bound_from else ""),
        "A seed varies": varied(finding.varies) or "not declared",
        "Only if": f"{finding.given} holds" if finding.given else "",
        "Expected": expectation(finding),
        "Power": power(finding),
        "Margin": finding.sensitivity,
        "Note": finding.note,
    }
    return {name: entry for name, entry in entries.items() if entry}


def summary(found: Sequence[Finding]) -> str:
    """How many claims had which outcome, and which contradict the expectation."""
    counts = Counter(finding.outcome for finding in found)
    outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    against = [finding.claim for finding in found if finding.contradicted]
    tail = f" Against expectation: {', '.join(against)}." if against else ""
    return f"{len(found)} claim{'s' * (len(found) != 1)}: {outcomes or 'none judged'}.{tail}"


def notes(found: Sequence[Finding]) -> list[str]:
    """One line for each verdict that needs an explanation, and one for all claims that are not measured for one reason."""
    explained = [f for f in found if f.note and f.outcome not in ("supported", "not measured")]
    return [
        *(f"{finding.claim} is {finding.outcome}: {finding.note}" for finding in explained),
        *(
            f"not measured: {', '.join(finding.claim for finding in apart)}: {reason}"
            for reason, apart in not_measured(found).items()
        ),
    ]


def title(results: Results) -> str:
    """The name of the analysis, and whether the run was interrupted."""
    name = str(results.environment.get("analysis", results.folder.parent.name))
    return name if results.complete else f"{name} (partial: the run was interrupted)"


def measured_on(results: Results, found: Sequence[Finding]) -> dict[str, str]:
    """Data, seeds, hardware and time of a run, by name."""
    facts = results.environment
    hardware, git, threads = (facts.get(name) or {} for name in ("hardware", "git", "threads"))
    seeds = sorted({int(seed) for seed in results.measurements.get("seed", pd.Series(dtype=float)).dropna()})
    entries = {
        **{name: _plain(entry) for name, entry in (facts.get("subject") or {}).items()},
        "seeds": f"{len(seeds)}, from {seeds[0]} to {seeds[-1]}" if seeds else "none",
        "a seed varies": varied(dict.fromkeys(name for finding in found for name in finding.varies)),
        "precision": _plain(results.config.get("dtype", "")),
        "hardware": _hardware(hardware, threads),
        "time": _time(facts),
        "code": _commit(git),
        "claims": _claims(facts),
    }
    return {name: entry for name, entry in entries.items() if entry}


def _plain(entry: object) -> str:
    return ", ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry)


def _hardware(hardware: Mapping[str, object], threads: Mapping[str, object]) -> str:
    memory, device = hardware.get("memory_bytes"), hardware.get("device")
    parts = [
        str(hardware.get("processor") or ""),
        f"{hardware['cores']} cores" if hardware.get("cores") else "",
        size(memory) if isinstance(memory, int | float) else "",
        f"device {device}" if device else "",
        f"torch with {threads['torch']} thread{'s' * (threads['torch'] != 1)} a process"
        if threads.get("torch")
        else "",
    ]
    return ", ".join(part for part in parts if part)


def _time(facts: Mapping[str, object]) -> str:
    run, started = facts.get("run"), facts.get("started")
    when = _minute(str(started)) if started else ""
    if not isinstance(run, Mapping):
        return when
    work = f"{duration(float(run['seconds']))} for {run['measured']} cells"
    kept = f", {run['cached']} more from earlier runs" if run["cached"] else ""
    return ", ".join(part for part in (when, work) if part) + kept


def _commit(git: Mapping[str, object]) -> str:
    return f"commit {str(git['commit'])[:12]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else ""


def _claims(facts: Mapping[str, Any]) -> str:
    """The fingerprint of the claims, and whether they were written down before they were measured."""
    if not facts.get("fingerprint"):
        return ""
    known = f"fingerprint {facts['fingerprint'][:12]}"
    before = facts.get("preregistered")
    if not before:
        return f"{known}, not written down before the run (curvlab preregister)"
    written = str(before["written"])
    since = str(facts.get("measured_since") or "")
    late = since and datetime.fromisoformat(since) < datetime.fromisoformat(written)
    when = f"after some cells had been measured (since {_minute(since)})" if late else "before anything was measured"
    then = listed([f"{name} {_plain(value)}" for name, value in before["otherwise"].items()])
    return f"{known}, written down on {_minute(written)}, {when}" + (f", for other options: {then}" if then else "")


def _minute(time: str) -> str:
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M}"


def nonfinite(measurements: pd.DataFrame) -> tuple[int, list[str]]:
    """How many observations are not finite, and where the first of them are."""
    faulty = measurements[faults(measurements)]
    return len(faulty), [locate(row) for row in records(faulty.head(LOCATED))]


def statuses(measurements: pd.DataFrame) -> list[list[str]]:
    """How many observations have which status, none if none has one."""
    if "status" not in measurements:
        return []
    return [[str(status), str(count)] for status, count in measurements["status"].value_counts().items()]


def redraw(results: Results) -> str:
    """The command that draws figures and reports again."""
    return f"{results.environment.get('program', '')} --redraw {shlex.quote(str(_home(results)))}"


def commands(results: Results) -> dict[str, str]:
    """The commands that draw the results again and make them again, by purpose."""
    folder = _home(results)
    again = ["--config", str(folder / "config.json"), "--results", str(folder.parent.parent)]
    return {
        "Draw figures and reports again": redraw(results),
        "Run it again": f"{results.environment.get('program', '')} {shlex.join(again)}",
    }


def _home(results: Results) -> Path:
    """The folder by its final name, as seen from where the command was run if it lies below."""
    folder = final_name(results.folder) if results.complete else results.folder
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
