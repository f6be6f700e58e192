"""Cells measured by pools, Ray, Slurm and executors of one's own: the same numbers, and nothing lost that an executor loses."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import dummy_analysis
import own_executors
import pandas as pd
import pytest
from dummy_analysis import UNDRAWN
from executor_cases import POOL, PROCESSES, RAY, SLURM, THREADS, log_of, measuring, plain
from own_executors import Losing, Short, lost

import curvlab.study.executors
from analyses.gnn_natural_gradient.experiments.timing import SECONDS as PER_EPOCH
from analyses.training.comparison import SECONDS as PER_STEP
from curvlab.study import Analysis, Experiment, latest, main
from curvlab.study.execution import Plan
from curvlab.study.executors import EXECUTORS
from curvlab.study.executors.parcel import Parcel, measured
from curvlab.study.registry import ANALYSES

TWO = ("--seeds", "4", "--workers", "2")


def struck(folder, once, always, environment, cell, context):
    """The dummy, whose process is killed on a cell of one seed the first time, and on one of another seed every time."""
    marker = Path(folder) / "struck"
    full = cell["structure"] == "full" and cell["offset"] == 0.0
    if full and (cell["seed"] == always or (cell["seed"] == once and not marker.exists())):
        if cell["seed"] == once:
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return dummy_analysis.measure_in(environment, cell, context)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two cores on this machine."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()


@pytest.fixture
def executor(request):
    """Options that choose an executor; Ray's has a cluster to go to."""
    if "ray" in request.param:
        request.getfixturevalue("cluster")
    return request.param


def failures_of(results):
    """The reason of each failure, by seed."""
    return {failure.cell["seed"]: failure.reason for failure in results.failures}


def without(failures, measurements):
    """Measurements but for those of failed cells."""
    failed = measurements["cell"].isin([failure.cell.key for failure in failures])
    return measurements[~failed].reset_index(drop=True)


@pytest.mark.parametrize("executor", [THREADS, PROCESSES], indirect=True)
def test_a_pool_measures_what_one_process_does_and_logs_it_once(run, executor, alone):
    assert run(*TWO, "--problem", "failing", *executor, analysis=plain()) == 0
    assert len(run.measured) == len(set(run.measured)) == 16
    found = run.stored()
    assert failures_of(found) == {1: "RuntimeError: this cell always fails"}
    log = log_of(found.folder)
    assert log.count("2 observations in") == 15
    assert log.count("Traceback") == 1
    pd.testing.assert_frame_equal(found.measurements, without(found.failures, alone(4)))
    assert multiprocessing.active_children() == []
    assert {path.suffix for path in (run.results / ".cache" / "dummy").iterdir()} == {".json"}

    assert run("--seeds", "5", "--workers", "2", "--problem", "failing", *executor, analysis=plain()) == 0
    assert len(run.measured) == 5, "only what is missing, and what failed"


def test_a_killed_worker_of_ray_loses_nothing_and_a_cell_that_always_kills_it_fails_alone(run, cluster, alone):
    analysis = measuring(partial(struck, str(run.results.parent), 0, 2))
    assert run(*TWO, "--problem", "failing", "--executor", "ray", analysis=analysis) == 0
    found = run.stored()
    assert failures_of(found) == {
        1: "RuntimeError: this cell always fails",
        2: "its job was lost (its worker died, as one does that is killed or whose memory runs out)",
    }
    log = log_of(found.folder)
    assert log.count("2 observations in") >= 14
    assert "structure=full, offset=0.0, seed=0: its job was lost" in log
    assert "measuring in 2 jobs at a time, by --executor ray" in log
    pd.testing.assert_frame_equal(found.measurements, without(found.failures, alone(4)))
    assert cluster.is_initialized(), "a cluster that was there before stays"


def test_a_pool_that_breaks_loses_nothing_and_a_cell_that_always_breaks_it_fails_alone(run, alone):
    analysis = measuring(partial(struck, str(run.results.parent), 0, 2))
    assert run(*TWO, *POOL, analysis=analysis) == 0
    found = run.stored()
    [(seed, reason)] = failures_of(found).items()
    assert (seed, reason.partition(":")[0]) == (2, "its job was lost (BrokenProcessPool")
    assert "is broken" in log_of(found.folder)
    pd.testing.assert_frame_equal(found.measurements, without(found.failures, alone(4)))


