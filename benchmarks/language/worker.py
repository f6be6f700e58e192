"""One method on one decoder in a process of its own: `python -m benchmarks.language.worker REQUEST FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import meter
from benchmarks.language.methods import METHODS, MethodName
from benchmarks.language.models import SHAPES, ModelName
from benchmarks.process import Machine, Timed, serve


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        method: what is computed.
        model: on which decoder.
    """

    method: MethodName
    model: ModelName


@dataclass(frozen=True)
class Measurement(Timed):
    """What came of it.

    Attributes:
        first: seconds of the first call on the model, which may check and learn.
    """

    first: float = 0.0


def measure(request: Request, _: Path) -> Measurement:
    """Measure in this process."""
    meter.use(request.device, request.threads)
    METHODS[request.method].prepare(*SHAPES["tiny"].build(request.device))()
    compute = METHODS[request.method].prepare(*SHAPES[request.model].build(request.device))
    first = meter.timed(compute, request.device)
    peak = meter.growth(compute, request.device)
    return Measurement(outcome="done", seconds=meter.repeated(compute, request), peak_bytes=peak, first=first)


if __name__ == "__main__":
    serve(sys.argv[1:], Request, measure, Measurement)
