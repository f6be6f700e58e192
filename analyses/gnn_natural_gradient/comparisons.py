"""Comparisons of arms, seed by seed, and the claims that are made of them; an arm of one experiment serves those of another."""

from collections.abc import Sequence

import pandas as pd

from analyses.claims import claim
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.training import ACCURACY
from curvlab.study import Claim, Expected, Inequality, by_seed, difference_by_seed
from curvlab.study.claims import Group

PAPER = "Izadi, Fang, Stevenson & Lin 2020"


def runs(arms: Sequence[str], split: str) -> dict[str, object]:
    """Return the coordinates of the runs of some arms on a split, in whichever experiment they are."""
    return {"experiment": lambda _: True, "arm": tuple(arms), "split": split}


def difference(table: pd.DataFrame, first: str, second: str, quantity: str = ACCURACY) -> pd.DataFrame:
    """Return a quantity of an arm minus that of another, seed by seed."""
    return difference_by_seed(table[table["quantity"] == quantity], "arm", first, second)


def gain(
    id_: str,
    statement: str,
    number: str,
    pairs: Sequence[tuple[str, str]],
    config: Config,
    expected: Expected,
    group: Group,
    split: str = "",
) -> Claim:
    """Return the claim that one arm has a higher test accuracy than another, on average over pairs of arms.

    Args:
        id_: Of the claim.
        statement: Of the claim.
        number: Of the paper's claim.
        pairs: The arm that should have the higher accuracy and the other; without any there is nothing to measure.
        config: Of the run.
        expected: By its author.
        group: Of the claim.
        split: On which arms are compared; the first of the run if empty.
    """
    split = split or config.splits[0]

    def mean_difference(table: pd.DataFrame) -> pd.DataFrame:
        return by_seed(pd.concat([difference(table, *pair) for pair in pairs]))

    return claim(
        id_, f"{PAPER}, {number}", Inequality(ACCURACY, "greater", 0.0, centre="mean"),
        statement,
        "Difference of test accuracies at the lowest validation loss, in percentage points, seed by seed, "
        f"{' and '.join(f'{first} minus {second}' for first, second in pairs)}{', averaged' if len(pairs) > 1 else ''}; "
        f"{config.place(split)}.",
        expected,
        group=group, at=runs([*dict.fromkeys(arm for pair in pairs for arm in pair)], split), estimate=mean_difference,
    )  # fmt: skip
