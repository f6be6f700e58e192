"""What was renamed or dropped on purpose since the results were stored: the one place where old names are translated.

Each table goes from the stored name to today's; None stands for what does not exist any more.
"""

from collections.abc import Mapping

COORDINATES: Mapping[str, str] = {}
"""Coordinates of cells and other columns that say what a number is, in every analysis."""

VALUES: Mapping[str, Mapping[str, str]] = {}
"""Values of a coordinate, by its stored name: of `part`, the names of experiments."""

QUANTITIES: Mapping[str, Mapping[str, str | None]] = {}
"""Quantities, by analysis."""

CLAIMS: Mapping[str, Mapping[str, str | None]] = {}
"""Ids of claims, by analysis."""

VERDICT = ("rule", "expected", "outcome", "seeds", "estimate", "low", "high", "confidence", "p_value", "p_adjusted")
"""What is compared of a verdict. The last five but `p_value` depend on which claims are one family."""
