"""Scripts in several processes, each of which leaves what it found in a file of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed


def run(script: Path, processes: int, file: Path, *arguments: str) -> list[Any]:
    """Run a script, which is given the file's name first, and return what each process has saved as `FILE.RANK`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(processes)]


def leave(found: Any, file: str) -> NoReturn:
    """End a script's process once all have saved what they found, without a call of destructors.

    Threads of gloo that are still there when torch is torn down abort a process now and then.
    """
    torch.save(found, f"{file}.{os.environ['RANK']}")
    distributed.barrier()
    os._exit(0)
