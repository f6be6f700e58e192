"""The types of curvlab's functions and methods, checked at every call of a test run.

jaxtyping checks arrays, whose axes belong together, and beartype everything else. The import hook that comes with jaxtyping
sends every function through both, nested ones anew whenever they are made, which doubles the time of the tests; here
jaxtyping sees the functions that take or return arrays, and nested functions go unchecked.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import jaxtyped


def install(package: str) -> None:
    """Check the types of a package that is yet to be imported."""
    assert package not in sys.modules
    sys.meta_path.insert(0, CheckedModules(package))


class CheckedModules(MetaPathFinder):
    """Finds the modules of a package, whose types are checked from the end of their import on."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname.partition(".")[0] == self.package else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                check(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def check(module: ModuleType) -> None:
    """Replace the functions and methods that a module defines by checked ones."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) == module.__name__:
            if inspect.isclass(value):
                for method, defined in list(vars(value).items()):
                    if not method.startswith("__") or method in {"__init__", "__call__", "__add__"}:
                        setattr(value, method, checked(defined))
            else:
                setattr(module, name, checked(value))


def checked(value: Any) -> Any:
    """Return a function or method with its types checked, anything else as it is."""
    if isinstance(value, classmethod | staticmethod):
        return type(value)(checked(value.__func__))
    if isinstance(value, property):
        return value.getter(checked(value.fget))
    if not isinstance(value, FunctionType) or hasattr(value, "__wrapped__") or not value.__annotations__:
        return value
    try:
        hints = get_type_hints(value, include_extras=True)
    except NameError:  # of a class that only static checkers import: jaxtyping lets anything pass for it
        return jaxtyped(value, typechecker=beartype)
    arrays = any("jaxtyping" in repr(hint) for hint in hints.values())
    return jaxtyped(value, typechecker=beartype) if arrays else switched(value, beartype(value))


def switched(function: Callable[..., Any], strict: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that jaxtyping's configuration can switch the checks of off, as it does for arrays."""

    @wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return either
