"""Command line of the papers' figures."""

from __future__ import annotations

import sys
from collections import Counter
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
    """Draw the figures and tables of papers from results of their analyses: stored ones, or those that come with the package.

    Exit code 2 if the paper is not known, 3 if there are no results.
    """

    paper: tyro.conf.Positional[str | None] = None
    """Paper whose figures to draw; all of them without."""
    problem: str | None = None
    """Data set and model in place of the paper's own, such as digits."""
    results: Path = Path("results")
    """Folder with the results of the analyses."""
    output: Path = Path("figures")
    """Folder for the figures (PDF and PNG) and tables (LaTeX), one folder a paper."""
    run: bool = False
    """Run the analysis at the paper's settings first, from nothing but finished cells in the folder of the results."""
    list: bool = False
    """List the papers with their figures and the results that they are drawn from, and stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figures of papers, or list them; returns the exit code."""
    options = tyro.cli(Options, prog="python -m paper_figures", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        chosen = names() if options.paper is None else [options.paper]
        papers = [part for name in chosen for part in _parts(name, options)]
        if options.list:
            for name, paper in papers:
                print(_entry(name, paper, options.results))
            return 0
        return max(_make(paper, options, options.output / name) for name, paper in papers)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parts(name: str, options: Options) -> list[tuple[str, Paper]]:
    """A paper on each of its problems, or on that of the options, with the name of its folder."""
    paper = find(name)
    if options.problem is not None:
        return [(name, paper.on(options.problem))]
    return [(name, paper), *((f"{name}-{problem}", paper.on(problem)) for problem in paper.others)]


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


def _make(paper: Paper, options: Options, folder: Path) -> int:
    if options.run:
        code = run_analysis(paper.analysis, paper.arguments(options.results))
        if code:
            return code
    stored = paper.stored(options.results)
    if stored is None:
        raise DataUnavailable(
            f"the results that {folder.name} needs are not in {options.results}; measure them with\n"
            f"    {paper.command(options.results)}\nor add --run"
        )
    _draw(paper, stored, folder)
    return 0


def _draw(paper: Paper, stored: Results, folder: Path) -> None:
    make_folder(folder)
    outcomes = Counter(stored.verdicts["outcome"] if len(stored.verdicts) else ())
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"from {stored.folder} (claims: {said or 'none'})")
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
