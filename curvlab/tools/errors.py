"""What ends a command with a message instead of a traceback."""

import copyreg
from collections.abc import Callable


class CommandError(Exception):
    """An error whose message says all: what was wrong, where, and the remedy.

    Attributes:
        exit_code: with which a command ends that it stops.
    """

    exit_code = 2

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Pickle the message, whatever ``__init__`` makes it from."""
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]


class DataUnavailable(CommandError):
    """Data are absent and cannot be fetched, or are damaged (exit code 3).

    The message says which data, where they are looked for and what does without them.
    """

    exit_code = 3
