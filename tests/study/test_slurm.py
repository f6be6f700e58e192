"""Cells measured by jobs of Slurm: many cells a job, one array of jobs, and what becomes of those that end early."""

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import dummy_analysis
import pandas as pd
import pytest
from executor_cases import WITHOUT, log_of, measuring, plain
from own_executors import pretended_slurm

from curvlab.study.execution import Plan
from curvlab.study.executors import Lost
from curvlab.study.executors.parcel import Parcel, measured
from curvlab.study.executors.slurm_jobs import Slurm

pytestmark = pytest.mark.skipif(WITHOUT["submitit"], reason="submitit is not installed")


def out_of_time(folder, environment, cell, context):
    """The dummy; on one cell its job is told once that its time is up."""
    marker = Path(folder) / "told"
    if cell["structure"] == "block-diagonal" and cell["seed"] == 1 and not marker.exists():
        marker.touch()
        signal.raise_signal(signal.SIGUSR2)
    return dummy_analysis.measure_in(environment, cell, context)


def test_a_job_whose_time_is_up_hands_back_what_it_has_and_the_rest_goes_into_another(run, alone):
    options = ("--executor", "slurm", "--executor-options", "cluster=local", "cpus=1", "partition=any")
    analysis = measuring(partial(out_of_time, str(run.results.parent)))
    assert run("--seeds", "2", "--workers", "1", *options, analysis=analysis) == 0
    assert len(run.measured) == len(set(run.measured)) == 8
    assert run.stored().failures == ()
    assert log_of(run.stored().folder).count("2 observations in") == 8
    pd.testing.assert_frame_equal(run.stored().measurements, alone(2))


def test_the_files_of_jobs_are_the_users_alone_and_stay_if_they_explain_why_one_was_lost(run, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    plan = Plan.of(plain(), dummy_analysis.Options(seeds=1, results=run.results))
    plan.cache.folder.mkdir(parents=True)
    parcel = Parcel.of(plan.task(), shared=True)
    slurm = Slurm(cluster="local")
    dead = slurm.submit(measured, parcel, list(plan.cells))
    while not dead.done():
        time.sleep(0.01)
    with pytest.raises(Lost, match="its output is in") as lost:
        dead.result()
    slurm.submit(measured, parcel, list(plan.cells))
    slurm.close()
    folder = Path(re.search(r"its output is in (\S+)", lost.value.reason)[1]).parent
    assert list(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_slurm_gets_one_array_of_jobs_with_many_cells_each(run, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    record = pretended_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    options = ("partition=gpu", "time=30", "mem=8", "cpus=2", "account=physics")
    analysis = replace(
        plain(), experiments=tuple(replace(one, seconds=40.0) for one in plain().experiments)
    )  # 80 s: one cell more than a minute
    assert (
        run("--seeds", "2", "--workers", "3", "--executor", "slurm", "--executor-options", *options, analysis=analysis)
        == 0
    )
    assert len(run.measured) == 8
    script = record.read_text()
    for line in ("partition=gpu", "time=30", "mem=8GB", "cpus-per-task=2", "account=physics", "array=0-3%3"):
        assert f"#SBATCH --{line}" in script
    assert "cancelled" not in script
    assert not list((run.results / ".cache" / "dummy").glob("*.jobs"))


def test_chunks_for_slurm_fill_a_quarter_of_a_job_and_a_minute_at_least(monkeypatch):
    costs = dict.fromkeys(Plan.of(dummy_analysis.UNDRAWN, dummy_analysis.Options(seeds=100)).cells, 10.0)
    slurm = Slurm(cluster="local", time=20)
    assert {len(chunk) for chunk in slurm.chunking.chunks(costs, 4)} == {30, 10}, "5 minutes of 20"
    assert {len(chunk) for chunk in slurm.chunking.chunks(costs, 400)} == {6, 4}, "a minute"
