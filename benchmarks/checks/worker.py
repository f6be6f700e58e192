"""Training steps of one network in a process of their own: `python -m benchmarks.checks.worker REQUEST FOLDER`.

The parts of a step that only check it are timed inside it, and both by the processor's time and not the wall's clock, so that
their share does not depend on what else the machine does.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import meter
from benchmarks.checks.networks import NETWORKS, NetworkName
from benchmarks.process import Machine, Result, serve
from benchmarks.tasks import random_labels
from curvlab.fisher import KFAC
from curvlab.optim import Preconditioner
from curvlab.rows import collect
from curvlab.rows.guard import Checks

PARTS: tuple[tuple[Any, str], ...] = (
    (collect, "signature_of"),
    (Checks, "due"),
    (collect, "compare_with_reverse_pass"),
)
"""What checks a step: its graph, whether it is known, and, where it is not, a backward pass."""

WARM_UP = 11
"""Steps in which memory is allocated and every inverse is made, before any is timed."""


@dataclass(frozen=True)
class Request(Machine):
    """What to measure.

    Attributes:
        network: the network.
        samples: number of samples N.
    """

    network: NetworkName
    samples: int


@dataclass(frozen=True)
class Measurement(Result):
    """What came of it: medians.

    Attributes:
        seconds: processor time of a step of a network that is known again.
        checks: its checks.
        compared_seconds: a step that is compared.
        compared_checks: its checks.
    """

    seconds: float = 0.0
    checks: float = 0.0
    compared_seconds: float = 0.0
    compared_checks: float = 0.0


class Watch:
    """Adds up the time within calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begun

        return watched


def measure(request: Request, _: Path) -> Measurement:
    """Measure in this process, steps that are known and steps that are compared in turns."""
    meter.use(request.device, request.threads)
    step = training_step(request)
    for _early in range(WARM_UP):
        step()
    known: list[tuple[float, float]] = []
    compared: list[tuple[float, float]] = []
    spent = 0.0
    while len(known) < request.repeats and (not known or spent < request.seconds):
        for found in (known, compared):
            whole = Watch()
            with _watched(compared=found is compared) as parts:
                whole.over(step)()
            found.append((whole.seconds, parts.seconds))
            spent += whole.seconds
    seconds, checks = map(statistics.median, zip(*known, strict=True))
    compared_seconds, compared_checks = map(statistics.median, zip(*compared, strict=True))
    return Measurement("done", "", seconds, checks, compared_seconds, compared_checks)


def training_step(request: Request) -> Callable[[], None]:
    """Return a step of K-FAC from one draw, as the README has it."""
    network, inputs = NETWORKS[request.network].build(request.samples, request.device)
    targets, loss = random_labels(request.samples, request.device), nn.CrossEntropyLoss()
    structure = KFAC(factored_damping=True, invert_every=10)
    natural = Preconditioner(network, loss, structure, kind="mc", damping=1e-1, kl_clip=None)
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> None:
        sgd.zero_grad()
        with natural.collect():
            loss(network(inputs), targets).backward()
        natural.precondition()
        sgd.step()

    return step


@contextmanager
def _watched(*, compared: bool) -> Iterator[Watch]:
    watch = Watch()
    with ExitStack() as leave:
        if compared:
            leave.enter_context(mock.patch.object(Checks, "due", return_value=True))
        for owner, name in PARTS:
            leave.enter_context(mock.patch.object(owner, name, watch.over(getattr(owner, name))))
        yield watch


if __name__ == "__main__":
    serve(sys.argv[1:], Request, measure, Measurement)
