"""What changed on purpose since the results were stored: the one place where what is stored is translated.

Each table goes from the stored name to today's; None stands for what does not exist any more.
"""

from collections.abc import Mapping

from curvlab.study.measurements import OUTSIDE

EVERYWHERE: Mapping[str, str] = {"part": "experiment"}
"""Coordinates of cells and other columns that say what a number is, in every analysis."""

COORDINATES: Mapping[str, Mapping[str, str]] = {"gnn_natural_gradient": {"start": "seed"}}
"""The same by analysis."""

ADDED: Mapping[str, Mapping[str, object]] = {"spectrum": {"experiment": "spectra"}, "training": {"seed": 1000}}
"""Coordinates that cells without them have now, by analysis."""

QUANTITIES: Mapping[str, Mapping[str, str | None]] = {
    "gnn_acceleration": {"excess": "excess_{model}"},
    "jacobian_rank": {"excess_uncovered": "excess"},
    "ntk_isotropy": {"layer_distance_short_of_rank": "layer_distance"},
}
"""Quantities, by analysis; braces stand for another column of the number."""

STATUSES: Mapping[str, Mapping[tuple[str, str, str], tuple[str, ...]]] = {
    "jacobian_rank": {("general-loss", "excess_uncovered", ""): (OUTSIDE,), ("networks", "excess", ""): (OUTSIDE,)},
    "ntk_isotropy": {("response", "layer_distance_short_of_rank", ""): (OUTSIDE,)},
    "training": {("tuning", "tuning_steps", "not reached"): ("not reached", "diverged at step ")},
}
"""How the status may begin of observations of an experiment, a stored quantity and a stored status, by analysis.

The others' status begins as the stored one: "diverged" is "diverged at step 16" now.
"""

FACTORS: Mapping[str, Mapping[tuple[str, str], float]] = {"ntk_isotropy": {("first_layer_forster", "tolerance"): 1.5}}
"""Quantities and columns whose numbers have changed, by analysis, and by which factor at most.

The tolerance of the Forster transform's claim holds the deviation of that transform, not that of a second one after it.
"""

CLAIMS: Mapping[str, Mapping[str, str | None]] = {}
"""Ids of claims, by analysis."""

OUTCOMES: Mapping[str, Mapping[str, str]] = {
    "jacobian_rank": dict.fromkeys(("rate-bound", "rate-bound-path", "general-bound"), OUTSIDE)
}
"""Outcomes of claims that were inconclusive because nothing was measured for them, by analysis.

The others may be "not measured"; they are no more in the family of a run, whose intervals and adjusted p-values change then.
"""

VERDICT = ("rule", "expected", "outcome", "seeds", "estimate", "low", "high", "confidence", "p_value", "p_adjusted")
"""What is compared of a verdict. The last five but `p_value` depend on which claims are one family."""
