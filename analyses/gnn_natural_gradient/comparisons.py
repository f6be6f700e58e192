"""Comparisons of arms, seed by seed, and the claims that are made of them; an arm of one experiment serves those of another."""

from collections.abc import Sequence

import pandas as pd

from analyses.claims import claim
from analyses.gnn_natural_gradient.arms import JUDGED
from analyses.gnn_natural_gradient.training import ACCURACY, VALIDATION, VALIDATION_LOSS
from curvlab.study import Claim, Expected, Inequality, difference_by_seed

PAPER = "Izadi, Fang, Stevenson & Lin 2020"


def runs(arms: Sequence[str], split: str) -> dict[str, object]:
    """Return the coordinates of the runs of some arms on a split, in whichever experiment they are."""
    return {"experiment": lambda _: True, "arm": tuple(arms), "split": split}


def values(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Return a quantity, a row per seed and a column per arm."""
    return table[table["quantity"] == quantity].pivot_table("value", "seed", "arm")


def ranked(table: pd.DataFrame, arms: Sequence[str], quantity: str = VALIDATION) -> list[str]:
    """Return arms from the highest mean accuracy, of the nodes that validate unless said otherwise, to the lowest.

    Of several with the same, the one with the lowest mean validation loss comes first.
    """
    accuracy, loss = values(table, quantity).mean(), values(table, VALIDATION_LOSS).mean()
    return sorted(arms, key=lambda arm: (-round(float(accuracy[arm]), 9), float(loss[arm])))


def difference(table: pd.DataFrame, first: str, second: str, quantity: str = ACCURACY) -> pd.DataFrame:
    """Return a quantity of an arm minus that of another, seed by seed."""
    return difference_by_seed(table[table["quantity"] == quantity], "arm", first, second)


def gain(
    id_: str, statement: str, number: str, first: Sequence[str], second: Sequence[str], split: str, expected: Expected
) -> Claim:
    """Return the claim that one arm has a higher test accuracy than another, each the best on validation data of several.

    Args:
        id_: Of the claim.
        statement: Of the claim.
        number: Of the paper's claim.
        first: The arms of which one should have the higher accuracy; without any there is nothing to measure.
        second: Those of which one should have the lower.
        split: On which they are compared.
        expected: By its author.
    """
    chosen = " Each is the one of its kind with the highest mean validation accuracy." if len(first) > 1 else ""
    return claim(
        id_, f"{PAPER}, {number}", Inequality(JUDGED, "greater", 0.0),
        statement,
        "Difference of test accuracies at the lowest validation loss, in percentage points, between "
        f"{' or '.join(first)} and {' or '.join(second)}, seed by seed, on the {split} split.{chosen}",
        expected,
        at=runs([*first, *second] if first and second else (), split),
        estimate=lambda table: difference(table, ranked(table, first)[0], ranked(table, second)[0]),
    )  # fmt: skip
