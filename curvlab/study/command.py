"""The command `curvlab`: list the analyses, run one, draw the figures of papers."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from curvlab.study.options import pop_names
from curvlab.study.overviews.commands import diff, preregister, run_on, scoreboard
from curvlab.study.registry import ANALYSES
from curvlab.study.runner import main as run
from curvlab.tools.errors import CommandError
from curvlab.tools.text import unknown

COMMANDS = ("list", "run", "preregister", "scoreboard", "diff", "figures")
USAGE = """\
usage: curvlab list                    the analyses, each with its question
       curvlab run NAME [options]      run one, or module:ANALYSIS; curvlab run NAME --help lists its options and claims
       curvlab run NAME --problems A B … [options]   run it on several problems, and see which verdicts travel
       curvlab preregister NAME [options]            write down its claims, bounds and expectations, before a run
       curvlab scoreboard [RESULTS]    every claim on every problem over all results, with a page
       curvlab diff RUN RUN            what changed between two folders of results, and what is more than noise
       curvlab figures [PAPER …]       draw the figures of papers from stored results; --help says more"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        The exit code: that of the analysis or of the figures; 2 for wrong usage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if command == "list" and not rest:
            return _list()
        if command == "run" and rest and rest[0] not in ("--help", "-h"):
            analysis = ANALYSES[rest[0]]
            problems, options = pop_names("problems", rest[1:])
            return run_on(analysis, problems, options) if problems else run(analysis, options)
        if command == "preregister" and rest and rest[0] not in ("--help", "-h"):
            return preregister(ANALYSES[rest[0]], rest[1:])
        if command == "scoreboard" and len(rest) <= 1 and not {"--help", "-h"} & {*rest}:
            return scoreboard(Path(*rest) if rest else Path("results"))
        if command == "diff" and len(rest) == 2:
            return diff(Path(rest[0]), Path(rest[1]))
        if command == "figures":
            return int(import_module("paper_figures.__main__").main(rest))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # help, or what is wrong with an option, has been printed
        return int(stop.code or 0)
    asked = {"--help", "-h"} & {command, *rest[:1]}
    if not asked and command not in COMMANDS:
        print(f"error: {unknown('command', command, COMMANDS)}", file=sys.stderr)
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _list() -> int:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in ANALYSES:
        try:
            table.add_row(name, ANALYSES[name].question)
        except CommandError as error:
            table.add_row(name, f"[red]{error}[/]")
    Console().print(table)
    return 0
