"""What stops a run, each with its exit code: the message says what was wrong, where, and the remedy."""

import copyreg
from collections.abc import Callable
from pathlib import Path

from curvlab.study.units import size


class StudyError(Exception):
    """Base of the errors that end a run with a message instead of a traceback."""

    exit_code = 2

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Pickle the message, whatever ``__init__`` makes it from."""
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]


class UsageError(StudyError):
    """The command line, the configuration file or a name in them is wrong (exit code 2)."""


class DataUnavailable(StudyError):
    """Data are absent and cannot be fetched (exit code 3).

    The message says which data, where they are looked for and which option does without them.
    """

    exit_code = 3


class MemoryShortage(StudyError):
    """A cell needs more memory than there is (exit code 3)."""

    exit_code = 3

    def __init__(self, where: str, needed: str, available: float | None, option: str) -> None:
        free = f"{size(available)} are available; " if available is not None else ""
        super().__init__(f"not enough memory for {where}: needs {needed}; {free}{option} lowers it")


class StorageFull(StudyError):
    """The disk is full (exit code 3); nothing that was written before is touched."""

    exit_code = 3

    def __init__(self, path: Path, needed: int, available: int) -> None:
        super().__init__(
            f"no space left for {path}: needs {size(needed)}, {size(available)} are available; everything "
            "finished before it is kept. Free some space and run the same command again, or name another "
            "disk with --results"
        )
