"""Every sort of evidence against an independent reference, and its intervals against its own tests."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from curvlab.study.statistics.evidence import (
    PERMUTATIONS,
    ArmsTest,
    BinomialTest,
    Cautious,
    LogStudentT,
    SignTest,
    StudentT,
    _skewed,
    located,
    upper_rate,
)

samples = st.lists(st.floats(-10, 10), min_size=2, max_size=20).map(np.array).filter(lambda x: x.std() > 1e-3)
small = st.lists(st.integers(-3, 3), min_size=2, max_size=20).map(lambda x: np.array(x, dtype=float))
"""Values with ties, among themselves and with bounds."""
confidences = st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.998])


@given(samples, st.floats(-10, 10), confidences)
def test_the_mean_is_scipys_and_statsmodels(values, bound, confidence):
    evidence = StudentT(values)
    less, greater = (stats.ttest_1samp(values, bound, alternative=way).pvalue for way in ("less", "greater"))
    assert evidence.below(bound) == pytest.approx(less, rel=1e-9, abs=1e-300)
    assert evidence.above(bound) == pytest.approx(greater, rel=1e-9, abs=1e-300)
    assert evidence.interval(confidence) == pytest.approx(DescrStatsW(values).tconfint_mean(alpha=1 - confidence))


@given(samples, st.floats(-5, 5), st.sampled_from([1e-6, 0.1, 1e9]))
def test_the_geometric_mean_is_the_mean_of_logarithms_in_whatever_unit(logarithms, bound, unit):
    evidence, plain = LogStudentT(unit * np.exp(logarithms)), StudentT(logarithms)
    assert evidence.estimate == pytest.approx(unit * stats.gmean(np.exp(logarithms)))
    for way in ("below", "above"):
        assert getattr(evidence, way)(unit * math.exp(bound)) == pytest.approx(getattr(plain, way)(bound), abs=1e-9)
    assert evidence.interval(0.95) == pytest.approx([unit * math.exp(end) for end in plain.interval(0.95)], rel=1e-9)


@given(small, st.integers(-3, 3).map(float))
def test_the_median_is_tested_by_the_signs_and_a_seed_on_the_bound_is_on_neither_side(values, bound):
    evidence = SignTest(values)
    for found, count in ((evidence.below(bound), values < bound), (evidence.above(bound), values > bound)):
        assert found == pytest.approx(stats.binomtest(int(count.sum()), len(values), 0.5, "greater").pvalue)


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=20, unique=True).map(np.array))
def test_the_interval_of_the_median_is_that_of_order_statistics(values):
    reference = stats.quantile_test(values, q=0.0, p=0.5, alternative="two-sided").confidence_interval(0.95)
    assert SignTest(values).interval(0.95) == (reference.low, reference.high)


def test_few_seeds_say_nothing_of_the_median():
    assert SignTest(np.arange(5.0)).interval(0.95) == (-np.inf, np.inf)


@given(st.integers(1, 30), st.data(), st.floats(0.01, 0.99), confidences)
def test_the_share_is_scipys(seeds, data, bound, confidence):
    successes = data.draw(st.integers(0, seeds))
    evidence = BinomialTest(successes, seeds)
    less, greater = (stats.binomtest(successes, seeds, bound, way) for way in ("less", "greater"))
    assert (evidence.below(bound), evidence.above(bound)) == pytest.approx((less.pvalue, greater.pvalue))
    reference = stats.binomtest(successes, seeds).proportion_ci(confidence, method="exact")
    assert evidence.interval(confidence) == pytest.approx((reference.low, reference.high))


@given(st.integers(1, 40), st.data())
def test_the_upper_bound_of_a_rate_is_one_sided(seeds, data):
    events = data.draw(st.integers(0, seeds))
    reference = stats.binomtest(events, seeds, alternative="less").proportion_ci(0.95, method="exact")
    assert upper_rate(events, seeds) == pytest.approx(reference.high)


arms = st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=4, max_size=12).map(np.array)
evidences = st.one_of(
    samples.map(StudentT),
    samples.map(np.exp).map(LogStudentT),
    small.map(SignTest),
    samples.map(lambda values: Cautious(SignTest(values), StudentT(values))),
    st.tuples(st.integers(0, 12), st.just(12)).map(lambda pair: BinomialTest(*pair)),
    arms.map(ArmsTest),
)


@given(evidences, st.floats(0.01, 8), confidences)
def test_an_interval_excludes_exactly_what_the_tests_reject(evidence, bound, confidence):
    if isinstance(evidence, SignTest):
        bound = float(round(bound) - 4)  # on values, too
    elif isinstance(evidence, BinomialTest):
        bound /= 8.1
    low, high = evidence.interval(confidence)
    assume(isinstance(evidence, SignTest) or not any(math.isclose(bound, end, rel_tol=1e-9) for end in (low, high)))
    tail = (1 - confidence) / 2
    assert (evidence.above(bound) <= tail) == (bound < low)
    assert (evidence.below(bound) <= tail) == (bound > high)


@pytest.mark.parametrize("seeds", [8, 12, 24])
def test_the_detectable_mean_is_statsmodels(seeds):
    values = np.random.default_rng(seeds).normal(size=seeds)
    for level in (0.05, 0.05 / 54, 1e-8):
        effect = TTestPower().solve_power(nobs=seeds, alpha=level, power=0.8, alternative="larger")
        assert StudentT(values).shift(level) == pytest.approx(effect * values.std(ddof=1), rel=1e-3)


@pytest.mark.parametrize(("bound", "less"), [(0.5, False), (0.8, False), (0.8, True), (0.1, True)])
def test_the_detectable_share_is_found_four_times_of_five(bound, less):
    words = BinomialTest(30, 40, bound, less).detectable(0.05)
    share = float(words.split()[0]) / 100
    assert words.endswith(f"% of all seeds, against {100 * bound:g} %")
    way = "less" if less else "greater"
    found = [k for k in range(41) if stats.binomtest(k, 40, bound, alternative=way).pvalue <= 0.05]
    assert stats.binom.pmf(found, 40, share).sum() == pytest.approx(0.8, abs=0.01)
    assert (share < bound) == less


def test_detectable_effects_in_words():
    unit = np.array([-1.0, 1.0] * 6) * math.sqrt(11 / 12)
    assert StudentT(unit).detectable(0.05) == "a mean 0.77 beyond the bound"
    assert StudentT(unit).detectable(0.05 / 54) == "a mean 1.5 beyond the bound"
    assert LogStudentT(np.exp(unit)).detectable(0.05) == "a factor of 2.15 beyond the bound"
    share = float(SignTest(unit).detectable(0.05).split()[0]) / 100
    assert stats.binom.sf(9, 12, share) == pytest.approx(0.8, abs=0.01), "10 of 12 signs are needed"
    assert SignTest(unit[:4]).detectable(0.05) == "none: 4 seeds cannot decide it"
    assert Cautious(SignTest(unit), StudentT(unit)).detectable(0.05).startswith("a mean 0.77 beyond the bound and 8")


LOGNORMAL = np.exp(2 * stats.norm.ppf((np.arange(12) + 0.5) / 12))
EVEN = stats.norm.ppf((np.arange(12) + 0.5) / 12)


@pytest.mark.parametrize(
    ("centre", "values", "kind", "note"),
    [
        ("mean", EVEN, StudentT, ""),
        ("geometric mean", LOGNORMAL, LogStudentT, ""),
        ("median", LOGNORMAL, SignTest, ""),
        ("mean", LOGNORMAL, Cautious, "skewed: of the median"),
        ("mean", LOGNORMAL[:7], StudentT, ""),
        ("geometric mean", np.exp(LOGNORMAL / 10), Cautious, "skewed: of the median"),
        ("geometric mean", np.append(LOGNORMAL, 0.0), SignTest, "1 of 13 values have no logarithm: of the median"),
        ("mean", np.full(12, 0.1), SignTest, "all 12 seeds give this value: exact sign test"),
        ("geometric mean", np.full(12, 0.1), SignTest, "all 12 seeds give this value: exact sign test"),
        ("mean", np.array([1.0] * 11 + [0.0]), Cautious, "only two values: of the median"),
    ],
)
def test_which_evidence_a_location_has(centre, values, kind, note):
    evidence = located(centre, values)
    assert type(evidence) is kind
    assert evidence.note.startswith(note)
    assert bool(evidence.note) == bool(note)


def test_two_values_are_judged_by_their_signs_and_never_without_a_doubt():
    """Student's t finds p = 2.0e-4 for eleven of twelve, less than the sign test for twelve of twelve."""
    evidence = located("mean", np.array([1.0] * 11 + [0.0]))
    assert evidence.above(0.5) == pytest.approx(stats.binomtest(11, 12, 0.5, "greater").pvalue)
    assert evidence.below(2.0) >= 2.0**-12, "a value above 1 may yet come"


