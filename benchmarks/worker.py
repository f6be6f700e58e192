"""One measurement in a process of its own: `python -m benchmarks.worker REQUEST FOLDER`.

REQUEST is a `Request` as JSON; FOLDER receives `measurement.json` and, of a finished one, `gram.npy`. A call with two
samples loads what is loaded late, and one of full size gives the peak memory, beyond what the process held before. Then
every round times one call and, so that both see the same machine, each of the task's matrix products once: by the
wall's clock on a CPU, by events on the stream, for which the host waits afterwards, on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.operations import matrix_products, operations
from benchmarks.peers import METHODS, MethodName
from benchmarks.tasks import TASKS, TaskName

_PROC = Path("/proc/self")

Outcome = Literal["done", "out of memory", "out of time", "not installed", "failed"]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        task: the network.
        method: how its Gram matrix is computed.
        samples: number of samples N.
        repeats: timed calls.
        seconds: timed work after which no further call starts.
        threads: threads that torch may use.
        device: torch device.
        memory: bytes that the process may allocate, so that a method that wants more fails alone; None for any number.
    """

    task: TaskName
    method: MethodName
    samples: int
    repeats: int
    seconds: float
    threads: int
    device: str
    memory: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What came of it.

    Attributes:
        outcome: "done", or why there are no times.
        note: the reason in words.
        seconds: the timed calls.
        peak_bytes: peak memory of the calls.
        multiply_adds: what the method does of the factored form; None if it works otherwise.
        matmul_rate: largest rate among the task's matrix products, in multiply-adds a second.
    """

    outcome: Outcome
    note: str = ""
    seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    multiply_adds: int | None = None
    matmul_rate: float | None = None

    @property
    def median(self) -> float:
        """Median time of a call in seconds."""
        return statistics.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Share of the time that the multiply-adds take at the rate of matrix products."""
        if self.multiply_adds is None or self.matmul_rate is None:
            return None
        return self.multiply_adds / (self.median * self.matmul_rate)


def measure(request: Request) -> tuple[Measurement, Tensor]:
    """Measure in this process; returns the matrix, too, as the method scales it."""
    torch.set_num_threads(request.threads)
    if torch.device(request.device).type == "cuda":
        torch.cuda.set_device(torch.device(request.device).index or 0)
    task, method = TASKS[request.task], METHODS[request.method]
    method.prepare(*task.build(2, request.device))()
    network, inputs = task.build(request.samples, request.device)
    count, sizes = operations(network, inputs), matrix_products(network, inputs)
    compute = method.prepare(network, inputs)
    _forget_peak(request.device)
    before = _peak(request.device)
    gram = compute()
    peak = _peak(request.device) - before
    calls = [compute, *(_matrix_product(size, request.device) for size in sizes)]
    seconds, *products = zip(*_rounds(calls, request), strict=True)
    done = Measurement(
        outcome="done",
        seconds=seconds,
        peak_bytes=peak,
        multiply_adds=None if method.operations is None else method.operations(count),
        matmul_rate=max(
            math.prod(size) / statistics.median(taken) for size, taken in zip(sizes, products, strict=True)
        ),
    )
    return done, gram


def _rounds(calls: Sequence[Callable[[], object]], request: Request) -> list[list[float]]:
    """Time every call once a round, until there are enough rounds or the first call has used up its time."""
    rounds: list[list[float]] = []
    while len(rounds) < request.repeats and sum(timings[0] for timings in rounds) < request.seconds:
        rounds.append([_timed(call, request.device) for call in calls])
    return rounds


def _matrix_product(size: tuple[int, int, int], device: str) -> Callable[[], object]:
    """Return a float32 product `[m, k] @ [k, n]` into memory of its own, after one call of it."""
    m, k, n = size
    left, right, out = (torch.rand(shape, device=device) for shape in ((m, k), (k, n), (m, n)))
    torch.mm(left, right, out=out)
    return lambda: torch.mm(left, right, out=out)


def _timed(compute: Callable[[], object], device: str) -> float:
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        compute()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begun = time.perf_counter()
    compute()
    return time.perf_counter() - begun


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


def _attempt(request: Request, folder: Path) -> Measurement:
    try:
        measurement, gram = measure(request)
    except ModuleNotFoundError as error:
        return Measurement("not installed", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Measurement("out of memory", _first_line(error))
    except RuntimeError as error:
        # The CPU allocator has no exception class of its own.
        outcome: Outcome = "out of memory" if "can't allocate memory" in str(error) else "failed"
        return Measurement(outcome, _first_line(error))
    np.save(folder / "gram.npy", gram.detach().cpu().numpy())
    return measurement


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main(request: str, folder: str) -> None:
    """Measure what the request says and write what came of it."""
    wanted = Request(**json.loads(request))
    if wanted.memory is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        bound = wanted.memory if hard == resource.RLIM_INFINITY else min(wanted.memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    measurement = _attempt(wanted, Path(folder))
    (Path(folder) / "measurement.json").write_text(json.dumps(asdict(measurement)))


if __name__ == "__main__":
    main(*sys.argv[1:])
