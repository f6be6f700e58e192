"""The runner end to end, on the dummy analysis."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import dummy_analysis
import pandas as pd
import pytest

from curvlab.study import Claim, Equivalence, Experiment, latest, load, main, refuted, supported, undecided

ANALYSIS = replace(dummy_analysis.ANALYSIS, figures={})


def changed(**fields):
    """The dummy with another experiment."""
    return replace(ANALYSIS, experiments=(replace(dummy_analysis.NUMBERS, **fields),))


FOLDER_FILES = {
    "config.json",
    "environment.json",
    "measurements.parquet",
    "verdicts.json",
    "report.md",
    "log.txt",
    "figures",
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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_process_keeps_what_it_finished_and_the_same_command_goes_on(run, tmp_path, workers):
    environment = {"DUMMY_SLEEP": "0.2", "DUMMY_CLAIM": "1.0"}
    arguments = ["--seeds", "4", "--workers", workers, "--results", str(run.results)]
    output, errors = tmp_path / "output.txt", tmp_path / "errors.txt"
    output.touch()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=dummy_analysis.process, args=(environment, output, errors, arguments))
    process.start()
    while not re.search(r"^\[", output.read_text(), re.MULTILINE):  # the line of the first finished cell
        assert process.is_alive(), errors.read_text()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers, too
    process.join(60)
    assert (process.exitcode, errors.read_text()) == (130, "")
    assert "Interrupted: every finished cell is kept" in output.read_text()
    [partial] = (run.results / "dummy").glob("*-partial")
    assert latest(run.results, "dummy") is None
    kept = load(partial)
    assert not kept.complete
    finished = kept.measurements["cell"].nunique()
    assert 1 <= finished < 16
    assert len(kept.failures) == 16 - finished
    assert set(kept.verdicts["outcome"]) == {"inconclusive"}
    assert ("measuring in 2 processes" in (partial / "log.txt").read_text()) == (workers == "2")
    assert "partial" in (partial / "report.md").read_text()

    assert run("--seeds", "4") == 0
    assert len(run.measured) == 16 - finished
    assert not partial.exists()
    assert run.stored().complete
    assert set(run.stored().folder.iterdir()) >= {run.stored().folder / "log.txt"}


def stopping(signal_number, after):
    """The dummy, signalling its own process while it measures one of its cells."""
    count = iter(range(1000))

    def measure(cell, context):
        if next(count) == after:
            signal.raise_signal(signal_number)
        return dummy_analysis.measure(cell, context)

    return changed(measure=measure)


def test_sigterm_is_an_interruption_too_and_its_handler_is_put_back(run, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run("--seeds", "2", analysis=stopping(signal.SIGTERM, 3)) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(run.measured) == 3
    assert "Interrupted" in capsys.readouterr().out
    assert run("--seeds", "2") == 0
    assert len(run.measured) == 5


def test_an_interrupted_rerun_does_not_replace_complete_results(run):
    assert run("--seeds", "2") == 0
    complete = run.stored()
    assert run("--seeds", "2", "--fresh", analysis=stopping(signal.SIGINT, 3)) == 130
    pd.testing.assert_frame_equal(run.stored().measurements, complete.measurements)
    assert run.stored().folder == complete.folder


def test_ten_seeds_after_five_run_five_more(run, capsys):
    assert run("--seeds", "5") == 0
    assert len(run.measured) == 20
    first = run.stored().measurements
    assert run("--seeds", "10") == 0
    assert len(run.measured) == 20
    assert {line.rpartition("=")[2] for line in run.measured} == {"5", "6", "7", "8", "9"}
    assert "40 cells, 20 cached, 20 to run" in capsys.readouterr().out
    again = run.stored().measurements.query("seed < 5").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, first)


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        (["--seeds", "2", "--offsets", "0.0", "1.0", "2.0"], 4),  # an axis: the old cells stay
        (["--seeds", "2", "--scale", "0.2"], 8),  # changes every measurement
        (["--seeds", "2", "--dtype", "float32"], 8),
        (["--seeds", "2", "--problem", "diverging"], 8),
        (["--seeds", "2", "--fresh"], 8),
        (["--seeds", "2", "--workers", "1"], 0),
        (["--seeds", "2", "--claims", "D-1", "--quiet"], 0),
    ],
)
def test_what_the_cache_depends_on(run, arguments, measured):
    assert run("--seeds", "2") == 0
    assert run(*arguments) == 0
    assert len(run.measured) == measured


def test_another_version_or_other_data_are_measured_again(run):
    assert run("--seeds", "1") == 0
    assert run("--seeds", "1", analysis=replace(ANALYSIS, version=2)) == 0
    assert len(run.measured) == 4
    assert run("--seeds", "1", analysis=replace(ANALYSIS, data_hash=lambda _: "other")) == 0
    assert len(run.measured) == 4
    assert run("--seeds", "1") == 0
    assert run.measured == []


def test_a_damaged_cache_entry_is_measured_again_and_logged(run):
    assert run("--seeds", "2") == 0
    whole = run.stored().measurements
    entry = sorted((run.results / ".cache" / "dummy").glob("*.json"))[0]
    entry.write_bytes(entry.read_bytes()[:40])
    assert run("--seeds", "2") == 0
    assert len(run.measured) == 1
    assert f"{entry.name} of cell {run.measured[0]} is damaged" in (run.stored().folder / "log.txt").read_text()
    pd.testing.assert_frame_equal(run.stored().measurements, whole)


def test_shards_share_the_cache_and_the_plain_command_assembles(run, capsys):
    shares = []
    for index in (1, 2, 3):
        assert run("--seeds", "3", "--shard", f"{index}/3") == 0
        shares.append(run.measured)
        out = capsys.readouterr().out
        assert not (run.results / "dummy").exists()
    assert sorted(map(len, shares)) == [4, 4, 4]
    assert len({cell for share in shares for cell in share}) == 12
    [assemble] = re.findall("assemble: (.*)", out)
    words = shlex.split(assemble)
    assert "--shard" not in words
    assert main(ANALYSIS, words[3:]) == 0
    assert run("--seeds", "3") == 0
    assert run.measured == []
    assert run.outcomes()["D-2"] == "supported"


def test_the_recorded_configuration_reproduces_the_run(run):
    assert run("--seeds", "3", "--offsets", "0", "1", "--scale", "0.05", "--claims", "D-1", "D-3") == 0
    first = run.stored()
    assert first.config["scale"] == 0.05
    assert run("--config", str(first.folder / "config.json")) == 0
    assert run.measured == []
    assert run.stored().folder == first.folder
    assert list(run.stored().verdicts["claim"]) == ["D-1", "D-3"]
    assert run("--config", str(first.folder / "config.json"), "--seeds", "4") == 0
    assert run.stored().config == {**first.config, "seeds": 4}


def test_claims_run_only_the_cells_that_they_need(run):
    assert run("--seeds", "3", "--claims", "D-2", "D-3") == 0
    assert len(run.measured) == 3
    assert all("structure=block-diagonal, offset=0.0" in cell for cell in run.measured)


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
    drawn = replace(ANALYSIS, figures={"alphas": dummy_analysis.alphas})
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
    assert main(ANALYSIS, ["--seeds", "1", "--results", str(tmp_path / "file")]) == 2
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
    assert "expected: refuted, because it was made so" in out
    assert not run.results.exists()


def test_help_says_what_a_reader_needs(capsys):
    assert main(ANALYSIS, ["--help"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Does a noisy number lie where its structure says?",
        "A. Nobody, On Nothing, 2026",
        "48 cells, about a second",
        "D-5  An offset of 1 does not matter.",
        "curvlab run dummy --seeds 5",
        "curvlab run dummy --claims D-1 --dry-run",
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


def test_a_figure_that_fails_costs_neither_the_others_nor_the_results(run, capsys):
    assert run("--seeds", "2", "--problem", "nan", analysis=dummy_analysis.ANALYSIS) == 0
    assert "Figure failed: spoilt: ValueError: nothing finite to draw" in capsys.readouterr().out
    folder = run.stored().folder
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["alphas.pdf", "alphas.png"]
    assert "spoilt" not in (folder / "report.md").read_text()


def test_a_value_that_an_option_names_twice_is_wrong_usage(run, capsys):
    assert run("--seeds", "1", "--offsets", "0", "1", "1") == 2
    assert "--offsets names 1.0 2 times; name each once" in capsys.readouterr().err


def test_names_that_occur_twice_are_a_bug_of_the_analysis(run):
    with pytest.raises(ValueError, match="two experiments of dummy have one name: numbers"):
        replace(ANALYSIS, experiments=(dummy_analysis.NUMBERS,) * 2)

    def claims(config) -> list[Claim]:
        return [*dummy_analysis.claims(config)[:1]] * 2

    with pytest.raises(ValueError, match="dummy has claims that are called the same: D-1"):
        run("--seeds", "1", analysis=changed(claims=claims))


CHOICE = Experiment(name="choice", cells=lambda _: [{"rival": rival, "seed": 100} for rival in (1, 2, 3)],
                    measure=lambda cell, _: [{"quantity": "cost", "value": float(cell["rival"])}])  # fmt: skip
"""What an experiment chooses by."""


def chosen(cell, context):
    costs = context.rows("choice", rival=(2, 3)).set_index("rival")["value"]
    return [{"quantity": "chosen", "value": float(costs.idxmin())}]


JUDGED = Experiment(
    name="judged",
    cells=lambda config: [{"arm": "best"}] if config.scale < 1 else [],
    measure=chosen,
    claims=lambda _: [
        Claim(id="best", statement="The cheapest is 2.", rule=Equivalence("chosen", 2.0, 0.1), source="nowhere",
              measured="which is cheapest", expected=supported("it was made so"))
    ],
    after=("choice",),
)  # fmt: skip
CHOOSING = replace(ANALYSIS, experiments=(JUDGED, CHOICE))


def test_an_experiment_reads_what_those_before_it_measured(run, capsys):
    assert run("--seeds", "8", analysis=CHOOSING) == 0
    assert [str(cell)[:17] for cell in CHOOSING.cells(dummy_analysis.Options(seeds=3))] == (
        ["experiment=choice"] * 3 + ["experiment=judged"] * 3
    )
    assert run.outcomes() == {"best": "supported"}
    capsys.readouterr()
    assert run("--seeds", "9", "--claims", "best", analysis=CHOOSING) == 0
    assert "12 cells, 11 cached, 1 to run" in capsys.readouterr().out


def test_a_shard_measures_what_it_reads_and_nobody_has_measured(run):
    assert run("--seeds", "3", "--shard", "6/6", analysis=CHOOSING) == 0
    assert len(list((run.results / ".cache" / "dummy").glob("*.json"))) == 3, "a cell of its own, and two that it reads"


def test_a_fresh_run_reads_only_what_it_measured_itself(run):
    assert run("--seeds", "2", analysis=CHOOSING) == 0
    dearer = replace(CHOICE, measure=lambda cell, _: [{"quantity": "cost", "value": -float(cell["rival"])}])
    other = replace(ANALYSIS, experiments=(JUDGED, dearer))
    assert run("--seeds", "2", analysis=other) == 0
    assert run.outcomes() == {"best": "inconclusive"}, "two seeds of one value"
    assert list(run.stored().measurements.query("quantity == 'chosen'")["value"]) == [2.0, 2.0]
    assert run("--seeds", "2", "--fresh", analysis=other) == 0
    assert list(run.stored().measurements.query("quantity == 'chosen'")["value"]) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda context: context.rows("judged"), "experiment 'judged' reads what 'judged' measured; name that in its"),
        (lambda context: context.rows("choice", rival=9), "experiment 'choice' plans no cell with rival 9"),
    ],
)
def test_what_cannot_be_read_is_named(run, read, message):
    broken = replace(JUDGED, measure=lambda _, context: read(context))
    assert run("--seeds", "2", analysis=replace(ANALYSIS, experiments=(broken, CHOICE))) == 0
    assert all(failure.reason.startswith(f"LookupError: {message}") for failure in run.stored().failures)
    assert len(run.stored().failures) == 2


def test_experiments_that_wait_for_each_other_or_for_nobody_are_refused():
    with pytest.raises(ValueError, match="experiments of dummy wait for each other: choice, judged"):
        replace(ANALYSIS, experiments=(JUDGED, replace(CHOICE, after=("judged",))))
    with pytest.raises(ValueError, match="experiment 'judged' comes after choice, unknown here"):
        replace(ANALYSIS, experiments=(JUDGED,))


def test_a_claim_without_planned_cells_is_not_measured_and_in_no_family(run, capsys):
    both = replace(ANALYSIS, experiments=(dummy_analysis.NUMBERS, JUDGED, CHOICE))
    assert run("--scale", "1.5", analysis=both) == 0
    verdicts = run.stored().verdicts.set_index("claim")
    assert verdicts.loc["best", "outcome"] == "not measured"
    assert "not measured: best: the configuration plans no cell with experiment judged" in capsys.readouterr().out
    assert "| best | the configuration plans no cell with experiment judged |" in (
        (run.stored().folder / "report.md").read_text()
    )
    assert run("--scale", "1.5") == 0
    alone = run.stored().verdicts.set_index("claim")
    assert list(alone["p_adjusted"].dropna()) == list(verdicts.loc[alone.index, "p_adjusted"].dropna())


def test_a_run_without_a_single_measurement_fails(run, capsys):
    def fail(cell, context):
        raise RuntimeError("no")

    assert run("--seeds", "2", analysis=changed(measure=fail)) == 1
    assert "Cells without measurements: 8" in capsys.readouterr().out
