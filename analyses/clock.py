"""Seconds of steps of several methods that run in turn in one process, so that whatever slows the machine slows all.

On the CPU it is processor time on one thread, which does not run while another process has the core (caches and memory are
still shared), elsewhere the clock, synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

WARM_UP = 3
ROUNDS = 3


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(device: str) -> float:
    """Return the time that has passed on a device."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_per_step(runs: Mapping[str, Callable[[int], float]], steps: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of a step of every method, after some steps to warm up.

    Args:
        runs: what takes a number of steps and returns their seconds, by method.
        steps: that are timed at once, a multiple of the period of work that not every step does.
        rounds: of which the median is taken.
    """
    with one_thread():
        for run in runs.values():
            run(WARM_UP)
        found = [{name: run(steps) / steps for name, run in runs.items()} for _ in range(rounds)]
    return {name: float(np.median([seconds[name] for seconds in found])) for name in runs}
