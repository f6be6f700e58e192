"""Cells measured side by side. The processes are forked from one that has imported everything, to save time."""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import dummy_analysis
import pandas as pd
import pytest

from curvlab.study import Cell, MemoryShortage, execution, workers
from curvlab.study.chunks import Chunking
from curvlab.study.execution import Plan
from curvlab.study.executors import local
from curvlab.tools.errors import DataUnavailable
from curvlab.tools.storage import StorageFull

ANALYSIS = dummy_analysis.UNDRAWN
STRUCK = "experiment=numbers, structure=full, offset=0.0, seed="


def measuring(measure):
    """The dummy with another measurement."""
    return replace(ANALYSIS, experiments=(replace(dummy_analysis.NUMBERS, measure=measure),))


@pytest.fixture
def forked(monkeypatch):
    """Let workers start at once and be worth it; a dummy that takes its environment along to them."""
    monkeypatch.setattr(workers, "START", "forkserver")
    monkeypatch.setenv("DUMMY_CLAIM", "1.0")

    def dummy():
        environment = {name: value for name, value in os.environ.items() if name.startswith("DUMMY_")}
        return measuring(partial(dummy_analysis.measure_in, environment))

    return dummy


def estimate(cells=16, **options):
    """What the dummy would take, for so many of its cells."""
    plan = Plan.of(ANALYSIS, dummy_analysis.Options(**options))
    return plan.estimate(plan.cells[:cells])


def log_of(folder):
    return (folder / "log.txt").read_text()


def test_chunks_are_runs_of_neighbours_of_a_bounded_cost():
    cells = [Cell({"seed": seed}) for seed in range(100)]
    costs = {cell: 25.0 if cell["seed"] % 10 == 0 else 0.5 for cell in cells}
    for count, limit in ((2, 10.0), (40, sum(costs.values()) / 320)):
        chunks = Chunking().chunks(costs, count)
        assert [cell for chunk in chunks for cell in chunk] == cells
        totals = [sum(costs[cell] for cell in chunk) for chunk in chunks]
        assert all(total <= limit or len(chunk) == 1 for total, chunk in zip(totals, chunks, strict=True))
        assert all(total + costs[after[0]] > limit for total, after in zip(totals, chunks[1:], strict=False))


def test_how_many_workers(monkeypatch):
    monkeypatch.setattr(local, "cores", lambda: 4)
    assert estimate().workers == 1, "too little work"
    monkeypatch.setenv("DUMMY_CLAIM", "1.0")
    assert estimate().workers == 4
    assert estimate(workers=2).workers == 2
    assert estimate(workers=1).workers == 1
    assert estimate(workers=99).workers == 16, "no more than there is work for"
    assert estimate(device="meta").workers == 1
    assert estimate(device="meta", workers=2).workers == 2
    assert estimate(cells=0).workers == 1


def test_an_analysis_that_cannot_be_sent_stays_in_one_process(run, monkeypatch):
    monkeypatch.setenv("DUMMY_CLAIM", "1.0")
    local = measuring(lambda cell, context: dummy_analysis.measure(cell, context))
    assert run("--seeds", "4", "--workers", "2", analysis=local) == 0
    assert len(run.measured) == 16
    assert "one worker instead of 2, because dummy cannot be sent" in log_of(run.stored().folder)


def test_workers_are_as_many_as_fit_into_memory(monkeypatch, caplog):
    monkeypatch.setenv("DUMMY_CLAIM", "1.0")
    caplog.set_level(logging.INFO, "curvlab")
    for mebibytes, fitting in ((12, 4), (11, 3), (3, 1), (1, 1)):
        monkeypatch.setattr(execution, "available_memory", lambda _, free=mebibytes: free * 2.0**20)
        found = estimate(workers=4)
        assert (found.workers, found.memory) == (fitting, fitting * 3 * 2**20)
    assert "3 workers instead of 4, for 11.0 MiB of memory" in caplog.text


def test_workers_measure_what_one_process_does_and_one_that_dies_takes_one_cell_along(run, forked, capsys):
    assert run("--problem", "killed", "--seeds", "6", "--workers", "2", analysis=forked()) == 3, (
        "memory ran out, it seems"
    )
    shown = capsys.readouterr()
    assert f"not enough memory for cell {STRUCK}" in shown.err
    assert "its process died (killed, most likely because memory ran out; fewer --workers need less)" in shown.err
    assert "[24/24]" in shown.out
    found = run.stored()
    assert {str(failure.cell): failure.reason.partition(" (")[0] for failure in found.failures} == {
        f"{STRUCK}1": "RuntimeError: this cell always fails",
        f"{STRUCK}2": "its process died",
        f"{STRUCK}3": "its process died",
    }
    log = log_of(found.folder)
    assert "measuring in 2 processes" in log
    assert f"cell {STRUCK}1 failed\nTraceback" in log
    assert f"cell {STRUCK}2 failed: its process died" in log
    assert f"cell {STRUCK}5: 2 observations" in log
    assert sorted(run.measured) == sorted(map(str, ANALYSIS.cells(dummy_analysis.Options(seeds=6))))
    assert multiprocessing.active_children() == []

    assert run("--problem", "failing", "--seeds", "6", "--workers", "1") == 0
    alone = run.stored().measurements
    died = alone["cell"].isin([failure.cell.key for failure in found.failures])
    pd.testing.assert_frame_equal(found.measurements, alone[~died].reset_index(drop=True))


def test_sigterm_stops_the_workers_and_keeps_what_they_finished(run, forked, monkeypatch):
    def stop():
        while len(list((run.results / ".cache" / "dummy").glob("*.json"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("DUMMY_SLEEP", "0.3")
    (run.results / ".cache" / "dummy").mkdir(parents=True)
    thread = threading.Thread(target=stop)
    thread.start()
    code = run("--seeds", "4", "--workers", "2", analysis=forked())
    thread.join()
    assert code == 130
    assert multiprocessing.active_children() == []
    stored = len(list((run.results / ".cache" / "dummy").glob("*.json")))
    [partial] = (run.results / "dummy").glob("*-partial")
    assert 3 <= stored < 16
    assert log_of(partial).count("observations in") <= stored
    assert f"interrupted; {stored} of 16 cells are finished" in log_of(partial)

    monkeypatch.delenv("DUMMY_SLEEP")
    assert run("--seeds", "4", "--workers", "2", analysis=forked()) == 0
    assert len(run.measured) == 16 - stored


def test_a_cell_that_cannot_be_stored_stops_the_workers(run, forked, capsys):
    folder = run.results / ".cache" / "dummy"
    folder.mkdir(parents=True)
    plan = Plan.of(ANALYSIS, dummy_analysis.Options(seeds=4, results=run.results))
    plan.cache.path(plan.cells[5]).mkdir()
    assert run("--seeds", "4", "--workers", "2", analysis=forked()) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert multiprocessing.active_children() == []


class Unloadable:
    """A measurement that ends the process into which it is sent."""

    __call__ = staticmethod(dummy_analysis.measure)

    def __reduce__(self):
        return os._exit, (1,)


def test_workers_that_cannot_start_leave_the_work_to_this_process(run, forked):
    assert run("--seeds", "4", "--workers", "2", analysis=measuring(Unloadable())) == 0
    assert "worker processes cannot be started" in log_of(run.stored().folder)
    assert len(run.measured) == 16


@pytest.mark.parametrize(
    "error",
    [DataUnavailable("no data"), MemoryShortage("cell", "1 B", 0.0, "--widths"), StorageFull(Path("file"), 2, 1)],
)
def test_errors_travel_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), 3)
