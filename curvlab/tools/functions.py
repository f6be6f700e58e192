"""Functions as data: what they do and what they were made with, so that a change of either shows, and nothing else does."""

import ast
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from curvlab.tools.storage import digest

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
PLAIN = (bool, int, float, str, tuple, list, dict, frozenset)
"""Types of the constants of a module that a function can depend on."""


def described(thing: object) -> object:
    """A thing as JSON has it, equal in every process; a function by its name, a digest of its code, and what it closes over.

    The code is that of the source without comments, docstring and layout, with the functions and constants of the same
    package and of curvlab that it names; other libraries are known by their versions.
    """
    return _described(thing, ())


def _described(thing: Any, above: tuple[CodeType, ...]) -> object:
    if isinstance(thing, float) and not math.isfinite(thing):
        return str(thing)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {str(name): _described(entry, above) for name, entry in thing.items()}
    if isinstance(thing, list | tuple):
        return [_described(entry, above) for entry in thing]
    if isinstance(thing, set | frozenset):
        return sorted(map(repr, thing))
    if hasattr(thing, "tolist"):  # a tensor or an array
        return _described(thing.tolist(), above)
    if isinstance(thing, functools.partial):
        return [_described(part, above) for part in (thing.func, thing.args, thing.keywords)]
    if isinstance(thing, MethodType):
        return [_described(thing.__func__, above), _described(thing.__self__, above)]
    if hasattr(thing, "__wrapped__"):  # decorators stand in the source of what they wrap
        return _described(inspect.unwrap(thing), above)
    if isinstance(thing, FunctionType):
        return _function(thing, above)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        entries = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        return [_name(type(thing)), _described(entries, above)]
    return _name(thing) if hasattr(thing, "__name__") else repr(thing)


def _name(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"


def _function(function: FunctionType, above: tuple[CodeType, ...]) -> dict[str, object]:
    code = function.__code__
    found: dict[str, object] = {"function": _name(function)}
    if code in above:
        return found
    inside = (*above, code)
    enclosed = dict(zip(code.co_freevars, (_content(cell) for cell in function.__closure__ or ()), strict=True))
    defaults = [function.__defaults__, function.__kwdefaults__]
    used = {name: _described(thing, inside) for name, thing in sorted(dict(_used(function)).items())}
    found["code"] = digest([_source(code), _described(defaults, inside), used])[:12]
    return found | ({"with": _described(enclosed, inside)} if enclosed else {})


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


@functools.cache
def _source(code: CodeType) -> list[str]:
    """The source of a function, and of those that begin on the same line, in one form; its bytecode if there is none."""
    try:
        lines, _ = inspect.findsource(code)
        tree = _parsed("".join(lines))
    except (OSError, SyntaxError):
        return [code.co_code.hex(), repr(code.co_consts)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, Node) and _line(node) == code.co_firstlineno]
    return [ast.unparse(_undocumented(node)) for node in nodes if getattr(node, "name", "<lambda>") == code.co_name]


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _line(node: Node) -> int:
    """The line on which it begins, with its decorators."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _undocumented(node: Node) -> ast.AST:
    if isinstance(node, ast.Lambda) or ast.get_docstring(node) is None:
        return node
    parts = {name: getattr(node, name) for name in node._fields}
    bare: ast.AST = type(node)(**parts | {"body": node.body[1:] or [ast.Pass()]})
    return ast.copy_location(bare, node)


def _used(function: Callable[..., Any]) -> Iterator[tuple[str, object]]:
    """The functions and constants of its own package and of curvlab that a function names, also by their modules."""
    packages = {_package(function.__module__), _package(__name__)}
    names = set(_names(function.__code__))
    scopes: list[Mapping[str, object]] = [function.__globals__]
    scopes += [
        vars(module)
        for name in names
        if isinstance(module := function.__globals__.get(name), ModuleType) and _package(module.__name__) in packages
    ]
    for scope in scopes:
        for name in names & scope.keys():
            thing = scope[name]
            of_package = isinstance(thing, FunctionType) and _package(thing.__module__) in packages
            if of_package or (isinstance(thing, PLAIN) and not name.startswith("__")):
                yield name, thing


def _package(module: str) -> str:
    return module.partition(".")[0]


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