@pytest.fixture
def losing(monkeypatch):
    """An executor that loses jobs as it is told; what it was given stands in its `jobs`."""

    def make(**losses):
        executor = Losing({f"structure={name}": reasons for name, reasons in losses.items()})
        monkeypatch.setattr(own_executors, "OPEN", executor)
        return executor

    return make


def test_a_lost_job_is_done_again_cell_by_cell_and_three_times_at_most(run, losing):
    executor = losing(block=lost(2), full=lost(9))
    assert run("--seeds", "1", "--workers", "1", "--executor", "own_executors:OPEN", analysis=plain()) == 0
    assert {cell.split(", ")[1] for cell in run.measured} == {"structure=block-diagonal"}
    reasons = [failure.reason for failure in run.stored().failures]
    assert reasons == ["its job was lost (the roof fell in)"] * 2
    assert max(sum(job == other for other in executor.jobs) for job in executor.jobs) <= 3


def ending_the_run(environment, cell, context):
    """The dummy; the run is over after its second cell."""
    if cell["structure"] == "block-diagonal":
        next(context.cache.folder.glob("*.running")).unlink()
    return dummy_analysis.measure_in(environment, cell, context)


def test_a_job_measures_nothing_again_that_is_finished_and_ends_with_the_run(run):
    options = dummy_analysis.Options(seeds=1, results=run.results)
    plan = Plan.of(plain(), options)
    plan.cache.folder.mkdir(parents=True)
    parcel = Parcel.of(plan.task(), shared=True)
    with parcel.signed():
        before, again = measured(parcel, plan.cells[:2]), measured(parcel, plan.cells)
    assert [attempt.note == "by a job before" for attempt in again.attempts] == [True, True, False, False]
    assert [attempt.rows for attempt in again.attempts[:2]] == [attempt.rows for attempt in before.attempts]

    plan = Plan.of(measuring(ending_the_run), replace(options, scale=0.2))
    parcel = Parcel.of(plan.task(), shared=True)
    with parcel.signed():
        assert [attempt.cell for attempt in measured(parcel, plan.cells).attempts] == list(plan.cells[:2])


def checkpoint_of(parcel, cell):
    return parcel.unpacked().cache.checkpoint(cell)


def test_a_cell_for_which_jobs_are_too_short_fails_unless_its_checkpoint_moves_on(run, monkeypatch):
    options = ("--seeds", "1", "--offsets", "0", "--workers", "1", "--executor", "own_executors:OPEN")
    monkeypatch.setattr(own_executors, "OPEN", Short("full", 9))
    assert run(*options, analysis=plain()) == 0
    [reason] = failures_of(run.stored()).values()
    assert reason.startswith("3 jobs ran out of time in it")
    assert len(run.measured) == 1

    monkeypatch.setattr(own_executors, "OPEN", Short("full", 9, checkpoint_of))
    assert run(*options, analysis=plain()) == 0
    assert run.stored().failures == ()


def test_memory_that_runs_out_elsewhere_is_named(run, losing, capsys):
    losing(full=lost(9, out_of_memory=True, again=False))
    assert run("--seeds", "1", "--workers", "1", "--executor", "own_executors:OPEN", analysis=plain()) == 3
    shown = capsys.readouterr().err
    assert "not enough memory for cell experiment=numbers, structure=full" in shown
    assert "--offsets lowers it" in shown
    assert len(run.measured) == 2, "the other cells are measured"


def summed(environment, cell, context):
    """What the numbers of a seed add up to."""
    found = context.rows("numbers", seed=cell["seed"])
    return [{"quantity": "sum", "value": float(found["value"].sum())}]


@pytest.mark.parametrize("name", ["Apart", "threads_apart"])
def test_machines_that_share_no_folder_read_what_was_measured_before_and_their_results_are_kept(run, name):
    before = plain().experiments[0]
    after = Experiment(
        name="sums", cells=({},), measure=partial(summed, {}), varies=("draws",), seconds=1.0, after=("numbers",)
    )
    analysis = replace(UNDRAWN, experiments=(before, after))
    assert run(*TWO, "--executor", f"own_executors:{name}", analysis=analysis) == 0
    assert len(run.measured) == 16, "none is measured a second time where it is read"
    found = run.stored().measurements
    sums = found[found["quantity"] == "sum"].set_index("seed")["value"]
    pd.testing.assert_series_equal(
        sums, found[found["experiment"] == "numbers"].groupby("seed")["value"].sum(), check_names=False
    )
    assert run(*TWO, analysis=analysis) == 0
    assert run.measured == []


