"""Estimates reduce measurements to one value a seed."""

import pandas as pd

from curvlab.study import among, by_seed


def test_an_estimate_among_some_observations_sees_no_others():
    table = pd.DataFrame(
        {
            "seed": [0, 0, 0, 1],
            "change": ["skip", "skip", "depth", "skip"],
            "depth": [1, 2, 1, 1],
            "value": [1, 3, 9, 5],
        }
    )
    assert among(by_seed, change="skip")(table)["value"].tolist() == [2, 5]
    assert among(by_seed, change="skip", depth=(2, 3))(table)["value"].tolist() == [3]
    assert among(by_seed, change="label")(table).empty
