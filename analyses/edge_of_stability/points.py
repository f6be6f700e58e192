"""What experiments share: their points, what cells at them cost, their source, and claims on runs for which a condition holds."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pandas as pd

from analyses.edge_of_stability.config import Config
from curvlab.study import Cell, Claim, Point

PAPER = "Cohen et al. 2021"

BAND = 0.1
"""Half width of the band about the threshold that counts as hovering there. The paper's README run stays 1.5 to 6.5 % above."""


def points(config: Config, wanted: Iterable[Point]) -> list[Point]:
    """Points at the configured problem."""
    return [{"problem": config.problem, **point} for point in wanted]


def effort(cell: Cell, config: Config) -> float:
    """How many times as long as at the default size a cell takes."""
    if cell["problem"] != config.problem:
        return 1.0
    return max(0.3, config.width**2 * (config.depth - 1) * config.samples * config.steps / (2 * 64**2 * 128 * 800))


def memory(cell: Cell, config: Config) -> float:  # noqa: ARG001
    """Peak bytes of a cell."""
    return 5e8 + 8.0 * config.samples * (3072 + 60 * config.width)


def page(place: str) -> str:
    """Return the paper as a source, with a place on its page of theory."""
    return f"{PAPER} (docs/theory/cohen_2021.md, {place})"


def given(claim: Claim, condition: str, otherwise: str) -> Claim:
    """Return a claim on runs for which a condition holds.

    If it holds for none, they are outside the assumptions; a seed of which it holds for none, where it does for others,
    leaves the claim inconclusive.

    Args:
        claim: A claim on all runs.
        condition: Quantity, 1 or 0, that every run has.
        otherwise: What is said if it holds for none; `{count}` is the number of runs.
    """
    read = claim.quantities

    def assumptions(table: pd.DataFrame) -> str | None:
        held = table.loc[table["quantity"] == condition, "value"]
        return claim.assumptions(table) if held.any() else otherwise.format(count=len(held))

    return replace(
        claim,
        rule=replace(claim.rule, quantities=(*read, condition)),
        estimate=lambda table: claim.estimated(table[table["quantity"].isin(read)]),
        assumptions=assumptions,
    )


reaching = partial(given, condition="reached", otherwise="None of {count} runs reached its threshold.")
"""A claim on runs that reach their threshold."""
