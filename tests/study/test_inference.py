"""Means and t-intervals of figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from statsmodels.stats.weightstats import DescrStatsW

from curvlab.study.inference import Summary

samples = st.lists(st.floats(-10, 10), min_size=2, max_size=20).map(np.array).filter(lambda x: x.std() > 1e-3)


@given(samples, st.floats(0.5, 0.999))
def test_interval_is_statsmodels(values, confidence):
    expected = DescrStatsW(values).tconfint_mean(alpha=1 - confidence)
    assert Summary.of(values).interval(confidence) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(samples, st.integers(1, 12))
def test_a_prediction_interval_has_the_error_of_both_means(values, further):
    n = len(values)
    expected = t.ppf(0.975, n - 1) * values.std(ddof=1) * np.sqrt(1 / n + 1 / further)
    assert Summary.of(values).prediction(0.95, further) == pytest.approx(expected, rel=1e-9)


def test_without_variance_the_interval_is_a_point():
    assert Summary.of(np.full(6, 0.1)).interval(0.95) == (0.1, 0.1)


def test_a_single_value_has_no_interval():
    summary = Summary.of(np.array([2.0]))
    assert summary.mean == 2.0
    assert np.isnan([*summary.interval(0.95), summary.prediction(0.95)]).all()
