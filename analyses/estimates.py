"""What claims decide on: measurements reduced to one value a seed, or for an identity to observations and tolerances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd


def identities(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate of an identity: every observation with its own tolerance."""
    return table[["seed", "value", "tolerance"]]


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the mean over a seed's observations."""
    return table.groupby("seed")["value"].mean().reset_index()


def worst_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the largest of a seed's observations."""
    return table.groupby("seed")["value"].max().reset_index()


def least_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the smallest of a seed's observations."""
    return table.groupby("seed")["value"].min().reset_index()


def at_largest_width(estimate: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return the estimate from the widest networks only."""
    return lambda table: estimate(table[table["width"] == table["width"].max()])


def slope_by_seed(table: pd.DataFrame, against: str = "width") -> pd.DataFrame:
    """Estimate by the slope of log value against the logarithm of a column, of each seed."""
    slopes = {
        seed: np.polyfit(np.log(group[against].astype(float)), np.log(group["value"]), 1)[0]
        for seed, group in table.groupby("seed")
    }
    return pd.DataFrame({"seed": list(slopes), "value": list(slopes.values())})


def needs_several_widths(table: pd.DataFrame) -> str | None:
    """Say that a slope needs more than one width."""
    return None if len(set(table["width"])) > 1 else "A slope against width needs at least two widths (--widths)."


def difference_by_seed(table: pd.DataFrame, column: str, first: object, second: object) -> pd.DataFrame:
    """Estimate by the value where a column is `first` minus the one where it is `second`, seed by seed."""
    wide = table.pivot_table("value", "seed", column)
    return (wide[first] - wide[second]).rename("value").reset_index()
