"""An analysis: a question, the experiments that answer it, and the figures."""

import dataclasses
import inspect
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Generic

import pandas as pd
from matplotlib.figure import Figure

from curvlab.study.cells import Cell
from curvlab.study.claims import Claim
from curvlab.study.experiment import Experiment
from curvlab.study.options import C, CommonOptions, names_script

Draw = Callable[[pd.DataFrame, pd.DataFrame], Figure]


def no_data(config: CommonOptions) -> str:
    """The digest of a problem that its name says everything about."""
    return config.problem


def its_problem(config: CommonOptions) -> dict[str, object]:
    """What a run measures on, where the name of its problem says everything about it."""
    return {"problem": config.problem}


def as_estimated(cell: Cell, config: object) -> float:  # noqa: ARG001
    """Cells take as long as their experiment says."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Analysis(Generic[C]):
    """One theory under test; `curvlab.study.main` gives it its command line.

    Attributes:
        name: Name of its module and of its results folder.
        question: The question that it answers, in one or two sentences.
        config: Frozen dataclass with its options and their defaults.
        experiments: What it measures and claims.
        figures: Name → draw(measurements, verdicts) from stored results only.
        paper: The paper that it tests.
        examples: Command lines after the command, each with what it does.
        cost: What the run without options costs, in words.
        version: Raise it when a measurement changes its meaning: cached cells of other versions are not used.
        subject: Configuration → what it is measured on, by name: data set, number of samples, graph, widths, …; each a
            number, text or a tuple of them.
        data_hash: Configuration → digest of the data; cells measured on other data are not used.
        axes: Options that only choose which cells there are, such as ``widths``: changing one keeps the
            cached cells. Every other option of the analysis is taken to change each measurement.
        together: Coordinates; cells that agree in them are measured side by side, because they share what the analysis
            keeps from one cell to the next.
        effort: How many times as long as its experiment says a cell takes at a configuration.
        memory_option: The option that lowers the memory of a cell, named when memory runs short.
    """

    name: str
    question: str
    config: type[C]
    experiments: tuple[Experiment[C], ...]
    figures: Mapping[str, Draw] = dataclasses.field(default_factory=dict)
    paper: str = ""
    examples: tuple[str, ...] = ()
    cost: str = ""
    version: int = 1
    subject: Callable[[C], Mapping[str, object]] = its_problem
    data_hash: Callable[[C], str] = no_data
    axes: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    effort: Callable[[Cell, C], float] = as_estimated
    memory_option: str = "--problem"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"an analysis is called like a module, got {self.name!r}")
        fields = {field.name: field for field in dataclasses.fields(self.config)}
        unset = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        if unset:
            raise ValueError(f"{self.config.__name__} needs a default for {', '.join(unset)}: no option is compulsory")
        if unknown := set(self.axes) - fields.keys():
            raise ValueError(f"axes {', '.join(sorted(unknown))} are no options of {self.config.__name__}")
        if len(self._by_name) < len(self.experiments):
            counts = Counter(experiment.name for experiment in self.experiments)
            raise ValueError(f"two experiments of {self.name} have one name: {counts.most_common(1)[0][0]}")
        for experiment in self.experiments:
            if unknown := set(experiment.after) - self._by_name.keys():
                raise ValueError(
                    f"experiment {experiment.name!r} comes after {', '.join(sorted(unknown))}, unknown here"
                )
        self._stages  # noqa: B018  # raises where experiments wait for each other

    def experiment(self, name: str) -> Experiment[C]:
        """The experiment of a name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Experiment[C]]:
        return {experiment.name: experiment for experiment in self.experiments}

    @cached_property
    def _stages(self) -> dict[str, int]:
        """How many experiments have to come before one, in a row."""
        found: dict[str, int] = {}
        while len(found) < len(self.experiments):
            ready = [e for e in self.experiments if e.name not in found and set(e.after) <= found.keys()]
            if not ready:
                waiting = ", ".join(sorted(self._by_name.keys() - found.keys()))
                raise ValueError(f"experiments of {self.name} wait for each other: {waiting}")
            found |= {e.name: 1 + max((found[name] for name in e.after), default=-1) for e in ready}
        return found

    def ancestors(self, name: str) -> tuple[str, ...]:
        """Experiments that have to come before one, those before these among them."""
        direct = self.experiment(name).after
        return tuple(dict.fromkeys([*direct, *(further for one in direct for further in self.ancestors(one))]))

    def stage(self, cell: Cell) -> int:
        """Which cells come first: those of a lower stage."""
        return self._stages[str(cell["experiment"])]

    def claims(self, config: C) -> list[Claim]:
        """All claims, each as one of its experiment."""
        return [claim for e in self.experiments for claim in e.claimed(config)]

    def cells(self, config: C) -> list[Cell]:
        """All cells, in the order in which they are measured."""
        cells = [cell for e in self.experiments for cell in e.planned(config)]
        shared = [tuple(cell.coordinates.get(name) for name in self.together) for cell in cells]
        first = {group: place for place, group in reversed(list(enumerate(shared)))}
        places = dict(zip(cells, (first[group] for group in shared), strict=True)) if self.together else {}
        return sorted(cells, key=lambda cell: (self.stage(cell), places.get(cell, 0)))

    def resources(self, cell: Cell, config: C) -> tuple[float, float]:
        """Estimated seconds and peak bytes of a cell."""
        seconds, memory = self.experiment(str(cell["experiment"])).resources(cell, config)
        return seconds * self.effort(cell, config), memory

    @cached_property
    def _measures(self) -> Callable[..., object]:
        """The function or class of its first measurement, or else its options."""
        measure: Callable[..., object] = self.experiments[0].measure if self.experiments else self.config
        while isinstance(measure, partial):
            measure = measure.func
        return measure if inspect.isroutine(measure) or inspect.isclass(measure) else type(measure)

    @property
    def file(self) -> Path:
        """The file with its first measurement."""
        return Path(inspect.getfile(self._measures))

    @property
    def command(self) -> str:
        """The command that runs it: the package around it, the script that it is, or by its name."""
        if package := self._package():
            return f"python -m {package}"
        if (started := _script()) and self.file.resolve() == started.resolve():
            return f"python {shlex.quote(sys.argv[0])}"
        return f"curvlab run {self._address()}"

    def command_for(self, config: C) -> str:
        """The command that runs it with a configuration: the script that was started, if an option names a part of that."""
        return f"python {shlex.quote(sys.argv[0])}" if _script() and names_script(config) else self.command

    def _address(self) -> str:
        """Its name if a package has registered it, else where it stands, as ``module:attribute``."""
        module = sys.modules[self._measures.__module__]
        names = [name for name, thing in vars(module).items() if thing is self]
        registered = entry_points(group="curvlab.analyses", name=self.name)
        return f"{module.__name__}:{names[0]}" if names and not registered else self.name

    def _package(self) -> str:
        """The nearest package around it that `python -m` can run."""
        name = self._measures.__module__
        while "." in name:
            name = name.rpartition(".")[0]
            if find_spec(f"{name}.__main__"):
                return name
        return ""

    @property
    def defaults(self) -> C:
        """The configuration of the run without options."""
        return self.config()  # type: ignore[call-arg]  # every field has a default, see __post_init__

    @property
    def description(self) -> str:
        """What ``--help`` says before the options."""
        claims = self.claims(self.defaults)
        column = max((len(claim.id) for claim in claims), default=0) + 4
        parts = [
            self.question,
            f"Paper: {self.paper}" if self.paper else "",
            f"Without options: {self.cost}" if self.cost else "",
            "\n".join(["Claims:", *(_hang(f"  {claim.id}".ljust(column), claim.statement) for claim in claims)]),
            "\n".join(["Examples:", *(f"  {self.command} {example}" for example in self.examples)])
            if self.examples
            else "",
        ]
        return "\n\n".join(part for part in parts if part)


def _script() -> Path | None:
    """The script that was started, if it was one."""
    started = getattr(sys.modules["__main__"], "__file__", None)
    return Path(started) if started else None


def _hang(label: str, text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent=label, subsequent_indent=" " * len(label))
