"""One training run: steps, what is seen between them, divergence, and a checkpoint from which an interrupted run goes on."""

import copy
import io
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from curvlab.tools.storage import write

log = logging.getLogger(__name__)

SAVED = 60.0
"""Seconds between checkpoints; a run that is shorter leaves none."""

Seen = Mapping[str, Any]


class Diverged(Exception):
    """A run has come to where nothing more can be measured; it ends there, and keeps what was seen.

    Args:
        seen: What is to be kept of that place itself.
    """

    def __init__(self, seen: Seen | None = None) -> None:
        super().__init__("the run has diverged")
        self.seen = seen


@runtime_checkable
class Process(Protocol):
    """What is trained, by what, on what."""

    def look(self, step: int) -> Seen | None:
        """See something before a step, numbered from 0, and after the last; None for nothing.

        Raises:
            Diverged: the run has come to its end.
        """

    def step(self, step: int) -> Seen | None:
        """Take a step, and add to what was seen before it.

        Raises:
            Diverged: it cannot be taken.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: it is not of this process.
        """


@dataclass
class Trace:
    """What was seen of a run.

    Attributes:
        seen: In order, each with the number of steps before it as ``step``.
        diverged: Steps after which it was found to have diverged, one that could not be taken counted; None if it did not.
    """

    seen: list[dict[str, Any]] = field(default_factory=list)
    diverged: int | None = None

    @property
    def status(self) -> str:
        """How it ended, as measurements say it."""
        return "ok" if self.diverged is None else f"diverged at step {self.diverged}"

    @property
    def ended(self) -> dict[str, str]:
        """The status of a run that diverged, as an entry of its observations; nothing if it did not."""
        return {} if self.diverged is None else {"status": self.status}

    def series(self, name: str, length: int = 0) -> Float[np.ndarray, "T ..."]:
        """What was seen under a name, numbers or arrays of one shape, where it was; NaN up to a length from there on."""
        seen = np.array([seen[name] for seen in self.seen if name in seen])
        return (
            np.concatenate([seen, np.full((max(length - len(seen), 0), *seen.shape[1:]), np.nan)]) if length else seen
        )


def follow(
    process: Process, steps: int, *, until: Callable[[Seen], bool] = lambda _: False, checkpoint: Path | None = None
) -> Trace:
    """Take steps, and keep what is seen before each and after the last.

    Args:
        process: What steps; its state is that of the end afterwards.
        steps: How many; fewer if it diverges.
        until: Asked of everything that is seen before a step; the run ends there if it holds.
        checkpoint: Where the run is saved every minute and taken up from; removed at its end. A file that is damaged, or
            not of this run, is renamed to `<name>.damaged`, with a warning in the log, and the run starts afresh.
    """
    trace, first = _resumed(process, checkpoint)
    saved = time.monotonic()
    for step in range(first, steps + 1):
        if checkpoint is not None and time.monotonic() - saved > SAVED:
            _save(checkpoint, process, trace, step)
            saved = time.monotonic()
        taken = step
        try:
            seen = process.look(step)
            if seen is not None:
                trace.seen.append({"step": step, **seen})
            if step == steps or (seen is not None and until(seen)):
                break
            taken = step + 1
            more = process.step(step)
        except Diverged as end:
            trace.diverged = taken
            if end.seen is not None:
                trace.seen.append({"step": taken, **end.seen})
            break
        if more is not None and seen is not None:
            trace.seen[-1] |= more
        elif more is not None:
            trace.seen.append({"step": step, **more})
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return trace


def _save(path: Path, process: Process, trace: Trace, step: int) -> None:
    buffer = io.BytesIO()
    torch.save({"process": process.state_dict(), "step": step, "seen": trace.seen}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, buffer.getvalue())


def _resumed(process: Process, checkpoint: Path | None) -> tuple[Trace, int]:
    """What was seen of a run, and its next step, as a checkpoint holds them; nothing in it is executed.

    A copy of the process goes on from it first, and where that is not possible the process stays at its start.
    """
    if checkpoint is None or not checkpoint.exists():
        return Trace(), 0
    content = io.BytesIO(checkpoint.read_bytes())
    try:
        state: dict[str, Any] = torch.load(content, weights_only=True)
        trial = copy.deepcopy(process)
        _, step = _restore(
            trial, copy.deepcopy(state)
        )  # optimisers keep the tensors that they are given, and change them
        with suppress(Diverged):
            trial.look(step)
            trial.step(step)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        aside = checkpoint.replace(checkpoint.with_name(f"{checkpoint.name}.damaged"))
        log.warning(
            "The checkpoint %s cannot be taken up (%s: %s). It is now %s, and the run is computed again.",
            checkpoint, type(error).__name__, str(error).partition("\n")[0], aside.name,
        )  # fmt: skip
        return Trace(), 0
    return _restore(process, state)


def _restore(process: Process, state: dict[str, Any]) -> tuple[Trace, int]:
    seen, step = [dict(one) for one in state["seen"]], int(state["step"])
    if seen and step <= int(seen[-1]["step"]):
        raise ValueError(f"what was seen before step {seen[-1]['step']} does not lead to step {step}")
    process.load_state_dict(state["process"])
    return Trace(seen), step
