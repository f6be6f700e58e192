"""An analysis: a question, the claims that answer it, the cells that measure them, and the figures."""

import dataclasses
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import pandas as pd
from matplotlib.figure import Figure

from curvlab.study.cells import Cell
from curvlab.study.claims import Claim
from curvlab.study.options import C


def no_figures() -> Mapping[str, Callable[[pd.DataFrame, pd.DataFrame], Figure]]:
    """No figures."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Analysis(Generic[C]):
    """One theory under test; `curvlab.study.main` gives it its command line.

    Attributes:
        name: Name of its module and of its results folder.
        version: Raise it when a measurement changes its meaning: cached cells of other versions are not used.
        question: The question that it answers, in one or two sentences.
        paper: The paper that it tests.
        examples: Two command lines after ``python -m analyses.<name>``, each with what it does.
        cost: What the run without options costs, in words.
        config: Frozen dataclass with its options and their defaults.
        claims: Configuration → the claims, fixed before anything is measured.
        cells: Configuration → the cells, in the order in which they run.
        data_hash: Configuration → digest of the data; cells measured on other data are not used.
        measure: One cell → its observations, each with at least ``quantity`` and ``value``; further columns
            such as ``layer``, ``sample``, ``step`` and ``status`` as the analysis likes. The cell's
            coordinates are added.
        resources: One cell → estimated seconds and peak bytes.
        figures: Name → draw(measurements, verdicts) from stored results only.
        axes: Options that only choose which cells there are, such as ``widths``: changing one keeps the
            cached cells. Every other option of the analysis is taken to change each measurement.
        memory_option: The option that lowers the memory of a cell, named when memory runs short.
        module: Module that ``python -m`` runs; ``analyses.<name>`` unless said otherwise.
    """

    name: str
    version: int
    question: str
    paper: str
    examples: tuple[str, str]
    cost: str
    config: type[C]
    claims: Callable[[C], Sequence[Claim]]
    cells: Callable[[C], Sequence[Cell]]
    data_hash: Callable[[C], str]
    measure: Callable[[Cell, C], Sequence[Mapping[str, object]]]
    resources: Callable[[Cell, C], tuple[float, float]]
    figures: Mapping[str, Callable[[pd.DataFrame, pd.DataFrame], Figure]] = dataclasses.field(
        default_factory=no_figures
    )
    axes: tuple[str, ...] = ()
    memory_option: str = "--problem"
    module: str = ""

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

    @property
    def command(self) -> str:
        """The command that runs it."""
        return f"python -m {self.module or f'analyses.{self.name}'}"

    @property
    def defaults(self) -> C:
        """The configuration of the run without options."""
        return self.config()  # type: ignore[call-arg]  # every field has a default, see __post_init__

    @property
    def description(self) -> str:
        """What ``--help`` says before the options."""
        claims = self.claims(self.defaults)
        column = max((len(claim.id) for claim in claims), default=0) + 4
        lines = [
            self.question,
            "",
            f"Paper: {self.paper}",
            "",
            f"Without options: {self.cost}",
            "",
            "Claims:",
            *(_hang(f"  {claim.id}".ljust(column), claim.statement) for claim in claims),
            "",
            "Examples:",
            *(f"  {self.command} {example}" for example in self.examples),
        ]
        return "\n".join(lines)


def _hang(label: str, text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent=label, subsequent_indent=" " * len(label))
