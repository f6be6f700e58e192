"""The runner end to end, on the dummy analysis: one run, its command and its options."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dummy_analysis
import pandas as pd
import pytest
from dummy_analysis import UNDRAWN, changed

from curvlab.study import main, refuted, supported, undecided
from curvlab.study.execution import Plan

FOLDER_FILES = {
    "config.json",
    "environment.json",
    "measurements.parquet",
    "verdicts.json",
    "report.md",
    "report.html",
    "rows",
    "log.txt",
    "figures",
    "figures.json",
}


def command(*arguments):
    """The dummy as a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    return {"args": [sys.executable, "-m", "dummy_analysis", *arguments], "env": environment, "text": True}


def test_a_run_from_the_command_line_and_the_command_that_redraws_its_figure(tmp_path, monkeypatch):
    done = subprocess.run(**command("--seeds", "4"), cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *_, last_but_one, last = done.stdout.strip().splitlines()
    assert re.search(r"D-1 +supported +supported +1[.]0", done.stdout)
    assert re.search(r"D-3 +refuted +refuted", done.stdout)
    folder = tmp_path / last_but_one.removeprefix("Results: ")
    assert folder.parent == tmp_path / "results" / "dummy"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-f]{8}", folder.name)
    assert {path.name for path in folder.iterdir()} == FOLDER_FILES
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{ending}" for name in ("alphas", "spoilt") for ending in ("pdf", "png")
    }
    assert (tmp_path / "results" / "dummy" / "latest").resolve() == folder

    measurements = pd.read_parquet(folder / "measurements.parquet")
    assert len(measurements) == 4 * 2 * 2 * 2
    assert {"experiment", "structure", "offset", "seed", "quantity", "value", "layer", "sample", "cell"} == set(
        measurements.columns
    )
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert [v["claim"] for v in verdicts["verdicts"]] == ["D-1", "D-2", "D-3", "D-4", "D-5"]
    assert verdicts["complete"]
    environment = json.loads((folder / "environment.json").read_text())
    assert {"packages", "git", "hardware", "threads", "python", "command"} <= environment.keys()
    assert environment["threads"] == {"torch": 1, "OMP_NUM_THREADS": "1"}
    log = (folder / "log.txt").read_text()
    assert "cell experiment=numbers, structure=full, offset=0.0, seed=3: 2 observations" in log
    assert "font" not in log

    report = (folder / "report.md").read_text()
    assert "| D-3 | The block-diagonal number is below 2. | **refuted** | refuted |" in report
    assert "![alphas](figures/alphas.png)" in report
    redraw = last.removeprefix("Redraw:  ")
    assert f"`{redraw}`" in report
    (folder / "figures" / "alphas.pdf").unlink()
    (tmp_path / "results" / ".cache").rename(tmp_path / "gone")
    words = shlex.split(redraw)
    assert words[:2] == ["python", dummy_analysis.__file__]
    monkeypatch.chdir(tmp_path)
    assert main(dummy_analysis.ANALYSIS, words[2:]) == 0
    assert (folder / "figures" / "alphas.pdf").read_bytes().startswith(b"%PDF")


def test_claims_run_only_the_cells_that_their_verdicts_depend_on(run):
    """Those of all claims that are tested with them, but not the one that only the identity needs."""
    assert run("--seeds", "3", "--claims", "D-2", "D-3") == 0
    assert len(run.measured) == 9
    assert not any("structure=block-diagonal, offset=1.0" in cell for cell in run.measured)
    assert list(run.stored().verdicts["claim"]) == ["D-2", "D-3"]


def given(**gates):
    """The dummy's claims, each given another."""
    return lambda config: [replace(c, given=gates.get(c.id[-1:], "")) for c in dummy_analysis.claims(config)]


def grouped(config):
    """The dummy's claims in groups of their own, where D-1 has a meaning only if D-2 holds, and that only if D-4 does."""
    groups = {"D-1": "derived", "D-2": "paper", "D-3": "paper", "D-4": "self-check", "D-5": "exploration"}
    gates = {"D-1": "D-2", "D-2": "D-4"}
    return [replace(c, group=groups[c.id], given=gates.get(c.id, "")) for c in dummy_analysis.claims(config)]


