"""What became of every claim on every problem, over all results."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

from curvlab.study.claims import Group
from curvlab.study.faults import UsageError
from curvlab.study.options import SHOWN
from curvlab.study.report import Finding, findings
from curvlab.study.report.text import listed
from curvlab.study.results import PARTIAL, Results, load

State = Literal["contradicted", "replicated", "open"]
STATES: Mapping[State, str] = {
    "contradicted": "the verdicts of two problems contradict each other",
    "replicated": "decided on two problems or more, and everywhere the same way",
    "open": "decided on one problem or none",
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        results: What its folder holds.
        findings: Its claims and what became of them.
        started: When.
    """

    results: Results
    findings: Sequence[Finding]
    started: datetime

    @classmethod
    def of(cls, folder: Path) -> "Run":
        """The run of a results folder.

        Raises:
            UsageError: the folder is damaged, or one of an earlier version.
        """
        results = load(folder)
        try:
            return cls(results, findings(results.verdicts), datetime.fromisoformat(results.environment["started"]))
        except (UsageError, KeyError, ValueError, TypeError) as error:
            raise UsageError(f"{folder} is no run of this version of curvlab: {error}") from error

    @property
    def analysis(self) -> str:
        """The name of its analysis."""
        return str(self.results.environment.get("analysis") or self.results.folder.parent.name)

    @property
    def paper(self) -> str:
        """The paper that this tests; empty if there is none."""
        return str(self.results.environment.get("paper") or "")

    @property
    def problem(self) -> str:
        """The problem on which it ran."""
        return str(self.results.config.get("problem", ""))

    @property
    def is_whole(self) -> bool:
        """Whether it measured and showed all that its analysis claims."""
        return not any(self.results.config.get(option) for option in SHOWN)


@dataclass(frozen=True)
class Judged:
    """A claim in one run.

    Attributes:
        run: The run.
        place: Which of its findings it is.
    """

    run: Run
    place: int

    @property
    def finding(self) -> Finding:
        """The claim and its verdict."""
        return self.run.findings[self.place]


@dataclass(frozen=True)
class Standing:
    """A claim over the problems that it was judged on.

    Attributes:
        judged: Problem → the claim there; there is one at least.
    """

    judged: Mapping[str, Judged]

    @property
    def first(self) -> Judged:
        """The claim on the first problem, which says what it claims."""
        return next(iter(self.judged.values()))

    @property
    def claim(self) -> str:
        """Its id."""
        return self.first.finding.claim

    @property
    def group(self) -> Group:
        """Whose claim it is."""
        return self.first.finding.group

    @cached_property
    def _decided(self) -> dict[str, list[str]]:
        """Verdicts → the problems with these, of those that are decided."""
        outcomes = {problem: one.finding.outcome for problem, one in self.judged.items()}
        found = {
            verdict: [p for p, outcome in outcomes.items() if outcome == verdict]
            for verdict in ("supported", "refuted")
        }
        return {verdict: problems for verdict, problems in found.items() if problems}

    @property
    def state(self) -> State:
        """What the verdicts say together."""
        if len(self._decided) > 1:
            return "contradicted"
        return "replicated" if sum(map(len, self._decided.values())) > 1 else "open"

    @property
    def travels(self) -> str:
        """The same in words."""
        if self.state == "contradicted":
            found = [f"{verdict} on {listed(problems)}" for verdict, problems in self._decided.items()]
            return f"does not travel: {', but '.join(found)}"
        of = f"of {len(self.judged)} problem{'s' * (len(self.judged) != 1)}"
        if not self._decided:
            return f"decided on none {of}"
        [(verdict, problems)] = self._decided.items()
        return f"{verdict} on {len(problems)} {of}"

    @property
    def reworded(self) -> list[str]:
        """The problems on which the claim says something else, or has another bound, than on the first."""
        said = {problem: (one.finding.statement, one.finding.rule) for problem, one in self.judged.items()}
        return [problem for problem, words in said.items() if words != next(iter(said.values()))]


def standings(runs: Sequence[Run]) -> list[Standing]:
    """Every claim over the runs, in the order of these and of their claims.

    On each problem the newest run counts. What this did not measure, because only a part was asked for, is that of the
    newest run before it that did, back to the last one of all claims.
    """
    by_problem: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_problem.setdefault((run.analysis, run.problem), []).append(run)
    table: dict[tuple[str, str], dict[str, Judged]] = {}
    for (analysis, problem), own in by_problem.items():
        for judged in _newest(own):
            table.setdefault((analysis, judged.finding.claim), {})[problem] = judged
    return [Standing(judged) for judged in table.values()]


def _newest(runs: Sequence[Run]) -> list[Judged]:
    """Every claim in the newest run in which it was measured, else in the newest at all."""
    found: dict[str, Judged] = {}
    for run in sorted(runs, key=lambda run: run.started, reverse=True):
        for place, finding in enumerate(run.findings):
            before = found.get(finding.claim)
            if before is None or (finding.is_measured and not before.finding.is_measured):
                found[finding.claim] = Judged(run, place)
        if run.is_whole:
            break
    return list(found.values())


def finished(results: Path) -> tuple[list[Run], list[str]]:
    """All finished runs in a folder of results, by analysis and problem, and what is wrong with those that cannot be read.

    Raises:
        UsageError: there is none.
    """
    runs, faults = [], []
    for folder in _folders(results):
        try:
            runs.append(Run.of(folder))
        except UsageError as error:
            faults.append(str(error))
    if not runs:
        reasons = "".join(f"\n  {fault}" for fault in faults)
        raise UsageError(
            f"no finished run of this version of curvlab lies in {results}; `curvlab run NAME` makes one{reasons}"
        )
    return sorted(runs, key=lambda run: (run.analysis, run.problem)), faults


def _folders(results: Path) -> Iterator[Path]:
    for path in sorted(results.glob("*/*/verdicts.json")):
        folder = path.parent
        if not (folder.is_symlink() or folder.name.startswith(".") or folder.name.endswith(PARTIAL)):
            yield folder
