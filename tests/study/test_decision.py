"""Error rates and power of the judge's decisions on synthetic measurements with known truth."""

import numpy as np
import pytest

from curvlab.study import Equivalence, Inequality
from curvlab.study.decision import decide
from curvlab.study.inference import Summary

SEEDS = 12
FAMILIES = 1000
LESS, GREATER = Inequality("q", "less", 0.0), Inequality("q", "greater", 0.0)


@pytest.fixture
def noise():
    """A generator of its own for every test, so that their order does not matter."""
    return np.random.default_rng(2010879)


def outcomes(rules, draws):
    """Outcome of every claim in every family ``[family, claim]``; ``draws`` is ``[family, claim, seed]``."""
    return np.array(
        [[d.outcome for d in decide(rules, [Summary.of(values) for values in family], 0.05)] for family in draws]
    )


@pytest.mark.parametrize("dependence", ["independent", "one draw for all"])
def test_true_claims_are_refuted_in_at_most_one_family_of_twenty(dependence, noise):
    """The truths that are hardest to spare: on the bound, on an end of the margin, inside a very narrow margin."""
    rules = [LESS, GREATER, Equivalence("q", 0.5, 0.5), Equivalence("q", 0.0, 1e-3)]
    shape = (FAMILIES, len(rules), SEEDS)
    draws = noise.normal(size=shape)
    if dependence == "one draw for all":
        draws = np.broadcast_to(draws[:, :1], shape)
    refuted = (outcomes(rules, draws) == "refuted").any(axis=1).sum()
    assert 5 <= refuted <= 73, f"{refuted} of {FAMILIES} families of true claims have a refutation"


def test_decided_neighbours_do_not_spoil_the_level(noise):
    """Holm tests the remaining claims at a larger level once their neighbours are refuted or supported."""
    draws = noise.normal(size=(FAMILIES, 4, SEEDS))
    draws[:, 0] += 5.0
    draws[:, 1] -= 5.0
    decided = outcomes([LESS] * 4, draws)
    assert (decided[:, 0] == "refuted").all()
    assert (decided[:, 1] == "supported").all()
    assert (decided[:, 2:] == "refuted").any(axis=1).sum() <= 73
    assert (decided[:, 2:] == "supported").any(axis=1).sum() <= 73


def test_a_single_claim_keeps_its_level_inside_a_narrow_margin(noise):
    refuted = (outcomes([Equivalence("q", 0.0, 1e-6)], noise.normal(size=(FAMILIES, 1, SEEDS))) == "refuted").sum()
    assert 27 <= refuted <= 73


def test_false_claims_are_supported_in_at_most_one_family_of_twenty(noise):
    rules = [LESS, GREATER, Equivalence("q", 0.5, 0.5), Equivalence("q", -0.5, 0.5)]
    supported = (outcomes(rules, noise.normal(size=(FAMILIES, 4, SEEDS))) == "supported").any(axis=1).sum()
    assert 5 <= supported <= 73


VISIBLE = 1.75
"""An effect that a figure shows, in standard deviations between seeds: 24 of 25 seeds lie on its side."""


@pytest.mark.parametrize(
    ("rule", "truth", "outcome"),
    [
        (LESS, -VISIBLE, "supported"),
        (LESS, VISIBLE, "refuted"),
        (GREATER, VISIBLE, "supported"),
        (GREATER, -VISIBLE, "refuted"),
        (Equivalence("q", 0.0, VISIBLE), 0.0, "supported"),
        (Equivalence("q", 0.0, 1.0), 1.0 + VISIBLE, "refuted"),
        (Equivalence("q", 0.0, 1.0), -1.0 - VISIBLE, "refuted"),
    ],
)
def test_a_visible_effect_is_decided_among_twenty_claims(rule, truth, outcome, noise):
    """The other nineteen are on their bounds, so that Holm's correction is at its hardest."""
    draws = noise.normal(size=(100, 20, SEEDS))
    draws[:, 0] += truth
    power = (outcomes([rule, *[LESS] * 19], draws)[:, 0] == outcome).mean()
    assert power >= 0.9, f"power {power}"