def test_a_claim_is_decided_with_those_that_give_it_its_meaning_and_their_families(run):
    assert run("--seeds", "3", analysis=changed(claims=grouped)) == 0
    whole = run.stored().verdicts.set_index("claim")
    assert run("--seeds", "3", "--fresh", "--claims", "D-1", analysis=changed(claims=grouped)) == 0
    pd.testing.assert_frame_equal(run.stored().verdicts.set_index("claim"), whole.loc[["D-1"]])
    plan = Plan.of(changed(claims=grouped), dummy_analysis.Options(claims=("D-1",)))
    assert [claim.id for claim in plan.claims] == ["D-1", "D-2", "D-3", "D-4"]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"1": "D-9"}, "claim D-1 is given 'D-9', which is no claim"),
        ({"1": "D-2", "2": "D-1"}, "given each other: D-1, D-2"),
    ],
)
def test_claims_are_given_claims_that_there_are(run, gates, message):
    with pytest.raises(ValueError, match=message):
        run("--seeds", "1", analysis=changed(claims=given(**gates)))


def contradicted(config):
    """The dummy's claims with the opposite expectation."""
    opposite = {"supported": refuted, "refuted": supported, "open": undecided}
    return [replace(c, expected=opposite[c.expected.outcome](c.expected.reason)) for c in dummy_analysis.claims(config)]


def test_strict_exits_with_1_on_a_contradicted_expectation(run, capsys):
    against = changed(claims=contradicted)
    assert run("--strict") == 0
    assert run("--strict", "--claims", "D-5") == 0
    assert run("--strict", "--claims", "D-3", analysis=against) == 1
    assert run("--strict", "--claims", "D-2", analysis=against) == 1
    assert run("--claims", "D-2", analysis=against) == 0
    out = capsys.readouterr().out
    assert "not refuted" in out
    assert "Against expectation: D-2." in out
    assert "(contradicted)" in (run.stored().folder / "report.md").read_text()


def test_dry_run_measures_nothing(run, monkeypatch, capsys):
    monkeypatch.setenv("DUMMY_CLAIM", "0.5")
    assert run("--seeds", "2") == 0
    capsys.readouterr()
    assert run("--seeds", "5", "--dry-run") == 0
    assert run.measured == []
    out = capsys.readouterr().out
    assert "cells:  20, 8 cached, 12 to run" in out
    assert "time:   about 6.0 s, after about 3.0 s to start" in out
    assert re.search(
        r"memory: about 3\.0 MiB for cell experiment=numbers, structure=\S+, offset=\S+, seed=2, .* available", out
    )
    assert len(list((run.results / "dummy").glob("2*"))) == 1
    monkeypatch.setenv("DUMMY_CLAIM", "5.0")
    assert run("--seeds", "5", "--dry-run", "--workers", "3") == 0
    out = capsys.readouterr().out
    assert "time:   about 23 s in 3 processes, after about 3.0 s to start" in out, (
        "processes that measure have to start, too"
    )
    assert re.search(r"memory: about 9\.0 MiB for cell .*, seed=2 and 2 more at the same time, .* available", out)


def test_list_claims(run, capsys):
    assert run("--list-claims") == 0
    out = capsys.readouterr().out
    assert "D-2  The block-diagonal number is above 2." in out
    assert "decided:  mean > 2" in out
    assert "expected: refuted. it was made so" in out
    assert not run.results.exists()


def test_help_says_what_a_reader_needs(capsys):
    assert main(UNDRAWN, ["--help"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Does a noisy number lie where its structure says?",
        "A. Nobody, On Nothing, 2026",
        "48 cells, about a second",
        "D-5  An offset of 1 does not matter.",
        "curvlab run dummy_analysis:UNDRAWN --seeds 5",
        "curvlab run dummy_analysis:UNDRAWN --claims D-1 --dry-run",
        "(default: 12)",
        "(unit: seeds)",
    ):
        assert text in out
    for option in (
        "problem",
        "config",
        "list-claims",
        "dry-run",
        "shard",
        "workers",
        "fresh",
        "strict",
        "quiet",
        "offsets",
    ):
        assert f"--{option}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sedes", "3"], "--seeds"),
        (["--seeds", "many"], "--seeds"),
        (["--claims", "D1"], "Did you mean 'D-1'?"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--config", "nowhere.json"], "--config nowhere.json cannot be read"),
        (["--redraw", "nowhere"], "is not a readable results folder"),
        (["--shard", "5/4"], "--shard is i/n"),
        (["--workers", "-1"], "--workers must be at least 1, or 0 for one per core; got -1"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_was_meant(run, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_quiet_prints_only_the_verdicts_and_where_the_results_are(run, capsys):
    assert run("--seeds", "2", "--quiet") == 0
    out = capsys.readouterr().out
    assert "cached" not in out
    assert "[1/8]" not in out
    assert [line.partition(":")[0] for line in out.strip().splitlines()[-2:]] == ["Results", "Redraw"]


def test_a_value_that_an_option_names_twice_is_wrong_usage(run, capsys):
    assert run("--seeds", "1", "--offsets", "0", "1", "1") == 2
    assert "--offsets names 1.0 2 times; name each once" in capsys.readouterr().err
