"""What a run makes of cells, data, memory, disks and figures that fail."""

import re
from dataclasses import replace
from pathlib import Path

import dummy_analysis
import pytest
from dummy_analysis import UNDRAWN, changed

from curvlab.study import latest, main


def test_a_failing_cell_costs_only_the_claims_that_need_it(run, capsys):
    assert run("--problem", "failing", "--strict") == 0
    assert run.outcomes() == {
        "D-1": "inconclusive",
        "D-2": "supported",
        "D-3": "refuted",
        "D-4": "inconclusive",
        "D-5": "refuted",
    }
    assert "failed: RuntimeError: this cell always fails" in capsys.readouterr().out
    stored = run.stored()
    [failure] = stored.failures
    assert (str(failure.cell), failure.reason) == (
        "experiment=numbers, structure=full, offset=0.0, seed=1",
        "RuntimeError: this cell always fails",
    )
    assert "Traceback" in (stored.folder / "log.txt").read_text()
    assert f"| {failure.cell} | {failure.reason} |" in (stored.folder / "report.md").read_text()
    assert run("--problem", "failing") == 0
    assert len(run.measured) == 1, "a failed cell is tried again, the others are cached"


def test_a_measurement_that_is_no_number_fails_its_cell(run):
    assert run("--seeds", "2", "--problem", "tensor") == 0
    [failure] = run.stored().failures
    assert failure.reason == (
        "TypeError: 'value' in observation 0 of cell experiment=numbers, structure=full, offset=0.0, seed=1 is a ndarray; "
        "text, a number or a truth value is needed"
    )


def test_a_value_that_is_not_finite_names_cell_layer_and_sample(run, capsys):
    assert run("--problem", "nan") == 0
    where = "alpha = nan, layer 2, sample 7, cell experiment=numbers, offset=0.0, seed=1, structure=full"
    assert f"non-finite: {where}" in capsys.readouterr().out
    stored = run.stored()
    assert f"non-finite value: {where}" in (stored.folder / "log.txt").read_text()
    assert f"- {where}" in (stored.folder / "report.md").read_text()
    verdicts = stored.verdicts.set_index("claim")
    assert verdicts.loc["D-1", "outcome"] == "inconclusive"
    assert verdicts.loc["D-1", "note"] == f"non-finite measurement: {where}"
    assert verdicts.loc["D-4", "outcome"] == "supported"


def test_divergence_is_reported_as_a_status(run):
    assert run("--problem", "diverging") == 0
    stored = run.stored()
    report = (stored.folder / "report.md").read_text()
    assert "| diverged | 1 |" in report
    assert "Non-finite values" not in report
    assert run.outcomes()["D-1"] == "inconclusive"
    assert (stored.measurements["value"] == float("inf")).sum() == 1


def test_missing_data_exit_with_3(run, capsys):
    assert run("--problem", "absent") == 3
    assert "error: the data set 'absent' is not in the data folder" in capsys.readouterr().err
    assert run("--problem", "absent", "--dry-run") == 3


def test_a_cell_that_is_too_large_stops_the_run_before_it_starts(run, capsys):
    assert run("--problem", "huge") == 3
    error = capsys.readouterr().err
    wanted = r"not enough memory for cell .*seed=0: needs about 909494.7 TiB; .* are available; --offsets lowers it"
    assert re.search(wanted, error)
    assert run.measured == []


def test_memory_that_runs_out_in_a_cell_exits_with_3_and_keeps_the_rest(run, capsys):
    assert run("--seeds", "3", "--problem", "memory") == 3
    assert "tried to allocate 80 GiB" in capsys.readouterr().err
    stored = run.stored()
    assert stored.complete
    assert stored.measurements["cell"].nunique() == 11


def test_a_full_disk_loses_no_finished_cell(run, full_disk, capsys):
    full_disk.after(5, name=".cache")
    assert run("--seeds", "2") == 3
    assert re.search(
        r"error: no space left for .*: needs \d+ B, .* are available; .*--results", capsys.readouterr().err
    )
    assert latest(run.results, "dummy") is None
    full_disk.freed()
    assert run("--seeds", "2") == 0
    assert len(run.measured) == 3


@pytest.mark.parametrize("name", ["measurements.parquet", "alphas.pdf"])
def test_a_disk_that_fills_up_at_the_end_leaves_the_last_results_alone(run, full_disk, name, capsys):
    drawn = replace(UNDRAWN, figures={"alphas": dummy_analysis.alphas})
    assert run("--seeds", "2") == 0
    before = {path.name: path.read_bytes() for path in run.stored().folder.iterdir() if path.is_file()}
    full_disk.after(0, name=name)
    assert run("--seeds", "2", analysis=drawn) == 3
    assert name in capsys.readouterr().err
    folder = run.stored().folder
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    full_disk.freed()
    assert run("--seeds", "2", analysis=drawn) == 0
    assert run.measured == []
    assert (run.stored().folder / "figures" / "alphas.pdf").exists()


def test_results_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(UNDRAWN, ["--seeds", "1", "--results", str(tmp_path / "file")]) == 2
    assert "choose another folder with --results" in capsys.readouterr().err


def test_latest_is_a_text_file_where_links_are_impossible(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for seeds in ("1", "2"):
        assert run("--seeds", seeds) == 0
        pointer = run.results / "dummy" / "latest"
        assert pointer.is_file()
        assert pointer.with_name(pointer.read_text()) == latest(run.results, "dummy")
        assert run.stored().config["seeds"] == int(seeds)
    assert run("--redraw", str(pointer), analysis=dummy_analysis.ANALYSIS) == 0
    assert (run.stored().folder / "figures" / "alphas.png").exists()


def test_a_figure_that_fails_costs_neither_the_others_nor_the_results(run, capsys):
    assert run("--seeds", "2", "--problem", "nan", analysis=dummy_analysis.ANALYSIS) == 0
    assert "Figure failed: spoilt: ValueError: nothing finite to draw" in capsys.readouterr().out
    folder = run.stored().folder
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["alphas.pdf", "alphas.png"]
    assert "spoilt could not be drawn: ValueError: nothing finite to draw" in (folder / "report.md").read_text()


def test_a_run_without_a_single_measurement_fails(run, capsys):
    def fail(cell, context):
        raise RuntimeError("no")

    assert run("--seeds", "2", analysis=changed(measure=fail)) == 1
    assert "Cells without measurements: 8" in capsys.readouterr().out
