"""The passes before a step, and whether gradients are still what they brought."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from curvlab.optim.gradients import is_hooked, unchanged
from curvlab.rows.collect import Collector
from curvlab.rows.processes import Processes


class Passes(list[Collector]):
    """What was collected since the last step."""

    def __init__(self) -> None:
        super().__init__()
        self._open = False
        self._brought: dict[str, tuple[Tensor, int]] = {}

    @contextmanager
    def collect(self, make: Callable[[], Collector]) -> Iterator[None]:
        """Add a pass; within such a context nothing is added but the outer one's."""
        if self._open:
            yield
            return
        collector = make()
        self._open = True
        try:
            with collector:
                yield
        finally:
            self._open = False
        if collector.idle:
            return
        if collector.cleared:
            self.clear()
        self.append(collector)
        self._brought = {
            name: (p.grad, p.grad._version)
            for name, p in collector.parameters.items()
            if p.grad is not None and not is_hooked(p)
        }

    def take(self) -> list[Collector]:
        """Return all, and forget them."""
        found = list(self)
        self.clear()
        self._brought = {}
        return found

    def brought(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether gradients by name are those of the one backward pass there was, in this process alone."""
        return (
            Processes.present() is None
            and len(self) == 1
            and self[0].cleared
            and all(name in self._brought and unchanged(g, *self._brought[name]) for name, g in gradients.items())
        )
