"""Seconds of steps of several methods that run in turn in one process, so that whatever slows the machine slows all.

On the CPU it is processor time on one thread, which does not run while another process has the core (caches and memory are
still shared), elsewhere the clock, synchronised.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import torch

WARM_UP = 3


@contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def no_older_garbage() -> Iterator[None]:
    """Context in which garbage is not looked for among what was there before: it takes long, and falls anywhere."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def now(device: str) -> float:
    """Return the time that has passed on a device."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_per_step(runs: Mapping[str, Callable[[int], float]], steps: int) -> dict[str, float]:
    """Return the seconds of a step of every method, after some steps to warm up.

    Args:
        runs: what takes a number of steps and returns their seconds, by method.
        steps: that are timed at once, a multiple of the period of work that not every step does.
    """
    with one_thread():
        for run in runs.values():
            run(WARM_UP)
        return {name: run(steps) / steps for name, run in runs.items()}


def priced(counts: pd.DataFrame, price: pd.DataFrame) -> pd.DataFrame:
    """Return numbers of steps times the seconds of one, by method and seed; NaN where a method has not been timed."""
    of = price.set_index(["method", "seed"])["value"].reindex(pd.MultiIndex.from_frame(counts[["method", "seed"]]))
    return counts.assign(value=counts["value"].to_numpy() * of.to_numpy())
