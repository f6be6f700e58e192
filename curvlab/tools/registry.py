"""Things by name, to which anybody adds: by a plain call, by an entry point of an installed package, or by naming a module.

    analyses = Registry("analysis", "curvlab.analyses")
    analyses.register("mine", ANALYSIS)

    [project.entry-points."curvlab.analyses"]           # in the pyproject.toml of a package
    mine = "my_package.analysis:ANALYSIS"

    analyses["my_module:ANALYSIS"]                      # my_module.py is in this folder, or can be imported

What is curvlab's own goes in by the same ways. Entry points and modules are loaded when they are asked for by name.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

from curvlab.tools.errors import CommandError
from curvlab.tools.text import capitalised, nearest, unknown

T = TypeVar("T")

WIDTH = 200
"""Characters of the line that shows a registry."""


class UnknownName(CommandError, KeyError, ValueError):
    """A name that is not registered; the message suggests the nearest."""

    __str__ = Exception.__str__


class BrokenPlugin(CommandError):
    """An entry point of an installed package, or a module, that cannot be loaded; the message names both, and why."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names, in the order of registration, those of entry points after all others.

    A name with a colon, ``module:attribute``, is looked up in that module and nowhere else.

    Args:
        what: A thing of it, in messages.
        group: The group of entry points that belong to it.
        things: Those that it has from the start.
        form: What a thing has to be, in messages, such as ``a function``.
        fits: Whether it is that.

    Raises:
        UnknownName: on looking up a name that is not there.
        BrokenPlugin: on looking up an entry point that cannot be loaded, or a module that cannot be imported.
    """

    def __init__(
        self,
        what: str,
        group: str,
        things: Mapping[str, T] | None = None,
        *,
        form: str = "an object",
        fits: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self.what, self.group, self.form, self.fits = what, group, form, fits
        self._things: dict[str, T] = dict(things or {})

    def __repr__(self) -> str:
        return shorten(f"{self.what}: {', '.join(self)}", WIDTH, placeholder=" …")

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

    @property
    def loaded(self) -> Mapping[str, T]:
        """Those that are here: all but entry points that nobody has asked for."""
        return dict(self._things)

    def __getitem__(self, name: str) -> T:
        if ":" in name:
            return self._of_module(name)
        if name not in self._things:
            plugins = self._plugins()
            if name not in plugins:
                raise UnknownName(f"{unknown(self.what, name, self)} Your own is named as module:{self._placeholder}.")
            self._things[name] = load(plugins[name], self.what)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._things, *sorted(self._plugins())])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and ":" in name:
            with contextlib.suppress(CommandError):
                self._of_module(name)
                return True
            return False
        return name in self._things or name in self._plugins()

    @property
    def _placeholder(self) -> str:
        return self.form.split()[1]

    def _of_module(self, spec: str) -> T:
        """Look up ``module:attribute``."""
        where = f"{capitalised(self.what)} {spec!r}"
        module_name, _, name = spec.partition(":")
        module = imported(module_name, where)
        thing = getattr(module, name, None)
        if thing is None:
            fitting = {key: one for key, one in vars(module).items() if self.fits(one) and not key.startswith("_")}
            own = [key for key, one in fitting.items() if _defined_in(module, one)] or list(fitting)
            what = f"{self._placeholder} of {module_name}"
            raise UnknownName(f"{where}: {unknown(what, name, own)}{_started(module)}")
        if not self.fits(thing):
            raise UnknownName(f"{where}: {name} is {_described(thing)}, not {self.form}.")
        return cast("T", thing)

    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


def _origin(thing: object) -> object:
    """Where a class or function is defined; the thing itself if it is neither."""
    return (thing.__module__, thing.__qualname__) if hasattr(thing, "__qualname__") else thing


def _described(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _defined_in(module: ModuleType, thing: object) -> bool:
    """Whether a module defines a function or class; anything else counts as its own."""
    return thing.__module__ == module.__name__ if hasattr(thing, "__qualname__") else True


def _started(module: ModuleType) -> str:
    """A remark on what `__main__` is, for those who meant something else."""
    if module is not sys.modules["__main__"]:
        return ""
    file = getattr(module, "__file__", None) or "no file"
    return f" __main__ is what was started, {file}; what stands elsewhere is named by its own module."


def imported(name: str, where: str) -> ModuleType:
    """Import a module, from the present folder first, as `python -m` does.

    Args:
        name: Of the module; ``__main__`` is the script that was started, in worker processes, too.
        where: What asks for it, in messages.

    Raises:
        BrokenPlugin: that fails; the message says why, and which module may have been meant.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        reason = f"{where}: importing {name!r} failed ({error})."
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise BrokenPlugin(reason) from error
        meant = nearest(name, (module.name for module in pkgutil.iter_modules([here])))
        raise BrokenPlugin(
            f"{reason} {meant}It was looked for in {here} and on the Python path: run from the folder that holds the module, "
            "or add that folder to PYTHONPATH."
        ) from error
    except Exception as error:
        raise BrokenPlugin(f"{where}: importing {name!r} raised {type(error).__name__}: {error}.") from error


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