@given(st.lists(st.floats(0, 5), min_size=8, max_size=30).map(np.exp).filter(lambda x: np.ptp(x) > 1e-3))
def test_skewness_is_tested_as_scipy_does(values):
    p_value = stats.skewtest(values).pvalue
    assume(abs(p_value - 0.01) > 1e-9)
    assert _skewed(values) == (p_value < 0.01)


def test_nearly_equal_values_are_no_trouble():
    values = 40.0 * (1 + 1e-15 * np.arange(12))
    assert located("mean", values).below(41.0) < 1e-12
    assert located("mean", 1e-200 * np.arange(12.0)).below(1.0) == 2.0**-12, "a variance below the smallest number"


@pytest.mark.parametrize("shape", [(5, 2), (3, 3)])
def test_arms_are_exchanged_within_seeds(shape):
    arms = np.random.default_rng(3).normal(size=shape) + np.arange(shape[1])
    exchanged = itertools.product(*(itertools.permutations(row) for row in arms))
    spreads = np.array([np.ptp(np.mean(rows, axis=0)) for rows in exchanged])
    exact = np.mean(spreads >= np.ptp(arms.mean(axis=0)) - 1e-12)
    error = 4 * math.sqrt(exact * (1 - exact) / PERMUTATIONS)
    assert ArmsTest(arms).above(0.0) == pytest.approx(exact, abs=error)


