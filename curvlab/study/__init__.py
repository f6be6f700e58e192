"""Experiments, claims that can fail, the judge, results on disk, the command line and the look of figures.

An analysis describes itself as an `Analysis` (a question, experiments with their cells, measurements and claims, figures) and
hands it to `main`, which gives it its command line, cache, statistics, results folder and exit code. This
package knows nothing of curvature and imports nothing of curvlab but `curvlab.tools`.
"""

from curvlab.study.analysis import Analysis
from curvlab.study.cells import Cell, Scalar
from curvlab.study.claims import (
    Claim,
    Expected,
    Failure,
    Verdict,
    contradicts,
    refuted,
    supported,
    undecided,
)
from curvlab.study.estimates import (
    among,
    at_largest_width,
    by_seed,
    difference_by_seed,
    geometric_by_seed,
    identities,
    least_by_seed,
    needs_several,
    needs_several_widths,
    slope_by_seed,
    worst_by_seed,
)
from curvlab.study.experiment import Context, Experiment, Observations, Point
from curvlab.study.faults import MemoryShortage, UsageError
from curvlab.study.judging import judge
from curvlab.study.loop import Diverged, Trace, follow
from curvlab.study.measurements import observed, outside, round_off
from curvlab.study.options import CommonOptions, check_bounds, check_names, check_positive, check_some
from curvlab.study.registry import ANALYSES
from curvlab.study.results import Results, latest, load
from curvlab.study.runner import main
from curvlab.study.statistics.rules import Always, Equivalence, Identity, Inequality, Share, Spread, Wins
from curvlab.study.streams import generator, stream

__all__ = [
    "ANALYSES", "Always", "Analysis", "Cell", "Claim", "CommonOptions", "Context", "Diverged", "Equivalence",
    "Expected", "Experiment", "Failure", "Identity", "Inequality", "MemoryShortage", "Observations", "Point",
    "Results", "Scalar", "Share", "Spread", "Trace", "UsageError", "Verdict", "Wins", "among", "at_largest_width",
    "by_seed", "check_bounds", "check_names", "check_positive", "check_some", "contradicts", "difference_by_seed",
    "follow", "generator", "geometric_by_seed", "identities", "judge", "latest", "least_by_seed", "load", "main",
    "needs_several", "needs_several_widths", "observed", "outside", "refuted", "round_off", "slope_by_seed", "stream",
    "supported", "undecided", "worst_by_seed",
]  # fmt: skip
