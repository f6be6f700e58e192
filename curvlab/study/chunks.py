"""Cells in chunks: neighbours that go to one process or machine together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from curvlab.study.cells import Cell


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Chunking:
    """How long chunks are.

    Attributes:
        per_worker: How many make up a worker's share of the work, so that none waits long for the last.
        least: Seconds that one takes at least, however little that share is.
        most: Seconds that one takes at most, whatever the share is: what is lost if its process dies.
    """

    per_worker: int = 8
    least: float = 0.0
    most: float = 10.0

    def chunks(self, costs: Mapping[Cell, float], workers: int) -> list[list[Cell]]:
        """The cells in order, in chunks of bounded ``costs`` in seconds.

        Neighbours share what their analysis keeps from one cell to the next, so a chunk goes to one worker whole. A cell
        above the limit is a chunk of its own.
        """
        limit = min(max(sum(costs.values()) / (self.per_worker * workers), self.least), self.most)
        chunks: list[list[Cell]] = []
        filled = 0.0
        for cell, seconds in costs.items():
            if not chunks or filled + seconds > limit:
                chunks.append([])
                filled = 0.0
            chunks[-1].append(cell)
            filled += seconds
        return chunks
