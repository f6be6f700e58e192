"""Claims that can fail, the judge, results on disk, the command line and the look of figures.

An analysis describes itself as an `Analysis` (a question, claims, cells, a measurement per cell, figures) and
hands it to `main`, which gives it its command line, cache, statistics, results folder and exit code. This
package knows nothing of curvature and imports nothing of curvlab but `curvlab.tools`.

A name is imported when it is first used, so that a command line answers before matplotlib and pandas are there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curvlab.study.analysis import Analysis
    from curvlab.study.cells import Cell, Scalar
    from curvlab.study.claims import (
        Claim,
        Equivalence,
        Failure,
        Identity,
        Inequality,
        Verdict,
        contradicts,
        every_cell,
        no_assumptions,
    )
    from curvlab.study.faults import DataUnavailable, MemoryShortage, UsageError
    from curvlab.study.judging import judge
    from curvlab.study.options import CommonOptions
    from curvlab.study.results import Results, latest, load
    from curvlab.study.runner import main

__all__ = [
    "Analysis",
    "Cell",
    "Claim",
    "CommonOptions",
    "DataUnavailable",
    "Equivalence",
    "Failure",
    "Identity",
    "Inequality",
    "MemoryShortage",
    "Results",
    "Scalar",
    "UsageError",
    "Verdict",
    "contradicts",
    "every_cell",
    "judge",
    "latest",
    "load",
    "main",
    "no_assumptions",
]

_MODULES = ("faults", "cells", "options", "claims", "judging", "results", "analysis", "runner")
"""Where the names are defined, what is quick to import first."""


if not TYPE_CHECKING:  # so that a name that does not exist is an error to static checkers

    def __getattr__(name: str) -> object:
        if name in __all__:
            for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
                if name in vars(module):
                    globals()[name] = vars(module)[name]
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
