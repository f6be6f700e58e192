"""What the command lines of the benchmarks share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
import tyro
from rich.console import Console

from benchmarks import tables
from curvlab.study.environment import check_device
from curvlab.study.faults import UsageError
from curvlab.tools.errors import CommandError
from curvlab.tools.memory import available_memory


class MachineFields(TypedDict):
    """The fields of `benchmarks.process.Machine`."""

    repeats: int
    seconds: float
    threads: int
    device: str
    memory: int | None


@dataclass(frozen=True)
class PlaceOptions:
    """On what is timed, and where the result goes."""

    threads: int = os.cpu_count() or 1
    """Threads of each process."""
    device: str = "cpu"
    """Torch device, such as cpu, cuda or cuda:1."""
    output: Path | None = None
    """File for the comparison: .md or .json."""

    def __post_init__(self) -> None:
        self.check_positive("threads")
        if self.output is not None and self.output.suffix not in tables.FORMATS:
            raise UsageError(f"--output {self.output} must end in one of: {', '.join(tables.FORMATS)}")
        check_device(self.device)

    def check_positive(self, *names: str) -> None:
        """Refuse options that are no positive numbers."""
        for name in names:
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class CommonOptions(PlaceOptions):
    """How long methods are timed, on what, and where the comparison goes."""

    repeats: int = 15
    """Timed calls of a method."""
    seconds: float = 30.0
    """No further call of a method starts after this much timed work (unit: seconds)."""
    timeout: float = 600.0
    """A method's process is stopped after this time (unit: seconds)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("repeats", "seconds", "timeout")

    @property
    def machine(self) -> MachineFields:
        """How to time; a process may allocate what is free now, a GPU keeps its own account."""
        free = available_memory(self.device)
        bounded = free is not None and torch.device(self.device).type != "cuda"
        return {
            "repeats": self.repeats,
            "seconds": self.seconds,
            "threads": self.threads,
            "device": self.device,
            "memory": int(free) if bounded and free is not None else None,
        }


@dataclass(frozen=True)
class SampledOptions(CommonOptions):
    """Options of a benchmark whose tasks have a number of samples of their own."""

    samples: int | None = None
    """Number of samples N; the task's own if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples must be at least 1, got {self.samples}")


Chosen = TypeVar("Chosen", bound=PlaceOptions)


def command(
    prog: str, chosen: type[Chosen], run: Callable[[Chosen, Console, Console], int], argv: Sequence[str] | None
) -> int:
    """Parse the options and run; returns the exit code. `run` takes a console for results and one for progress."""
    console, progress = Console(width=None if sys.stdout.isatty() else tables.WIDTH), Console(stderr=True)
    try:
        options = tyro.cli(chosen, prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
        return run(options, console, progress)
    except CommandError as error:
        progress.print(f"error: {error}", style="red", highlight=False)
        return error.exit_code
