"""How a check says what does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def that(statement: str, of: str) -> Iterator[None]:
    """Context in which whatever is raised says that a statement does not hold of something.

    Raises:
        AssertionError: what was raised, with the statement before it.
    """
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{of}: {statement} does not hold: {type(error).__name__}: {error}") from error
