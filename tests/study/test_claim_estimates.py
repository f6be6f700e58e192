"""Estimates reduce measurements to one value a seed."""

import pandas as pd
import pytest

from curvlab.study import among, by_seed, geometric_by_seed


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


def test_a_geometric_mean_is_that_of_each_seed():
    table = pd.DataFrame({"seed": [4, 4, 7], "value": [2.0, 8.0, 3.0]})
    found = geometric_by_seed(table)
    assert found["seed"].tolist() == [4, 7]
    assert found["value"].tolist() == pytest.approx([4, 3])
