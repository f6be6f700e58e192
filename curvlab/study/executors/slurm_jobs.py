"""Jobs of Slurm, in job arrays, by submitit (https://github.com/facebookincubator/submitit)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from curvlab.study.cells import Cell
from curvlab.study.chunks import Chunking, cores
from curvlab.study.executors.interface import Lost, needed
from curvlab.study.executors.parcel import Parcel, Stopped
from curvlab.study.faults import UsageError
from curvlab.study.workers import variables

SHARE = 0.25
"""Part of a job's time that its cells are planned to fill: estimates are rough."""
SHORTEST = 60.0
"""Seconds that a job takes at least, as it waits and starts for as long."""
LONGEST_ARRAY = 1000
"""Jobs of an array; Slurm takes no more where it is not set up otherwise."""
AT_A_TIME = 256
"""Jobs that run at a time, unless the user says how many."""
ENDING = 10.0
"""Seconds that jobs on this machine are given to end."""
SHORT = {"cpus": "cpus_per_task", "gpus": "gpus_per_node", "mem": "mem_gb"}
"""Settings by shorter names."""
GENERAL = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)
"""Settings that submitit has for every cluster; all others are Slurm's."""
FINAL = ("OUT_OF_ME", "CANCELLED")
"""States after which another try is in vain, or not wanted."""


class Slurm:
    """Executor of Slurm jobs, many cells in each; results and code lie in folders that all machines see.

    Args:
        cluster: ``slurm``; ``local`` for processes of this machine, to try out a run.
        time: Minutes that a job may take. One whose time is up hands back what it has, and the rest goes into another.
        **settings: Others, by the names of `submitit.AutoExecutor` (``mem_gb``, ``cpus_per_task``, ``gpus_per_node``; in
            short ``mem``, ``cpus``, ``gpus``) or of sbatch (``partition``, ``account``, ``qos``, ``constraint``, ``setup``,
            …).

    Raises:
        UsageError: submitit is not installed, there is no Slurm here, or it does not know a setting.
    """

    starting = 30.0
    shares_files = True

    def __init__(self, cluster: str = "slurm", time: int = 60, **settings: Any) -> None:
        self.submitit = needed("submitit", "slurm", "submitit>=1.5")
        self.cluster, self.time = cluster, time
        self.queues = cluster == "slurm"
        self.chunking = Chunking(per_worker=1, least=SHORTEST, most=SHARE * 60 * time)
        named = {SHORT.get(name, name): value for name, value in settings.items()}
        self.settings = {name if name in GENERAL else f"slurm_{name}": value for name, value in named.items()}
        self.threads = int(named.get("cpus_per_task", 1))
        self.stops = int(getattr(signal, f"SIG{self.submitit.JobEnvironment.USR_SIG}"))
        self.going: list[_SlurmFuture] = []
        self.folders: set[Path] = set()
        self.kept: set[Path] = set()
        self._executor(Path(tempfile.gettempdir()))

    @property
    def capacity(self) -> int:
        """As many jobs as may run at a time; one a core if they run here."""
        return int(self.settings.get("slurm_array_parallelism", AT_A_TIME)) if self.queues else cores()

    def submit_all(
        self, function: Callable[..., Any], parcel: Parcel, chunks: Sequence[list[Cell]], workers: int
    ) -> list[_SlurmFuture]:
        """Queue a job for each chunk, so many of which run at a time."""
        folder = parcel.sign.with_suffix(".jobs")
        folder.mkdir(mode=0o700, exist_ok=True)  # whoever writes there decides what jobs and this process unpickle
        self.folders.add(folder)
        executor = self._executor(folder, slurm_array_parallelism=workers)
        futures: list[_SlurmFuture] = []
        for start in range(0, len(chunks), LONGEST_ARRAY):
            array = chunks[start : start + LONGEST_ARRAY]
            with variables(self.threads), executor.batch():
                jobs = [executor.submit(_in_job, self.stops, function, parcel, chunk) for chunk in array]
            futures += [_SlurmFuture(job, self) for job in jobs]
        self.going = [future for future in self.going if not future.settled] + futures
        return futures

    def submit(self, function: Callable[..., Any], parcel: Parcel, chunk: list[Cell], /) -> _SlurmFuture:
        """Queue one job."""
        return self.submit_all(function, parcel, [chunk], 1)[0]

    def close(self) -> None:
        """Cancel what is queued or runs, and remove the files of jobs, unless one was lost that they explain."""
        left = [future.job for future in self.going if not future.settled and not future.done()]
        if left and self.queues:
            subprocess.call(["scancel", *sorted({job.job_id.partition("_")[0] for job in left})])
        elif left:
            for job in left:
                job.cancel(check=False)
            end = time.monotonic() + ENDING
            while time.monotonic() < end and not all(job.done() for job in left):
                time.sleep(0.05)
        self.going = []
        for folder in self.folders - self.kept:
            shutil.rmtree(folder, ignore_errors=True)
        self.folders = set()

    def _executor(self, folder: Path, **more: Any) -> Any:
        settings = {"timeout_min": self.time, "name": "curvlab", **self.settings, **more}
        try:
            executor = self.submitit.AutoExecutor(folder, cluster=self.cluster)
            executor.update_parameters(**settings)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"--executor slurm cannot be set up: {error}. Settings are given as --executor-options partition=gpu time=60 "
                "mem=8; cluster=local tries a run out without Slurm"
            ) from error
        return executor


class _SlurmFuture:
    """A job, and the folder of its files, which are kept if it is lost."""

    def __init__(self, job: Any, executor: Slurm) -> None:
        self.job, self.executor, self.settled = job, executor, False

    def done(self) -> bool:
        return bool(self.job.done())

    def result(self) -> Any:
        self.settled = True
        try:
            return self.job.result()
        except self.executor.submitit.core.utils.FailedJobError:
            raise
        except self.executor.submitit.core.utils.UncompletedJobError as error:
            self.executor.kept.add(self.job.paths.folder)
            state = str(self.job.state).upper()
            reason = f"job {self.job.job_id} ended in state {state}; its output is in {self.job.paths.stderr}"
            raise Lost(
                reason, out_of_memory=state.startswith("OUT_OF_ME"), again=not state.startswith(FINAL)
            ) from error

    def cancel(self) -> None:
        self.job.cancel(check=False)


def _in_job(stops: int, function: Callable[..., Any], parcel: Parcel, cells: Sequence[Cell]) -> Any:
    """Call a function so that the signal by which Slurm announces the end of a job ends it in time."""
    if parcel.is_here:
        return function(parcel, cells)
    signal.signal(stops, _stop)
    try:
        return function(parcel, cells)
    finally:
        signal.signal(stops, signal.SIG_IGN)


def _stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Stopped
