"""One method along one axis in a process of its own: `python -m benchmarks.growth.worker REQUEST FOLDER`."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import meter
from benchmarks.growth.methods import QUANTITIES, AxisName, MethodName, QuantityName
from benchmarks.process import Machine, Result, serve


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        quantity: what is computed.
        method: how.
        axis: what grows.
        values: its values, ascending.
    """

    quantity: QuantityName
    method: MethodName
    axis: AxisName
    values: tuple[int, ...]


@dataclass(frozen=True)
class Measurement(Result):
    """What came of it.

    Attributes:
        seconds: median time of a call at every value, as far as the time allowed.
        peak_bytes: peak memory of a call at every value, beyond what the process held before.
        counted: multiply-adds that the factored form needs there.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: tuple[int, ...] = ()
    counted: tuple[int, ...] = ()


def measure(request: Request, _: Path) -> Measurement:
    """Measure in this process; no further value is begun after the seconds of the request are spent."""
    meter.use(request.device, request.threads)
    quantity = QUANTITIES[request.quantity]
    prepare = quantity.methods[request.method]
    prepare(quantity.least.build(request.device))()
    seconds: list[float] = []
    peaks: list[int] = []
    counted: list[int] = []
    spent = 0.0
    for value in request.values:
        batch = quantity.size.grown(request.axis, value).build(request.device)
        compute = prepare(batch)
        peaks.append(meter.growth(compute, request.device))
        taken = meter.repeated(compute, request)
        seconds.append(statistics.median(taken))
        counted.append(quantity.operations(batch))
        spent += sum(taken)
        if spent >= request.seconds:
            break
    return Measurement("done", seconds=tuple(seconds), peak_bytes=tuple(peaks), counted=tuple(counted))


if __name__ == "__main__":
    serve(sys.argv[1:], Request, measure, Measurement)