def test_arms_against_a_margin_are_pairs():
    arms = np.random.default_rng(4).normal(size=(12, 3)) + np.array([0.0, 0.5, 2.0])
    evidence, ways = ArmsTest(arms), ("less", "greater")
    pairs = [first - second for first, second in itertools.combinations(arms.T, 2)]
    tests = [
        (stats.ttest_1samp(pair, sign, alternative=way).pvalue)
        for pair in pairs
        for sign, way in zip((-1, 1), ways, strict=True)
    ]
    assert evidence.above(1.0) == pytest.approx(6 * min(tests))
    assert evidence.estimate == pytest.approx(np.ptp(arms.mean(axis=0)))
    close = ArmsTest(arms - [0.0, 0.5, 2.0])
    inside = [
        stats.ttest_1samp(a - b, 2.5, alternative="less").pvalue for a, b in itertools.permutations(close.arms.T, 2)
    ]
    assert close.below(2.5) == pytest.approx(max(inside))


def test_arms_that_never_differ_say_what_can_be_found():
    same = np.repeat(np.random.default_rng(5).normal(size=(12, 1)), 2, axis=1)
    assert ArmsTest(same).above(0.0) == 1.0
    assert ArmsTest(same).detectable(0.05).endswith("% of all seeds beyond the bound")
    assert ArmsTest(same + np.random.default_rng(6).normal(size=(12, 2))).detectable(0.05).startswith("two arms ")
