"""The command line of an analysis: the options that all share, and the configuration file beneath them."""

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from curvlab.study.faults import UsageError
from curvlab.study.statistics.multiplicity import LOOKS
from curvlab.tools.text import unknown


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that every analysis has; an analysis derives a frozen dataclass that adds its own.

    Raises:
        ValueError: an option outside its range.
    """

    problem: str
    """Data set and model: a name, or module:function that returns a Problem."""
    seeds: int | Literal["auto"] = 12
    """How many random seeds to run, over which intervals and p-values are taken; auto runs 12, then 24 and 48 for the
    claims that are not decided yet (unit: seeds)."""
    first_seed: int = 1000
    """The first of them; seeds below it were used to explore."""
    device: str = "cpu"
    """Torch device that measures, such as cpu, cuda or cuda:1."""
    dtype: Literal["float64", "float32"] = "float64"
    """Floating-point precision of the measurements."""
    workers: int = 0
    """Processes that measure side by side; 0 means one per core on the CPU and one elsewhere (unit: processes)."""
    executor: str = "local"
    """Where cells are measured: local, ray, slurm, or module:Name of anything with submit; then workers is the number of
    jobs at a time, and 0 what the executor has."""
    executor_options: tuple[str, ...] = ()
    """Settings of the executor, each as name=value, such as partition=gpu time=60."""
    results: Path = Path("results")
    """Folder for results and for the cache of finished cells."""
    config: Path | None = None
    """JSON file with options, such as the config.json of an earlier run; the command line overrides it."""
    claims: tuple[str, ...] = ()
    """Show only the claims with these ids; they are decided with all claims of their groups, as in a run of all."""
    experiments: tuple[str, ...] = ()
    """Measure only these experiments and those they come after; all claims of the others count as undecided."""
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
        check_bounds(self, first_seed=0, **({} if self.seeds == "auto" else {"seeds": 1}))
        if self.seeds == "auto" and self.shard is not None:
            raise ValueError("--shard needs a number of seeds: what --seeds auto runs depends on what was measured")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 1, or 0 for one per core; got {self.workers}")
        if self.shard is not None:
            share(self.shard)
        settings(self)
        for field in dataclasses.fields(self):
            for value in _values(self, field.name):
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{_option(field.name)} must be finite, got {value}")

    @property
    def seeds_run(self) -> range:
        """The seeds that a run comes to at most."""
        return range(self.first_seed, self.first_seed + (LOOKS[-1] if self.seeds == "auto" else self.seeds))


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


def names_script(config: CommonOptions) -> bool:
    """Whether an option names something of the script that was started, as ``__main__:name``."""
    values = (value for field in dataclasses.fields(config) for value in _values(config, field.name))
    return any(isinstance(value, str) and value.startswith("__main__:") for value in values)


HOW = frozenset(
    {
        *("workers", "executor", "executor_options", "results", "config", "list_claims", "dry_run"),
        *("shard", "fresh", "strict", "quiet", "redraw"),
    }
)
"""Options that say how to run, not what to measure; they are not recorded in ``config.json``."""
SHOWN = frozenset({"claims", "experiments"})
"""Options that choose among what is claimed and measured, without a change of either."""
SEEDS = frozenset({"seeds", "first_seed"})
"""Options that choose the seeds."""

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


def settings(config: CommonOptions) -> dict[str, Any]:
    """The settings of the executor by name: a value that is JSON as what it says, any other as text.

    Raises:
        ValueError: one is not of the form name=value, or there are two of one name.
    """
    found: dict[str, Any] = {}
    for word in config.executor_options:
        name, equals, value = word.partition("=")
        if not (equals and name.isidentifier()) or name in found:
            raise ValueError(f"--executor-options are name=value, each name once, such as partition=gpu; got {word!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def parse(defaults: C, argv: Sequence[str], *, prog: str, description: str) -> C:
    """Options from the command line over those of the file that ``--config`` names over the defaults.

    Raises:
        UsageError: the file cannot be read.
        SystemExit: after ``--help`` (code 0), or on a wrong command line or entry of the file (code 2), with the text
            already printed.
    """
    file, _ = pop_option("config", argv)
    if file:
        words = _words(_content(Path(file)))
        defaults = tyro.cli(type(defaults), prog=f"{prog} --config {file}", args=words, default=defaults)
    return tyro.cli(
        type(defaults),
        prog=prog,
        description=description,
        args=list(argv),
        default=defaults,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def pop_option(name: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of one option of a command line, None without it, and the command line without the option."""
    return _popped(name, argv, nargs="?")


def pop_names(name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names after an option of a command line, none without it, and the command line without the option.

    Raises:
        UsageError: there is the option without a name, or one name twice.
    """
    names, rest = _popped(name, argv, nargs="*", action="extend")
    if names == []:
        raise UsageError(f"{_option(name)} needs one name at least")
    for value, count in Counter(names or []).items():
        if count > 1:
            raise UsageError(f"{_option(name)} names {value} {count} times; name each once")
    return names or [], rest


def _popped(name: str, argv: Sequence[str], **kind: Any) -> tuple[Any, list[str]]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(f"--{name}", dest="value", **kind)
    found, rest = finder.parse_known_args(list(argv))
    return found.value, rest


def recorded(config: CommonOptions) -> dict[str, object]:
    """What ``config.json`` holds: every option that decides what is measured, as plain JSON values."""
    plain: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {name: value for name, value in plain.items() if name not in HOW}


def _content(path: Path) -> dict[str, Any]:
    """The options in a JSON file, by name.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"--config {path} is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no options by name")
    return content


def _words(options: Mapping[str, Any], group: str = "") -> list[str]:
    """Options as a command line that says the same."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, dict):
            words += _words(value, f"{group}{name}.")
        elif isinstance(value, bool):
            words.append(_option(group + name if value else f"{group}no_{name}"))
        else:
            words += [_option(group + name), *map(str, value if isinstance(value, list) else [value])]
    return words
