"""Holm's correction against the textbook and statsmodels; boundaries of O'Brien and Fleming against tables and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from curvlab.study import Equivalence, Inequality
from curvlab.study.statistics.decision import decide
from curvlab.study.statistics.evidence import SignTest, StudentT
from curvlab.study.statistics.multiplicity import LOOKS, Looks, holm

SEQUENTIAL = Looks(LOOKS)


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


@pytest.mark.parametrize(("level", "constant"), [(0.025, 2.004), (0.05, 1.710), (0.005, 2.595)])
def test_the_boundaries_of_three_equal_stages_are_the_published_ones(level, constant):
    """Jennison and Turnbull, Group Sequential Methods, 2000, table 2.3: C_B(3, α) for two sides."""
    found = [stats.norm.isf(Looks((1, 2, 3)).nominal(level, look)) for look in range(3)]
    assert found == pytest.approx([constant * np.sqrt(3 / stage) for stage in (1, 2, 3)], abs=2e-3)


@pytest.mark.parametrize("level", [0.3, 0.05, 0.05 / 54])
def test_the_boundary_is_crossed_as_often_as_the_level_says(level):
    """By multivariate normal probabilities, which know nothing of how the boundary was found."""
    times = np.array(LOOKS) / LOOKS[-1]
    scores = np.array([stats.norm.isf(SEQUENTIAL.nominal(level, look)) for look in range(3)])
    together = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    stays = stats.multivariate_normal(cov=together, abseps=1e-9, releps=1e-9, maxpts=1_000_000).cdf(scores)
    assert 1 - stays == pytest.approx(level, rel=1e-3)
    assert scores * np.sqrt(times) == pytest.approx(scores[2]), "one constant for the sum of all seeds so far"


def test_a_true_null_crosses_the_boundary_in_one_run_of_twenty():
    steps = np.random.default_rng(1979).normal(size=(40_000, LOOKS[-1])).cumsum(axis=1)
    scores = np.stack([steps[:, seeds - 1] / np.sqrt(seeds) for seeds in LOOKS], axis=1)
    boundary = [stats.norm.isf(SEQUENTIAL.nominal(0.05, look)) for look in range(3)]
    assert np.mean((scores >= boundary).any(axis=1)) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 40_000))


@given(st.floats(1e-12, 0.4), st.integers(0, 2))
def test_the_repeated_p_value_is_the_level_whose_boundary_was_hit(p_value, look):
    repeated = SEQUENTIAL.repeated(p_value, look)
    assert repeated >= p_value
    if repeated > 1e-25:
        assert SEQUENTIAL.nominal(repeated, look) == pytest.approx(p_value, rel=1e-5)


def test_repeated_p_values_at_their_ends():
    assert [SEQUENTIAL.repeated(p, 0) for p in (0.0, 0.5, 1.0)] == [0.0, 1.0, 1.0]
    assert [SEQUENTIAL.repeated(p, 2) for p in (1e-300, 1e-100)] == pytest.approx([1e-300, 1e-100], rel=1e-6, abs=0)
    assert Looks((12,)).repeated(0.03, 0) == Looks((12,)).nominal(0.03, 0) == 0.03


def test_seeds_after_a_look():
    looks = Looks(LOOKS, first=1000)
    assert [looks.after(look) for look in range(3)] == [range(1012, 1048), range(1024, 1048), range(1048, 1048)]


@pytest.mark.parametrize("seeds", [(12, 24), (24, 12, 48), (12, 12, 48), ()])
def test_looks_are_one_or_three(seeds):
    with pytest.raises(ValueError, match="once or at three increasing"):
        Looks(seeds)


LESS, GREATER = (Inequality("q", way, 0.0, centre="mean") for way in ("less", "greater"))
NARROW, ON_ITS_END = Equivalence("q", 0.0, 1e-3, centre="mean"), Equivalence("q", 0.5, 0.5, centre="mean")
FAMILIES = 400
TOO_MANY = int(stats.binom.isf(1e-3, FAMILIES, 0.05))


def decisions(rules, draws, looks, kind=StudentT):
    """Whether each claim of a family is supported, for families ``[family, claim, seed]``."""
    ends = looks.seeds if looks else (draws.shape[-1],)
    families = [[[kind(values[:seeds]) for seeds in ends] for values in family] for family in draws]
    return [
        [one.supported for one in decide(list(zip(rules, family, strict=True)), 0.05, looks)] for family in families
    ]


@pytest.mark.parametrize("looks", [None, SEQUENTIAL], ids=["at once", "sequential"])
@pytest.mark.parametrize("dependence", ["independent", "one draw for all", "half shared"])
@pytest.mark.parametrize(
    ("rules", "error"),
    [([LESS, GREATER, ON_ITS_END, NARROW], False), ([LESS, GREATER, ON_ITS_END, LESS], True)],
    ids=["refuted although true", "supported although false"],
)
def test_an_error_is_in_at_most_one_family_of_twenty(rules, error, dependence, looks):
    """Claims on their bounds, or on an end of a margin, count as true and as false, whichever is harder."""
    noise = np.random.default_rng(2010879)
    draws = noise.normal(size=(FAMILIES, len(rules), 48 if looks else 12))
    if dependence == "one draw for all":
        draws = np.broadcast_to(draws[:, :1], draws.shape)
    elif dependence == "half shared":
        draws = (draws + draws[:, :1]) / np.where(np.arange(len(rules)) == 0, 2, np.sqrt(2))[:, None]
    wrong = sum(any(found is error for found in family) for family in decisions(rules, draws, looks))
    assert 1 <= wrong <= TOO_MANY, f"{wrong} of {FAMILIES} families have an error"


def test_decided_neighbours_do_not_spoil_the_level():
    """Holm tests the remaining claims at a larger level once their neighbours are refuted or supported, at any look."""
    draws = np.random.default_rng(7).normal(size=(FAMILIES, 4, 48))
    draws[:, 0] += 8.0
    draws[:, 1] -= 0.8
    found = decisions([LESS] * 4, draws, SEQUENTIAL)
    assert all(family[0] is False and family[1] is True for family in found)
    assert sum(False in family[2:] for family in found) <= TOO_MANY
    assert sum(True in family[2:] for family in found) <= TOO_MANY


def test_signs_keep_the_level_over_several_looks():
    draws = np.random.default_rng(8).normal(size=(FAMILIES, 2, 48))
    found = decisions(
        [Inequality("q", way, 0.0, centre="median") for way in ("less", "greater")], draws, SEQUENTIAL, SignTest
    )
    assert sum(True in family for family in found) <= TOO_MANY


def test_a_claim_stands_on_the_look_that_decided_it_and_is_not_examined_again():
    rising = np.append(np.random.default_rng(9).normal(-9, 1, size=12), np.full(36, 50.0))
    undecided = np.random.default_rng(10).normal(size=48)
    evidence = [[StudentT(values[:seeds]) for seeds in LOOKS] for values in (rising, undecided)]
    first, second = decide([(LESS, evidence[0]), (LESS, evidence[1])], 0.05, SEQUENTIAL)
    assert (first.supported, first.look, first.evidence.seeds) == (True, 0, 12)
    assert (second.supported, second.look, second.evidence.seeds) == (None, 2, 48)
    assert first.high < 0 < second.high


def test_a_look_without_evidence_is_passed_over():
    values = np.random.default_rng(11).normal(-9, 1, size=48)
    [late] = decide([(LESS, [None, StudentT(values[:24])])], 0.05, SEQUENTIAL)
    assert (late.supported, late.look) == (True, 1)
    assert decide([(LESS, [None])], 0.05, SEQUENTIAL) == [None]


VISIBLE = 1.75
"""An effect that a figure shows, in standard deviations between seeds: 24 of 25 seeds lie on its side."""


@pytest.mark.parametrize(
    ("rule", "truth", "supported"),
    [
        (LESS, -VISIBLE, True),
        (GREATER, -VISIBLE, False),
        (Equivalence("q", 0.0, VISIBLE, centre="mean"), 0.0, True),
        (Equivalence("q", 0.0, 1.0, centre="mean"), 1.0 + VISIBLE, False),
        (Equivalence("q", 0.0, 1.0, centre="mean"), -1.0 - VISIBLE, False),
    ],
)
def test_a_visible_effect_is_decided_among_twenty_claims(rule, truth, supported):
    """The other nineteen are on their bounds, so that Holm's correction is at its hardest."""
    draws = np.random.default_rng(12).normal(size=(60, 20, 12))
    draws[:, 0] += truth
    found = decisions([rule, *[LESS] * 19], draws, None)
    assert np.mean([family[0] is supported for family in found]) >= 0.9
