"""Processes of this machine."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from curvlab.study.cells import Cell
from curvlab.study.chunks import Chunking, cores
from curvlab.study.task import Attempt, Task
from curvlab.study.workers import in_processes


class Local:
    """Processes of this machine, one a worker; a single worker is this process."""

    here = True
    chunking = Chunking()
    starting = 3.0

    def capacity(self, device: str) -> int:
        """One a core on the CPU, one on another device."""
        return cores() if torch.device(device).type == "cpu" else 1

    def named(self, workers: int) -> str:
        """So many processes; nothing if it is this one."""
        return "" if workers == 1 else f"{workers} processes"

    def outcomes(self, task: Task[Any], costs: Mapping[Cell, float], workers: int) -> Iterator[Attempt]:
        """Measure cells in so many processes."""
        if workers == 1:
            return map(task, costs)
        return in_processes(task, self.chunking.chunks(costs, workers), workers)

    def close(self) -> None:
        """Nothing is left to be ended."""
