"""Figures of papers, drawn from stored results of the analyses: `python -m paper_figures`.

Every module of this package is a paper and holds its `PAPER`: a new paper is one new file. Results at the papers' settings are in
`published`, laid out like any folder of results, without figures and reports.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from curvlab.study import Analysis, Results, UsageError, load
from curvlab.study.inference import Summary
from curvlab.tools.text import unknown

__all__ = ["PUBLISHED", "Paper", "find", "interval", "names"]

PUBLISHED = Path(__file__).with_name("published")
"""The results that come with the package."""

Setting = str | int | bool | tuple[str, ...]


@dataclass(frozen=True)
class Paper:
    """A paper and the figures and tables that are arranged from one analysis at the paper's settings.

    Attributes:
        title: Authors, year and title.
        analysis: The analysis that measures what is drawn.
        settings: Options of the analysis that make the paper's settings; lists and numbers are the least that a run must hold.
        figures: Name to draw(measurements, verdicts).
        tables: Name to table(measurements), LaTeX in its cells.
        others: Problems of the paper besides that of the settings, and the figures that are drawn on them.
    """

    title: str
    analysis: Analysis[Any]
    settings: Mapping[str, Setting]
    figures: Mapping[str, Callable[[pd.DataFrame, pd.DataFrame], Figure]]
    tables: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]]
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """The problem that its figures are drawn on."""
        return str(self.settings["problem"])

    def on(self, problem: str) -> Paper:
        """The paper on one problem, without others."""
        figures = {name: draw for name, draw in self.figures.items() if name in self.others.get(problem, self.figures)}
        return replace(self, settings={**self.settings, "problem": problem}, figures=figures, others={})

    def arguments(self, results: Path) -> list[str]:
        """Command line of the analysis at the paper's settings."""
        arguments = []
        for name, value in self.settings.items():
            arguments += [f"--{name.replace('_', '-')}", *_words(value)]
        return [*arguments, "--results", str(results)]

    def command(self, results: Path) -> str:
        """The command that measures what the figures need."""
        return f"{self.analysis.command} {shlex.join(self.arguments(results))}"

    def stored(self, results: Path) -> Results | None:
        """The newest complete results at the paper's settings, or those that come with the package; None without.

        Raises:
            UsageError: they cannot be read.
        """
        for place in (results, PUBLISHED):
            folders = [path.parent for path in (place / self.analysis.name).glob("*/verdicts.json")]
            runs = {folder.resolve() for folder in folders if not folder.name.endswith("-partial")}
            for folder in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True):
                if self._fits(folder / "config.json"):
                    return load(folder)
        return None

    def _fits(self, config: Path) -> bool:
        try:
            options = json.loads(config.read_text())
        except (OSError, ValueError):
            return False
        return not options.get("claims") and all(
            _holds(options.get(name), value) for name, value in self.settings.items()
        )


def _words(value: Setting) -> tuple[str, ...]:
    """What follows the name of an option on the command line."""
    if value is True:
        return ()
    return value if isinstance(value, tuple) else (str(value),)


def _holds(option: Any, value: Setting) -> bool:
    """Whether the option of a run is what a setting asks for, or more."""
    if isinstance(value, tuple):
        return isinstance(option, list) and set(value) <= set(option)
    if isinstance(value, str | bool) or not isinstance(option, int):
        return bool(option == value)
    return option >= value


def names() -> list[str]:
    """The papers, by the names of their modules."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> Paper:
    """The paper of a name.

    Raises:
        UsageError: there is none; the message suggests the nearest.
    """
    if name not in names():
        raise UsageError(unknown("paper", name, names()))
    paper: Paper = import_module(f"{__name__}.{name}").PAPER
    return paper


def interval(values: pd.Series[float], mean: str, half: str | None = None) -> str:
    """Mean ± half the 95 % t-interval over seeds, in LaTeX.

    Args:
        values: One a seed.
        mean: Format of the mean, such as ``.2f``.
        half: Format of the half interval; that of the mean if None.
    """
    summary = Summary.of(values.to_numpy(dtype=float))
    low, high = summary.interval(0.95)
    return rf"${summary.mean:{mean}} \pm {(high - low) / 2:{half or mean}}$"
