"""Scripts in several processes, each of which leaves what it found in a file of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run(script: Path, processes: int, file: Path, *arguments: str) -> list[Any]:
    """Run a script, which is given the file's name first, and return what each process has saved as `FILE.RANK`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(processes)]
