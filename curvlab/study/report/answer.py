"""The question of a run and its answer, in five sentences that are built from the verdicts."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from curvlab.study.claims import GROUPS, Outcome
from curvlab.study.report.findings import Finding, in_group, not_measured
from curvlab.study.report.text import OUTCOMES, VARIED, listed
from curvlab.study.results import Results
from curvlab.tools.text import capitalised

PLURALS: dict[Outcome, str] = {
    "supported": "hold",
    "refuted": "fail",
    "inconclusive": "are undecided",
    "outside the assumptions": "lie outside their assumptions",
    "not measured": "are not measured",
}
"""What became of several claims, as a predicate."""
MOST = 3
"""Claims that a sentence quotes at most."""


def answer(results: Results, found: Sequence[Finding]) -> list[str]:
    """The question and its answer, in five sentences."""
    return [
        f"The question: {_sentence(str(results.environment.get('question', '')))}",
        _of_the_paper(found),
        _against(found),
        how_far(found),
        _missing(results, found),
    ]


def _of_the_paper(found: Sequence[Finding]) -> str:
    paper = in_group(found, "paper")
    if not paper:
        parts = ["no claim of the paper was measured"]
    elif len(paper) == 1:
        parts = [f"the one claim of the paper, {_quoted(paper[0])}, {OUTCOMES[paper[0].outcome]}"]
    else:
        parts = [f"of the {len(paper)} claims of the paper, {_counted(paper)}"]
        if clearest := [f"{_quoted(one)} {OUTCOMES[one.outcome]}" for one in telling(paper)]:
            parts.append(f"most telling, {listed(clearest)}")
    others = [(name, own) for group, name in GROUPS.items() if group != "paper" and (own := in_group(found, group))]
    return _sentence("; ".join([*parts, *(f"of {name}, {_counted(own)}" for name, own in others)]))


def telling(found: Sequence[Finding]) -> list[Finding]:
    """The clearest refuted and the clearest supported finding, those that there are."""
    clearest = []
    outcome: Outcome
    for outcome in ("refuted", "supported"):
        decided = [finding for finding in found if finding.outcome == outcome]
        tested = [finding for finding in decided if not math.isnan(finding.p_adjusted)]
        clearest += sorted(tested or decided, key=lambda finding: finding.p_adjusted)[:1]
    return clearest


def _against(found: Sequence[Finding]) -> str:
    against = [finding for finding in found if finding.contradicted]
    awaited = [finding for finding in found if finding.awaited]
    named = [f"{_quoted(one)} {OUTCOMES[one.outcome]}" for one in against[:MOST]]
    verb = "verdict contradicts" if len(against) <= 1 else "verdicts contradict"
    parts = [f"{_count(len(against))} {verb} what was expected"]
    if against:
        parts[0] += f": {listed(named, len(against) - MOST)}"
    if awaited:
        be = "claim is" if len(awaited) == 1 else "claims are"
        parts.append(f"{_count(len(awaited))} {be} undecided although a verdict was expected")
    return _sentence("; ".join(parts))


def how_far(found: Sequence[Finding]) -> str:
    """On how many seeds the verdicts stand, what these vary, and what the verdicts therefore carry to."""
    counted = [finding for finding in found if finding.seeds]
    if not counted:
        return "No verdict stands on any seed."
    least = min(finding.seeds for finding in counted)
    most = max(finding.seeds for finding in counted)
    seeds = f"{most} seed{'s' * (most != 1)}" if least == most else f"{least} to {most} seeds"
    varied = {name for finding in counted for name in finding.varies}
    same = len({finding.varies for finding in counted}) == 1
    if not varied & VARIED.keys():
        return f"The verdicts stand on {seeds}; what a seed varies is not declared."
    some = "" if same else " (not all of it in every experiment; each claim says what)"
    varying = [what for name, (what, _) in VARIED.items() if name in varied]
    reached = [others for name, (_, others) in VARIED.items() if name in varied]
    beyond = [others for name, (_, others) in VARIED.items() if name not in varied]
    limit = f", but not to {listed(beyond, last='or')}" if beyond else ""
    return f"The verdicts stand on {seeds}, which vary {listed(varying)}{some}, so that they carry to {listed(reached)}{limit}."


def _missing(results: Results, found: Sequence[Finding]) -> str:
    parts = []
    if not results.complete:
        parts.append("the run was interrupted, so that all of this is provisional")
    apart = not_measured(found)
    if apart:
        total = sum(map(len, apart.values()))
        be = "claim was" if total == 1 else "claims were"
        parts.append(f"{_count(total)} {be} not measured{_because(apart)}")
    elif found:
        parts.append("every claim was measured")
    if results.failures:
        cells = "cell has" if len(results.failures) == 1 else "cells have"
        parts.append(f"{_count(len(results.failures))} {cells} no measurements")
    return _sentence("; ".join(parts) or "nothing was claimed")


def _because(apart: Mapping[str, Sequence[Finding]]) -> str:
    """Why claims were not measured."""
    if len(apart) == 1:
        return f", because {next(iter(apart)).rstrip('.')}"
    ordered = sorted(apart.items(), key=lambda item: -len(item[1]))
    reasons = [f"{len(missing)} because {reason.rstrip('.')}" for reason, missing in ordered[:MOST]]
    return f": {listed(reasons, sum(len(missing) for _, missing in ordered[MOST:]), 'for other reasons')}"


def _counted(found: Sequence[Finding]) -> str:
    counts = Counter(finding.outcome for finding in found)
    return listed(
        [
            f"{counts[outcome]} {OUTCOMES[outcome] if counts[outcome] == 1 else words}"
            for outcome, words in PLURALS.items()
            if counts[outcome]
        ]
    )


def _quoted(finding: Finding) -> str:
    return f"“{finding.statement.rstrip('.')}”"


def _count(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    return words[count] if count < len(words) else str(count)


def _sentence(text: str) -> str:
    text = text.strip()
    return capitalised(text) + ("" if re.search(r"[.?!”]$", text) else ".")
