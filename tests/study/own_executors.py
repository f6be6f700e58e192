"""Executors of one's own: pools, one that breaks down, machines that see no folder of ours, and a Slurm that is none."""

import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from curvlab.study.executors import Lost
from curvlab.study.executors.parcel import Delivery


def processes(max_workers=2):
    """A pool of processes that are forked from one that has imported everything, to save time."""
    return ProcessPoolExecutor(max_workers, multiprocessing.get_context("forkserver"))


def forget():
    os.environ.pop("CURVLAB_DATA", None)


def forgetful():
    """A process that does not know where data sets lie."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), initializer=forget)


class Apart:
    """Machines that do not see the folder of the results."""

    capacity = 2

    def __init__(self, make=processes):
        self.pool = make(2)

    def submit(self, function, parcel, cells):
        return self.pool.submit(function, replace(parcel, sign=Path("/nowhere/at/all")), cells)

    def shutdown(self):
        self.pool.shutdown()


def threads_apart():
    return Apart(ThreadPoolExecutor)


class Losing:
    """It loses jobs as it is told to: each with a cell that matches loses it as many times as there are reasons."""

    capacity = 2

    def __init__(self, losses):
        self.losses, self.jobs = losses, []

    def submit(self, function, parcel, cells):
        self.jobs.append([str(cell) for cell in cells])
        future = Future()
        for cell in cells:
            for mark, reasons in self.losses.items():
                if mark in str(cell) and reasons:
                    future.set_exception(reasons.pop(0))
                    return future
        future.set_result(function(parcel, cells))
        return future


class Short:
    """Jobs that end before they come to a cell of one structure, the first few times; some leave a checkpoint every time."""

    capacity = 2

    def __init__(self, structure, times, checkpoint=None):
        self.structure, self.times, self.checkpoint = structure, times, checkpoint

    def submit(self, function, parcel, cells):
        future = Future()
        short = cells[0]["structure"] == self.structure and self.times > 0
        if short:
            self.times -= 1
        if short and self.checkpoint:
            path = self.checkpoint(parcel, cells[0])
            path.parent.mkdir(exist_ok=True)
            path.write_text("state")
            os.utime(path, ns=(self.times, self.times))
        future.set_result(Delivery(()) if short else function(parcel, cells))
        return future


OPEN = ThreadPoolExecutor(2)
NOTHING = object()


class Refusing:
    """It takes nothing."""

    def submit(self, *call):  # noqa: ARG002
        raise RuntimeError("closed for the season")


def lost(count, **how):
    return [Lost("the roof fell in", **how) for _ in range(count)]


SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
text = Path(sys.argv[1]).read_text()
Path({record!r}).open("a").write(text)
range_ = re.search(r"--array=0-(\\d+)", text)
for index in range(int(range_[1]) + 1) if range_ else [None]:
    array = {{}} if index is None else {{"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(index)}}
    environment = {{**os.environ, "SLURM_JOB_ID": "77", "SUBMITIT_EXECUTOR": "slurm", **array}}
    silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen(["bash", sys.argv[1]], env=environment, **silent, start_new_session=True)
print("Submitted batch job 77")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* || $1 == -* ]]; do [[ $1 == --*=* || $1 == --unbuffered ]] && shift || shift 2; done
exec "$@"
"""


def pretended_slurm(folder: Path) -> Path:
    """Commands that do what Slurm's do, as far as a run needs them, all jobs at once; the file in which they record scripts."""
    record = folder / "scripts.txt"
    sources = {
        "sbatch": SBATCH.format(python=sys.executable, record=str(record)),
        "srun": SRUN,
        "sacct": "#!/bin/bash\necho 'JobID|State|NodeList'\n",
        "scancel": f'#!/bin/bash\necho "cancelled $@" >> {record}\n',
    }
    for name, source in sources.items():
        (folder / name).write_text(source)
        os.chmod(folder / name, 0o755)  # noqa: PTH101
    return record
