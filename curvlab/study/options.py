"""The command line of an analysis: the options that all share, and the configuration file beneath them."""

import argparse
import dataclasses
import json
import math
import types
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro

from curvlab.study.faults import UsageError
from curvlab.tools.text import unknown


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that every analysis has; an analysis derives a frozen dataclass that adds its own.

    Raises:
        ValueError: an option outside its range.
    """

    problem: str
    """Data set and model: a name, or module:function that returns a Problem."""
    seeds: int = 12
    """How many random seeds to run; intervals and p-values are taken over them (unit: seeds)."""
    device: str = "cpu"
    """Torch device that measures, such as cpu, cuda or cuda:1."""
    dtype: Literal["float64", "float32"] = "float64"
    """Floating-point precision of the measurements."""
    workers: int = 0
    """Processes that measure side by side; 0 means one per core on the CPU and one elsewhere (unit: processes)."""
    results: Path = Path("results")
    """Folder for results and for the cache of finished cells."""
    config: Path | None = None
    """JSON file with options, such as the config.json of an earlier run; the command line overrides it."""
    claims: tuple[str, ...] = ()
    """Judge only the claims with these ids and run only the cells that they need; none means all."""
    list_claims: bool = False
    """List the claims with source, rule and expectation, and stop."""
    dry_run: bool = False
    """Say how many cells would run, in what time and memory, and stop."""
    shard: str | None = None
    """Run only share i of n of the cells into the shared cache, written i/n with i from 1 to n."""
    fresh: bool = False
    """Compute every cell again instead of taking it from the cache."""
    strict: bool = False
    """Exit with 1 if a verdict contradicts what the code expects."""
    quiet: bool = False
    """No progress; only the verdicts and where the results are."""
    redraw: Path | None = None
    """Redraw the figures of this results folder from its stored measurements, and stop."""

    def __post_init__(self) -> None:
        check_bounds(self, seeds=1)
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 1, or 0 for one per core; got {self.workers}")
        if self.shard is not None:
            share(self.shard)
        for field in dataclasses.fields(self):
            for value in _values(self, field.name):
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{_option(field.name)} must be finite, got {value}")


def _values(config: object, name: str) -> tuple[Any, ...]:
    """The values of an option, one or several."""
    value = getattr(config, name)
    return value if isinstance(value, tuple) else (value,)


def _option(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


Number = int | float


def check_names(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Make sure that names are known.

    Raises:
        ValueError: one is not; with the nearest known one.
    """
    for name in names:
        if name not in known:
            raise ValueError(unknown(what, name, known))


def check_bounds(config: CommonOptions, **bounds: Number | tuple[Number, Number]) -> None:
    """Make sure that options, each value of those with several, are not below the least, or not outside the least and the most.

    Raises:
        ValueError: one is.
    """
    for name, bound in bounds.items():
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        if not all(least <= value <= most for value in _values(config, name)):
            words = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ValueError(f"{_option(name)} must be {words}, got {getattr(config, name)}")


def check_positive(config: CommonOptions, *names: str) -> None:
    """Make sure that every value of some options is above 0.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not all(value > 0 for value in _values(config, name)):
            raise ValueError(f"{_option(name)} must be positive, got {getattr(config, name)}")


def check_some(config: CommonOptions, *names: str) -> None:
    """Make sure that options of several values have one at least.

    Raises:
        ValueError: one has none.
    """
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{_option(name)} needs at least one value")


def repeats(config: CommonOptions) -> str:
    """The options with a value that stands in them twice, in words; empty if there is none."""
    found = [
        f"{_option(field.name)} names {value} {count} times"
        for field in dataclasses.fields(config)
        for value, count in Counter(_values(config, field.name)).items()
        if count > 1
    ]
    return "; ".join(found)


HOW = frozenset(
    {"workers", "results", "config", "list_claims", "dry_run", "shard", "fresh", "strict", "quiet", "redraw"}
)
"""Options that say how to run, not what to measure; they are not recorded in ``config.json``."""

C = TypeVar("C", bound=CommonOptions)


def share(text: str) -> tuple[int, int]:
    """``"i/n"`` as numbers.

    Raises:
        ValueError: not of that form, or i outside 1 … n.
    """
    index, _, total = text.partition("/")
    if not (index.isdigit() and total.isdigit() and 1 <= int(index) <= int(total)):
        raise ValueError(f"--shard is i/n with 1 ≤ i ≤ n, such as 1/4; got {text!r}")
    return int(index), int(total)


def parse(defaults: C, argv: Sequence[str], *, prog: str, description: str) -> C:
    """Options from the command line over those of the file that ``--config`` names over the defaults.

    Raises:
        UsageError: the file or an entry of it is wrong.
        SystemExit: after ``--help`` (code 0) or on a wrong command line (code 2), with the text already
            printed.
    """
    file, _ = pop_option("config", argv)
    return tyro.cli(
        type(defaults),
        prog=prog,
        description=description,
        args=list(argv),
        default=read_config(type(defaults), Path(file)) if file else defaults,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def pop_option(name: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of one option of a command line, None without it, and the command line without the option."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(f"--{name}", nargs="?", dest="value")
    found, rest = finder.parse_known_args(list(argv))
    return found.value, rest


def recorded(config: CommonOptions) -> dict[str, object]:
    """What ``config.json`` holds: every option that decides what is measured, as plain JSON values."""
    plain: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {name: value for name, value in plain.items() if name not in HOW}


def read_config(config_type: type[C], path: Path) -> C:
    """A configuration from a JSON file; options that it leaves out keep their defaults.

    Raises:
        UsageError: the file cannot be read, or an entry is unknown or of the wrong type.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--config {path} is not JSON: {error}") from error
    try:
        return _decode(config_type, content, "options")  # type: ignore[no-any-return]
    except ValueError as error:
        raise UsageError(f"--config {path}: {error}") from error


def _decode(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the Python type ``hint``; ValueError names ``where`` it does not fit."""
    kind, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        names = {field.name for field in dataclasses.fields(hint) if field.init}
        for name in value.keys() - names:
            raise ValueError(unknown(f"entry of {where}", name, sorted(names)))
        entries = {name: _decode(hints[name], entry, name) for name, entry in value.items()}
        return cast("Callable[..., Any]", hint)(**entries)
    if kind in (Union, types.UnionType):
        for option in arguments:
            try:
                return _decode(option, value, where)
            except ValueError:
                continue
    elif kind is Literal and value in arguments:
        return value
    elif kind is tuple and isinstance(value, list):
        hints_of = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints_of) == len(value):
            return tuple(_decode(h, entry, where) for h, entry in zip(hints_of, value, strict=True))
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool, type(None)) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint)) if kind is None else str(hint)
    raise ValueError(f"{where} = {value!r} is not of type {expected}")
