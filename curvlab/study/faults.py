"""What stops a run besides a full disk, each with its exit code."""

from curvlab.tools.errors import CommandError
from curvlab.tools.text import size


class UsageError(CommandError):
    """The command line, the configuration file or a name in them is wrong (exit code 2)."""


class MemoryShortage(CommandError):
    """A cell needs more memory than there is (exit code 3)."""

    exit_code = 3

    def __init__(self, where: str, needed: str, available: float | None, option: str) -> None:
        free = f"{size(available)} are available; " if available is not None else ""
        super().__init__(f"not enough memory for {where}: needs {needed}; {free}{option} lowers it")
