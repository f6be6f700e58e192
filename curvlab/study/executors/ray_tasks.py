"""Jobs as tasks of a Ray cluster (https://docs.ray.io): one that is running, or this machine's cores."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from curvlab.study.executors.interface import Lost, needed
from curvlab.study.faults import UsageError
from curvlab.study.workers import variables

ENDING = 10.0
"""Seconds that tasks are given to end in a cluster that was there before."""


class Ray:
    """Executor of Ray tasks, each in a process of its own; a task whose worker or node dies is lost, and no other.

    The cluster is that to which this process is connected already, else that at ``address``, of ``$RAY_ADDRESS`` or on this
    machine, else one of this machine's cores that ends with the run.

    Args:
        address: Of the cluster.
        runtime_env: What Ray brings to its machines, as in ``{"working_dir": "."}``.
        num_cpus: Cores of one job, and threads.
        **resources: Other things that a job needs, as `ray.remote` has them: ``num_gpus``, ``memory``, ``resources``, …

    Raises:
        UsageError: Ray is not installed, cannot be reached, or does not know a setting.
    """

    starting = 10.0

    def __init__(
        self,
        address: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        num_cpus: float = 1,
        **resources: Any,
    ) -> None:
        self.ray = needed("ray", "ray", "ray>=2.40")
        self.address, self.runtime_env = address, runtime_env
        self.num_cpus, self.num_gpus = num_cpus, resources.get("num_gpus", 0)
        self.connects = False
        self.going: set[Any] = set()
        settings = {**resources, "num_cpus": num_cpus, "max_retries": 0}
        try:
            self.remote = self.ray.remote(_called).options(**settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--executor-options: {error}") from error

    @property
    def capacity(self) -> int:
        """Jobs for which the cluster has cores, and GPUs if they need any."""
        there = self._cluster.cluster_resources()
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return min([int(there.get(name, 0) // amount) for name, amount in needs.items() if amount], default=1)

    def scatter(self, value: object) -> object:
        """Put a value where every node finds it."""
        return self._cluster.put(value)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> _RayFuture:
        """Call a function in the cluster."""
        ray = self._cluster
        reference = self.remote.remote(function, *arguments)
        self.going.add(reference)
        return _RayFuture(ray, reference, self.going)

    def close(self) -> None:
        """End the tasks that are left, and leave the cluster if this has joined it."""
        if self.connects:  # then its workers are killed
            self.ray.shutdown()
        else:
            left, end = list(self.going), time.monotonic() + ENDING
            while left and time.monotonic() < end:
                for reference in left:
                    self.ray.cancel(reference, force=True)
                _, left = self.ray.wait(left, num_returns=len(left), timeout=0.5, fetch_local=False)
        self.connects = False
        self.going.clear()
        self.__dict__.pop("_cluster", None)

    @cached_property
    def _cluster(self) -> Any:
        if not self.ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                with _handlers_kept(), variables(max(1, int(self.num_cpus))):
                    self.ray.init(
                        self.address,
                        include_dashboard=False,
                        runtime_env=self.runtime_env,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError(f"--executor ray: no cluster at {self.address or 'this machine'}: {error}") from error
            self.connects = True
        return self.ray


class _RayFuture:
    def __init__(self, ray: Any, reference: Any, going: set[Any]) -> None:
        self.ray, self.reference, self.going = ray, reference, going

    def done(self) -> bool:
        ready, _ = self.ray.wait([self.reference], timeout=0, fetch_local=False)
        return bool(ready)

    def result(self) -> Any:
        exceptions = self.ray.exceptions
        self.going.discard(self.reference)
        try:
            return self.ray.get(self.reference)
        except exceptions.OutOfMemoryError as error:
            raise Lost(f"memory ran out on its node; {_first_sentence(error)}", out_of_memory=True) from error
        except exceptions.WorkerCrashedError as error:
            raise Lost("its worker died, as one does that is killed or whose memory runs out") from error
        except (exceptions.NodeDiedError, exceptions.ObjectLostError, exceptions.LocalRayletDiedError) as error:
            raise Lost(_first_sentence(error)) from error

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0]


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of that of SIGTERM, by which a run stops; undo that."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
