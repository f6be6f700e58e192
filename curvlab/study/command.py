"""The command `curvlab`: list the analyses, run one, draw the figures of papers."""

import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.table import Table

from curvlab.study.registry import ANALYSES
from curvlab.study.runner import main as run
from curvlab.tools.errors import CommandError

USAGE = """\
usage: curvlab list                    the analyses, each with its question
       curvlab run NAME [options]      run one, or module:ANALYSIS; curvlab run NAME --help lists its options and claims
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
            return run(ANALYSES[rest[0]], rest[1:])
        if command == "figures":
            return int(import_module("paper_figures.__main__").main(rest))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    asked = {"--help", "-h"} & {command, *rest[:1]}
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
