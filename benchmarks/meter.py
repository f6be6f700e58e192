"""Time and peak memory of calls in this process, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.process import Machine

_PROC = Path("/proc/self")


def use(device: str, threads: int) -> None:
    """Let torch compute with so many threads, and on this device where several are alike."""
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device).index or 0)


def timed(call: Callable[[], object], device: str) -> float:
    """Return seconds of a call: by the wall's clock, or by events on the stream, for which the host waits afterwards."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def repeated(call: Callable[[], object], machine: Machine) -> tuple[float, ...]:
    """Time a call until there are enough times, or their sum is."""
    seconds: list[float] = []
    while len(seconds) < machine.repeats and sum(seconds) < machine.seconds:
        seconds.append(timed(call, machine.device))
    return tuple(seconds)


def growth(call: Callable[[], object], device: str) -> int:
    """Return the peak memory of a call in bytes, beyond what the process held before."""
    _return_free_memory()
    _forget_peak(device)
    before = _peak(device)
    call()
    return _peak(device) - before


def _return_free_memory() -> None:
    """Hand what is free back to the system, so that its use counts as growth; with glibc only."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak(device: str) -> None:
    """Let the peak memory start from what the process holds now; on a CPU only Linux can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (_PROC / "clear_refs").write_text("5")


def _peak(device: str) -> int:
    """Return the largest number of bytes that the process has held."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _PROC.exists():
        # The resource usage of a child starts from its parent's peak; this entry does not.
        (kibibytes,) = re.findall(r"VmHWM:\s*(\d+) kB", (_PROC / "status").read_text())
        return int(kibibytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
