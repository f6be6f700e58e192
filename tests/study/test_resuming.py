"""What a run takes from those before it: after an interruption, with more seeds, in shards, from a configuration."""

import multiprocessing
import os
import re
import shlex
import signal
import time
from dataclasses import replace

import dummy_analysis
import pandas as pd
import pytest
from dummy_analysis import UNDRAWN, changed

from curvlab.study import latest, load, main


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
    assert run("--seeds", "1", analysis=replace(UNDRAWN, version=2)) == 0
    assert len(run.measured) == 4
    assert run("--seeds", "1", analysis=replace(UNDRAWN, data_hash=lambda _: "other")) == 0
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
    assert main(UNDRAWN, words[3:]) == 0
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
