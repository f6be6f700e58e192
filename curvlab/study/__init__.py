"""Claims that can fail, the judge, results on disk, the command line and the look of figures.

An analysis describes itself as an `Analysis` (a question, claims, cells, a measurement per cell, figures) and
hands it to `main`, which gives it its command line, cache, statistics, results folder and exit code. This
package knows nothing of curvature and imports nothing else of curvlab.
"""

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
from curvlab.study.faults import DataUnavailable, MemoryShortage, StorageFull, StudyError, UsageError
from curvlab.study.judge import judge
from curvlab.study.options import CommonOptions, nearest
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
    "StorageFull",
    "StudyError",
    "UsageError",
    "Verdict",
    "contradicts",
    "every_cell",
    "judge",
    "latest",
    "load",
    "main",
    "nearest",
    "no_assumptions",
]
