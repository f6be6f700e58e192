"""What the rules make of values: p-values in both directions, observations that settle a claim, and what they refuse."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from curvlab.study import Always, Equivalence, Identity, Inequality, Share, Spread, Wins
from curvlab.study.statistics.rules import Unfit

INF = math.inf

samples = st.lists(st.floats(-10, 10), min_size=3, max_size=20, unique=True).map(np.array)
samples = samples.filter(lambda values: np.diff(np.sort(values)).min() > 1e-3)
ways = st.sampled_from(["less", "greater"])


def by_seed(values):
    return pd.DataFrame({"seed": np.arange(len(values)), "value": np.asarray(values, dtype=float)})


def p_values(rule, values):
    """p-values of support and of refutation."""
    return rule.p_values(rule.evidence(by_seed(values)))


@given(samples, st.floats(-5, 5))
def test_what_supports_less_refutes_greater(values, bound):
    less, greater = (Inequality("q", way, bound, centre="mean") for way in ("less", "greater"))
    assert p_values(less, values) == p_values(greater, values)[::-1]
    assert p_values(Wins("q", "less"), values) == p_values(Wins("q", "greater"), values)[::-1]


@given(samples, st.floats(0.1, 5))
def test_an_equivalence_is_tost_and_twice_the_smaller_p_value_beyond_its_ends(values, margin):
    reference = DescrStatsW(values)
    support, refutation = p_values(Equivalence("q", 0.5, margin, centre="mean"), values)
    if (kind := len(values) < 8) or stats.skewtest(values).pvalue > 0.01:
        assert support == pytest.approx(reference.ttost_mean(0.5 - margin, 0.5 + margin)[0]), kind
        beyond = [
            stats.ttest_1samp(values, end, alternative=way).pvalue
            for end, way in ((0.5 - margin, "less"), (0.5 + margin, "greater"))
        ]
        assert refutation == pytest.approx(min(1.0, 2 * min(beyond)))


@given(samples.map(np.exp), ways, st.floats(0.01, 100), st.sampled_from([1e-9, 1e3]))
def test_on_a_log_scale_no_unit_matters(values, way, bound, unit):
    rules = (Inequality("q", way, u * bound, centre="geometric mean") for u in (1.0, unit))
    here, there = (p_values(rule, u * values) for rule, u in zip(rules, (1.0, unit), strict=True))
    assert here == pytest.approx(there, rel=1e-6, abs=1e-12)


@given(samples, ways, st.sampled_from([np.exp, np.arctan, lambda x: x**3, lambda x: 1e-6 * x]))
def test_for_a_median_no_increasing_function_matters(values, way, function):
    here, there = (
        p_values(Inequality("q", way, float(scale[0]), centre="median"), scale) for scale in (values, function(values))
    )
    assert here == there
    assert p_values(Wins("q", way), values) == p_values(Wins("q", way), np.sign(values))


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=2, max_size=20), ways)
def test_wins_are_counted_by_seed_and_a_tie_speaks_for_neither_side(differences, way):
    rule, values = Wins("q", way), np.array(differences)
    won, lost = (int((values < 0).sum()), int((values > 0).sum()))[:: 1 if way == "less" else -1]
    support, refutation = p_values(rule, values)
    assert support == pytest.approx(stats.binomtest(won, len(values), 0.5, "greater").pvalue)
    assert refutation == pytest.approx(stats.binomtest(lost, len(values), 0.5, "greater").pvalue)
    ties = len(values) - won - lost
    assert rule.evidence(by_seed(values)).note == f"{won} wins, {lost} losses, {ties} ties"


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=20), ways, st.floats(0.05, 0.95))
def test_a_share_is_tested_by_the_binomial_test_even_where_all_seeds_agree(values, way, bound):
    opposite = {"less": "greater", "greater": "less"}[way]
    reference = [stats.binomtest(int(sum(values)), len(values), bound, one).pvalue for one in (way, opposite)]
    assert p_values(Share("q", way, bound), values) == pytest.approx(reference)


def test_a_share_is_of_yes_and_no():
    with pytest.raises(Unfit, match="0 or 1 at each seed, got 0.5"):
        p_values(Share("q", "less", 0.5), [0.0, 0.5, 1.0])


def table_of(arms):
    rows = [(seed, f"arm{k}", value) for seed, row in enumerate(arms) for k, value in enumerate(row)]
    return pd.DataFrame(rows, columns=["seed", "arm", "value"])


def test_a_spread_over_arms_does_not_depend_on_their_order_or_a_shift_of_a_seed():
    arms = np.random.default_rng(1).normal(size=(12, 3)) + np.array([0.0, 1.0, 2.0])
    rule, shifted = Spread("q", "arm", margin=0.5), arms[:, [2, 0, 1]] + np.arange(12.0)[:, None]
    evidence = rule.evidence(table_of(arms))
    assert evidence.estimate == pytest.approx(np.ptp(arms.mean(axis=0)))
    assert rule.p_values(evidence) == pytest.approx(
        rule.p_values(rule.evidence(table_of(shifted).sample(frac=1, random_state=0)))
    )


def test_nothing_refutes_that_arms_lie_apart_at_all():
    assert Spread("q", "arm").p_values(Spread("q", "arm").evidence(table_of(np.ones((12, 3))))) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of(np.zeros((4, 1))), "two values of arm at least"),
        (table_of(np.zeros((4, 3))).iloc[:-1], "every arm at every seed"),
    ],
)
def test_a_spread_needs_every_arm_at_every_seed(table, message):
    with pytest.raises(Unfit, match=message):
        Spread("q", "arm").evidence(table)


def observations(values, seeds, **columns):
    return pd.DataFrame({"seed": seeds, "value": np.asarray(values, dtype=float)} | columns)


@pytest.mark.parametrize(("direction", "sign"), [("less", 1.0), ("greater", -1.0)])
def test_always_is_refuted_by_one_observation_and_counts_seeds(direction, sign):
    values, seeds = sign * np.array([0.0, 1.0, -5.0, 0.5, 1.0, 0.0]), [0, 0, 1, 1, 2, 2]
    rule = Always("q", direction, sign * 1.0)
    fine = rule.settle(observations(values, seeds))
    assert (fine.holds, fine.estimate) == (True, sign * 1.0), "the bound itself is no violation"
    assert fine.note.startswith("0 violations in 6 observations, at 0 of 3 seeds: at most 63 % of all seeds")
    broken = rule.settle(observations(values + sign * np.array([0, 0, 0, 0.6, 0.1, 0.0]), seeds))
    assert (broken.holds, broken.estimate) == (False, sign * 1.1)
    assert broken.note.startswith("2 violations in 6 observations, at 2 of 3 seeds")


def test_what_never_failed_at_twelve_seeds_may_fail_at_a_fifth():
    note = Always("q", "less", 1.0).settle(observations(np.zeros(12), range(12))).note
    assert f"at most {100 * (1 - 0.05 ** (1 / 12)):.2g} % of all seeds, at 95 % confidence" in note


def test_an_identity_is_measured_against_the_tolerance_of_each_observation():
    settled = Identity("q").settle(observations([1e-13, -2e-12, 0.0], [0, 1, 2], tolerance=[1e-12, 1e-11, 0.0]))
    assert (settled.holds, settled.estimate) == (True, 2e-12)
    broken = Identity("q").settle(observations([1e-13, 1e-300], [0, 1], tolerance=[1e-12, 0.0]))
    assert (broken.holds, broken.estimate) == (False, 1e-300)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Equivalence("q", 1.0, 0.0, centre="mean"), "margin > 0"),
        (lambda: Equivalence("q", math.nan, 1.0, centre="mean"), "finite target"),
        (lambda: Equivalence("q", 1.0, 1.0, centre="geometric mean"), "reaches to 0 or below"),
        (lambda: Inequality("q", "less", math.inf, centre="mean"), "a bound is finite"),
        (lambda: Inequality("q", "below", 1.0, centre="mean"), "'less' or 'greater', got 'below'"),
        (lambda: Inequality("q", "less", 0.0, centre="geometric mean"), "a geometric mean is positive"),
        (lambda: Inequality("q", "less", 1.0, centre="mode"), "Unknown centre 'mode'"),
        (lambda: Always("q", "less", math.nan), "a bound is finite"),
        (lambda: Share("q", "less", 1.0), "between 0 and 1"),
        (lambda: Wins("q", "more"), "'less' or 'greater'"),
        (lambda: Spread("q", "arm", margin=-1.0), "at least 0"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_rules_that_cannot_be_decided_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_location_declares_its_centre():
    with pytest.raises(TypeError, match="centre"):
        Inequality("q", "less", 1.0)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Inequality("q", "less", 0.1, centre="geometric mean"), "geometric mean < 0.1"),
        (Equivalence("q", 1.0, 0.1, centre="median"), "median = 1 ± 0.1"),
        (Always("q", "greater", -1.0), "value ≥ -1 at every observation"),
        (Share("q", "greater", 0.5), "share of seeds > 0.5"),
        (Wins("q", "less"), "difference < 0 at more than half of all seeds, paired by seed"),
        (Spread("q", "gamma", 1.0), "largest minus smallest mean over gamma > 1"),
    ],
)
def test_rules_in_words(rule, words):
    assert str(rule) == words


@pytest.mark.parametrize(("rule", "region", "logarithmic"), [
    (Identity("a"), (0.0, 1.0), True),
    (Always("a", "greater", 2.0), (2.0, INF), False),
    (Inequality("a", "less", 2.0, centre="geometric mean"), (-INF, 2.0), True),
    (Inequality("a", "greater", 2.0, centre="mean"), (2.0, INF), False),
    (Equivalence("a", 2.0, 0.5, centre="median"), (1.5, 2.5), False),
    (Share("a", "less", 0.5), (-INF, 0.5), False),
    (Wins("a", "less"), (-INF, 0.0), False),
    (Spread("a", "arm", 0.1), (0.1, INF), False),
], ids=str)  # fmt: skip
def test_rules_say_where_their_estimand_lies_if_the_claim_holds(rule, region, logarithmic):
    assert rule.region == pytest.approx(region)
    assert rule.logarithmic is logarithmic
    assert rule.estimand


def test_what_every_observation_has_to_satisfy_tells_the_worst_of_each_seed():
    table = pd.DataFrame({"seed": [3, 1, 3, 1], "value": [0.5, -0.2, 0.9, 0.1], "tolerance": [1.0, 0.4, 3.0, 0.5]})
    table["tolerance"] /= 1000

    def worst(rule):
        settled = rule.settle(table)
        return settled.values  # noqa: PD011

    assert worst(Identity("a")) == pytest.approx((500.0, 500.0))
    assert worst(Always("a", "less", 0.6)) == (0.1, 0.9)
    assert worst(Always("a", "greater", 0.6)) == (-0.2, 0.5)
