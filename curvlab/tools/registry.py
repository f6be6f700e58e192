"""Things by name, to which anybody adds: by a plain call, or by an entry point of an installed package.

    analyses = Registry("analysis", "curvlab.analyses")
    analyses.register("mine", ANALYSIS)

    [project.entry-points."curvlab.analyses"]           # in the pyproject.toml of a package
    mine = "my_package.analysis:ANALYSIS"

What is curvlab's own goes in by the same ways. Entry points are loaded when they are asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from curvlab.tools.errors import CommandError
from curvlab.tools.text import unknown

T = TypeVar("T")


class UnknownName(CommandError, KeyError, ValueError):
    """A name that is not registered; the message suggests the nearest."""

    __str__ = Exception.__str__


class BrokenPlugin(CommandError):
    """An entry point of an installed package that cannot be loaded; the message names both, and why."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names, in the order of registration, those of entry points after all others.

    Args:
        what: A thing of it, in messages.
        group: The group of entry points that belong to it.
        things: Those that it has from the start.

    Raises:
        UnknownName: on looking up a name that is not there.
        BrokenPlugin: on looking up an entry point that cannot be loaded.
    """

    def __init__(self, what: str, group: str, things: Mapping[str, T] | None = None) -> None:
        self.what, self.group = what, group
        self._things: dict[str, T] = dict(things or {})

    def register(self, name: str, thing: T) -> T:
        """Add a thing, and return it; one that is defined again, as in a notebook, replaces itself.

        Raises:
            ValueError: another one has this name.
        """
        before = self._things.get(name, thing)
        if before is not thing and _origin(before) != _origin(thing):
            raise ValueError(f"there is another {self.what} called {name!r}: {before!r}")
        self._things[name] = thing
        return thing

    def unregister(self, name: str) -> None:
        """Forget a thing, if it is there."""
        self._things.pop(name, None)

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            plugins = self._plugins()
            if name not in plugins:
                raise UnknownName(unknown(self.what, name, self))
            self._things[name] = load(plugins[name], self.what)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._things, *sorted(self._plugins())])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in self._plugins()

    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


def _origin(thing: object) -> object:
    """Where a class or function is defined; the thing itself if it is neither."""
    return (thing.__module__, thing.__qualname__) if hasattr(thing, "__qualname__") else thing


def load(point: EntryPoint, what: str) -> Any:
    """Load an entry point.

    Raises:
        BrokenPlugin: that fails.
    """
    try:
        return point.load()
    except Exception as error:
        package = f" of the package {point.dist.name}" if point.dist else ""
        reason = f"{type(error).__name__}: {error}"
        raise BrokenPlugin(f"the {what} {point.name!r}{package} ({point.value}) cannot be loaded: {reason}") from error
