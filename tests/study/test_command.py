"""The command `curvlab`."""

import dummy_analysis
import pytest

from curvlab.study import ANALYSES, command


@pytest.fixture(autouse=True)
def dummy(monkeypatch):
    monkeypatch.setitem(ANALYSES._things, "dummy", dummy_analysis.ANALYSIS)


def test_list_names_every_analysis_with_its_question(capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "dummy" in out
    assert "Does a noisy number lie where its structure says?" in " ".join(out.split())


def test_run_passes_options_on(tmp_path, capsys):
    assert command.main(["run", "dummy", "--seeds", "2", "--dry-run", "--results", str(tmp_path)]) == 0
    assert "cells:  8, 0 cached, 8 to run" in capsys.readouterr().out


def test_figures_are_those_of_papers(tmp_path, capsys):
    assert command.main(["figures", "--list", "--results", str(tmp_path)]) == 0
    assert "karakida_osawa_2020" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dumy"], "error: Unknown analysis 'dumy'. Did you mean 'dummy'?"),
        (["run"], "usage: curvlab list"),
        (["draw"], "usage: curvlab list"),
        (["scorebord"], "Did you mean 'scoreboard'?"),
        (["run", "dummy", "--sedes", "2"], "--seeds"),
    ],
)
def test_wrong_usage_says_what_was_meant(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help(capsys):
    assert command.main(["--help"]) == command.main([]) == 0
    assert "curvlab run NAME" in capsys.readouterr().out


def test_an_analysis_of_a_module_runs_by_its_address(tmp_path, capsys):
    address = "dummy_analysis:ANALYSIS"
    assert dummy_analysis.ANALYSIS.command == f"curvlab run {address}"
    assert command.main(["run", address, "--seeds", "2", "--dry-run", "--results", str(tmp_path)]) == 0
    assert "8 to run" in capsys.readouterr().out
    assert command.main(["run", "dummy_analysis:ANALYSI"]) == 2
    assert "Unknown Analysis of dummy_analysis 'ANALYSI'. Did you mean 'ANALYSIS'?" in capsys.readouterr().err
