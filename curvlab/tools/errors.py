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
