"""The commands on the page of results and verdicts run, one after another."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from curvlab.study import ANALYSES, command
from curvlab.study.claims import GROUPS
from curvlab.study.overviews.standing import STATES
from curvlab.study.report.text import OUTCOMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verdicts.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines() if line
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the example under the page's name, from which the commands run."""
    shutil.copy(ROOT / "examples" / "analysis.py", tmp_path / "my_analysis.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_analysis", None)


def test_the_commands_run(folder, capsys):
    for line in COMMANDS:
        program, *arguments = shlex.split(line)
        assert (program, command.main(arguments)) == ("curvlab", 0), line
    assert "my_analysis:ANALYSIS" not in ANALYSES.loaded
    out = " ".join(capsys.readouterr().out.split())
    assert "option first_seed: 1000 → 2000" in out
    assert "supported on 3 of 3 problems" in out
    assert "Page: results/scoreboard.html" in out
    reports = [path.read_text() for path in folder.glob("results/direction/2*/report.md")]
    assert any("written down on" in report and "before anything was measured" in report for report in reports)
    assert (folder / "results" / "direction" / "replication.md").exists()


@pytest.mark.parametrize("word", [*OUTCOMES, *STATES])
def test_every_outcome_and_state_is_explained(word):
    assert f"\n| {word} |" in PAGE


def test_every_rule_and_group_is_explained():
    for rule in ("Identity", "Always", "Inequality", "Equivalence", "Share", "Wins", "Spread"):
        assert f"| `{rule}(" in PAGE
    assert len(GROUPS) == 4
    assert (
        "claims of the paper, claims derived from it, explorations beyond it, and checks of the\ncode against itself"
        in PAGE
    )
