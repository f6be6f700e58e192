"""What claims decide on: measurements reduced to one value a seed, or for an identity to observations and tolerances."""

from collections.abc import Callable

import numpy as np
import pandas as pd

Estimate = Callable[[pd.DataFrame], pd.DataFrame]
"""Measurements to what a claim is decided on."""


def identities(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate of an identity: every observation with its own tolerance."""
    return table[["seed", "value", "tolerance"]]


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the mean over a seed's observations."""
    return table.groupby("seed")["value"].mean().reset_index()


def geometric_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the geometric mean over a seed's observations."""
    logs = by_seed(table.assign(value=np.log(table["value"])))
    return logs.assign(value=np.exp(logs["value"]))


def worst_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the largest of a seed's observations."""
    return table.groupby("seed")["value"].max().reset_index()


def least_by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate by the smallest of a seed's observations."""
    return table.groupby("seed")["value"].min().reset_index()


def among(estimate: Estimate, **columns: object) -> Estimate:
    """Return the estimate from the observations with given entries only; a tuple lists those allowed."""

    def restricted(table: pd.DataFrame) -> pd.DataFrame:
        for name, entry in columns.items():
            table = table[table[name].isin(entry if isinstance(entry, tuple) else (entry,))]
        return estimate(table)

    return restricted


def at_largest_width(estimate: Estimate) -> Estimate:
    """Return the estimate from the widest networks only."""
    return lambda table: estimate(table[table["width"] == table["width"].max()])


def slope_by_seed(table: pd.DataFrame, against: str = "width") -> pd.DataFrame:
    """Estimate by the slope of log value against the logarithm of a column, of each seed."""
    slopes = {
        seed: np.polyfit(np.log(group[against].astype(float)), np.log(group["value"]), 1)[0]
        for seed, group in table.groupby("seed")
    }
    return pd.DataFrame({"seed": list(slopes), "value": list(slopes.values())})


def needs_several(column: str, values: str) -> Callable[[pd.DataFrame], str | None]:
    """Return what says that a slope against a column needs more than one of its values, and what these are called."""

    def assumptions(table: pd.DataFrame) -> str | None:
        return None if len(set(table[column])) > 1 else f"A slope against {column} needs at least two {values}."

    return assumptions


needs_several_widths = needs_several("width", "widths (--widths)")
"""Say that a slope needs more than one width."""


def difference_by_seed(table: pd.DataFrame, column: str, first: object, second: object) -> pd.DataFrame:
    """Estimate by the value where a column is `first` minus the one where it is `second`, seed by seed."""
    wide = table.pivot_table("value", "seed", column)
    return (wide[first] - wide[second]).rename("value").reset_index()
