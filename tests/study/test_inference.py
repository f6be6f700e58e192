"""Student's t and Holm against SciPy and statsmodels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from curvlab.study.inference import Summary, holm

samples = st.lists(st.floats(-10, 10), min_size=2, max_size=20).map(np.array).filter(lambda x: x.std() > 1e-3)


@given(samples, st.floats(-10, 10))
def test_one_sided_p_values_are_scipys(values, bound):
    summary = Summary.of(values)
    less = stats.ttest_1samp(values, bound, alternative="less").pvalue
    greater = stats.ttest_1samp(values, bound, alternative="greater").pvalue
    assert summary.below(bound) == pytest.approx(less, rel=1e-9, abs=1e-300)
    assert summary.above(bound) == pytest.approx(greater, rel=1e-9, abs=1e-300)


@given(samples, st.floats(0.5, 0.999))
def test_interval_is_statsmodels(values, confidence):
    expected = DescrStatsW(values).tconfint_mean(alpha=1 - confidence)
    assert Summary.of(values).interval(confidence) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_without_variance_the_sign_test_decides():
    summary = Summary.of(np.full(6, 0.1))
    assert summary.mean == 0.1
    assert summary.below(0.2) == 2.0**-6
    assert summary.above(0.2) == 1.0
    assert summary.below(0.1) == 1.0
    assert summary.above(0.1) == 1.0
    assert summary.interval(0.95) == (0.1, 0.1)


def test_a_single_value_has_no_interval():
    summary = Summary.of(np.array([2.0]))
    assert summary.mean == 2.0
    assert np.isnan(summary.interval(0.95)).all()


def textbook_holm(p_values, level):
    """Which hypotheses Holm's procedure rejects, written out."""
    rejected = [False] * len(p_values)
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) - step):
            break
        rejected[index] = True
    return rejected


@given(st.lists(st.sampled_from([0.0, 1e-4, 0.004, 0.006, 0.012, 0.02, 0.03, 0.2, 1.0]), max_size=9))
def test_holm_rejects_what_the_textbook_rejects_at_the_level_it_reports(p_values):
    result = holm(p_values, 0.05)
    assert list(result.rejected) == textbook_holm(p_values, 0.05)
    assert list(result.rejected) == [p <= level for p, level in zip(p_values, result.level, strict=True)]


def test_holm_adjusts_as_statsmodels_does():
    for p_values in ([0.04], [0.02, 0.02, 0.001, 0.9], list(np.linspace(1e-4, 0.2, 20))):
        rejected, adjusted, *_ = multipletests(p_values, alpha=0.05, method="holm")
        result = holm(p_values, 0.05)
        np.testing.assert_allclose(result.adjusted, adjusted, rtol=1e-12)
        np.testing.assert_array_equal(result.rejected, rejected)
