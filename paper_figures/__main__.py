"""Command line of the papers' figures."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

from curvlab.study import Results, style
from curvlab.study import main as run_analysis
from curvlab.study.publish import figure_of
from curvlab.tools.errors import CommandError, DataUnavailable
from curvlab.tools.storage import make_folder, write
from paper_figures import Paper, find, names


@dataclass(frozen=True)
class Options:
    """Draw the figures and tables of a paper from stored results of its analysis; without a paper, list them.

    Exit code 2 if the paper is not known, 3 if its results are not stored.
    """

    paper: tyro.conf.Positional[str | None] = None
    """Paper whose figures to draw."""
    problem: str | None = None
    """Data set and model in place of the paper's own, such as digits."""
    results: Path = Path("results")
    """Folder with the results of the analyses."""
    output: Path = Path("figures")
    """Folder for the figures (PDF and PNG) and tables (LaTeX), one folder a paper."""
    run: bool = False
    """Run the analysis first if its results are not stored."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a paper's figures or list the papers; returns the exit code."""
    options = tyro.cli(Options, prog="python -m paper_figures", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        if options.paper is None:
            for name in names():
                print(_entry(name, _at(find(name), options), options.results))
            return 0
        return _make(options.paper, _at(find(options.paper), options), options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _at(paper: Paper, options: Options) -> Paper:
    """The paper on the problem of the options."""
    if options.problem is None:
        return paper
    return dataclasses.replace(paper, settings={**paper.settings, "problem": options.problem})


def _entry(name: str, paper: Paper, results: Path) -> str:
    stored = paper.stored(results)
    state = f"results: {stored.folder}" if stored else f"missing: {paper.command(results)}"
    return "\n".join(
        (
            f"{name}  {paper.title}",
            f"    figures: {', '.join(paper.figures)}; tables: {', '.join(paper.tables)}",
            f"    {state}",
        )
    )


def _make(name: str, paper: Paper, options: Options) -> int:
    stored = paper.stored(options.results)
    if stored is None and options.run:
        code = run_analysis(paper.analysis, paper.arguments(options.results))
        if code:
            return code
        stored = paper.stored(options.results)
    if stored is None:
        raise DataUnavailable(
            f"the results that {name} needs are not in {options.results}; measure them with\n"
            f"    {paper.command(options.results)}\nor add --run"
        )
    _draw(paper, stored, options.output / name)
    return 0


def _draw(paper: Paper, stored: Results, folder: Path) -> None:
    make_folder(folder)
    print(f"from {stored.folder}")
    for name, draw in paper.figures.items():
        with style.use():
            figure = figure_of(draw, stored)
            try:
                style.save(figure, folder / name)
            finally:
                plt.close(figure)
        print(f"drawn: {folder / name}.pdf and .png")
    for name, table in paper.tables.items():
        path = folder / f"{name}.tex"
        write(path, table(stored.measurements).to_latex(index=False, escape=False).encode())
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