def found_data(environment, cell, context):
    """Whether the folder of data sets is known, and to whom."""
    return [{"quantity": "known", "value": float(Path(os.environ["CURVLAB_DATA"]).is_dir())}]


def test_jobs_are_told_where_data_sets_lie(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    forgetful = ("--executor", "own_executors:forgetful")
    assert run("--seeds", "2", "--workers", "2", *forgetful, analysis=measuring(found_data)) == 0
    assert set(run.stored().measurements["value"]) == {1.0}


def hanging(environment, cell, context):
    """The dummy, which takes minutes at later seeds."""
    time.sleep(300.0 if cell["seed"] > 1 else 0.0)
    return dummy_analysis.measure_in(environment, cell, context)


@pytest.mark.parametrize(
    "executor",
    [PROCESSES, RAY, SLURM],
    indirect=True,
)
def test_sigterm_stops_an_executor_and_the_next_run_goes_on(run, executor):
    def stop():
        while len(list((run.results / ".cache" / "dummy").glob("*.json"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    (run.results / ".cache" / "dummy").mkdir(parents=True)
    thread = threading.Thread(target=stop)
    start = time.monotonic()
    thread.start()
    assert run(*TWO, *executor, analysis=measuring(hanging)) == 130
    thread.join()
    assert time.monotonic() - start < 120, "cells that hang are not waited for"
    assert multiprocessing.active_children() == []
    stored = len(list((run.results / ".cache" / "dummy").glob("*.json")))
    assert 3 <= stored < 16
    assert run(*TWO, *executor, analysis=plain()) == 0
    assert len(run.measured) == 16 - stored


def test_shards_later_looks_and_fresh_runs_go_through_an_executor_too(run, capsys):
    executor = ("--executor", "concurrent.futures:ThreadPoolExecutor")
    for share in ("1/2", "2/2"):
        assert run("--seeds", "3", "--shard", share, *executor, analysis=plain()) == 0
        assert len(run.measured) == 6
    assert f"run dummy --seeds 3 {' '.join(executor)}" in capsys.readouterr().out.replace("\n", "")
    assert run("--seeds", "3", "--fresh", *executor, analysis=plain()) == 0
    assert len(run.measured) == 12
    assert run("--seeds", "auto", *executor, analysis=plain()) == 0
    assert len(run.measured) >= 36
    assert latest(run.results, "dummy") is not None


def test_a_dry_run_says_how_many_jobs_there_will_be(run, capsys):
    assert run("--dry-run", "--seeds", "4", "--workers", "3", *POOL, analysis=plain()) == 0
    shown = capsys.readouterr().out
    assert "in 3 jobs at a time, by --executor own_executors:processes" in shown
    assert "available" not in shown, "memory of other machines is not known"


def test_executors_of_ours_are_registered_as_anyones(monkeypatch):
    assert list(EXECUTORS)[:3] == ["local", "ray", "slurm"]
    EXECUTORS.register("mine", own_executors.processes)
    try:
        assert (
            curvlab.study.executors.machines("mine", {"max_workers": 1}).named(1)
            == "1 job at a time, by --executor mine"
        )
    finally:
        EXECUTORS.unregister("mine")


TIMED = (PER_STEP, PER_EPOCH)
"""The quantities that are measured with a clock."""


@pytest.mark.study
@pytest.mark.parametrize("executor", [PROCESSES, RAY, SLURM], indirect=True)
@pytest.mark.parametrize("name", list(ANALYSES))
def test_every_analysis_measures_the_same_by_every_executor(name, executor, tmp_path):
    analysis: Analysis = ANALYSES[name]
    entries = []
    for folder, words in (("local", ()), ("executor", executor)):
        shard = ("--seeds", "1", "--shard", "1/40", "--workers", "2", "--results", str(tmp_path / folder))
        assert main(analysis, [*shard, *words]) == 0
        found = sorted((tmp_path / folder / ".cache" / name).glob("*.json"))
        entries.append({path.name: _but_for_times(pd.read_json(path, typ="series")["rows"]) for path in found})
    assert entries[0] == entries[1] != {}


def _but_for_times(rows):
    return [row | {"value": None} if row["quantity"] in TIMED else row for row in rows]
