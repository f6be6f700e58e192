"""What an audit of the judge found wrong: per-seed numbers of runs, and what the judge makes of them now.

The judge had one rule for all numbers: Student's t of the mean, in one family of all claims that were asked for. Each
docstring says what it made of the same numbers.
"""

from dataclasses import replace

import dummy_analysis
import numpy as np
import pandas as pd
import pytest
from made_up_claims import claim, measured, one

from curvlab.study import Always, Inequality, Share, Spread, Wins, difference_by_seed, judge, refuted

OTHERS = 53
"""Claims beside the one in question, of which nothing is known: its p-value has to pass 5 %/54."""


def among_others(subject, table):
    """The verdict on a claim in a family with many that are not decided."""
    undecided = [claim(subject.rule, "absent", id=f"other-{k}") for k in range(OTHERS)]
    return judge([subject, *undecided], table)[0]


UNIT_WISE = np.array([0.61, 0.74, 0.95, 1.3, 2.2, 3.1, 4.8, 7.9, 14.0, 23.0, 51.0, 99.0])
"""How far the unit-wise structure's training residual is above the bound of 0.1, at each of twelve seeds."""


def test_twelve_of_twelve_seeds_above_the_bound_refute_on_a_log_scale():
    """It was inconclusive: the outliers, which are further above, make the standard error as large as the mean."""
    rule = Inequality("q0", "less", 0.1, centre="geometric mean")
    verdict = among_others(claim(rule), measured(UNIT_WISE))
    assert (verdict.outcome, verdict.scale) == ("refuted", "log")
    assert 0.1 < verdict.low < verdict.estimate < verdict.high


@pytest.mark.parametrize("violations", [9, 1])
def test_one_violation_refutes_what_is_claimed_of_every_step(violations):
    """It was inconclusive among 54 claims, at nine violations (p = .0046) and at one (p = .34, whatever its size)."""
    excess = np.append(np.zeros(12 - violations), np.linspace(0.01, 1.92, violations)[::-1])
    verdict = one(Always("q0", "less", 1e-6), excess)
    assert (verdict.outcome, verdict.estimate) == ("refuted", pytest.approx(max(excess)))
    assert verdict.note.startswith(f"{violations} violations in 12 observations, at {violations} of 12 seeds")


def test_what_never_happened_is_settled_and_says_how_often_it_may():
    """Twelve exact zeros were a sign test, p = 2.4e-4, which Holm's correction made inconclusive."""
    verdict = one(Always("q0", "less", 1e-6), np.zeros(12))
    assert verdict.outcome == "supported"
    assert "at most 22 % of all seeds" in verdict.note


def test_no_run_of_ten_survives():
    """It was inconclusive: 2⁻¹⁰ cannot pass Holm's correction among 76 claims."""
    survived = np.zeros(10)
    assert one(Always("q0", "greater", 0.5), survived).outcome == "refuted"
    share = claim(Share("q0", "greater", 0.5), group="derived")
    others = [claim(Share("absent", "greater", 0.5), id=f"other-{k}") for k in range(75)]
    checks = [claim(Share("absent", "greater", 0.5), id=f"check-{k}", group="derived") for k in range(9)]
    verdict = judge([share, *others, *checks], measured(survived))[0]
    assert (verdict.outcome, verdict.p_value) == ("refuted", 2.0**-10)


def test_eleven_of_twelve_ones_are_less_sure_than_twelve():
    """Student's t gave p = 2.0e-4 for eleven of twelve and the sign test 2.4e-4 for twelve of twelve."""
    eleven, twelve = (one(Share("q0", "greater", 0.5), [1.0] * k + [0.0] * (12 - k)) for k in (11, 12))
    assert eleven.p_value == pytest.approx(13 / 2**12)
    assert twelve.p_value == pytest.approx(1 / 2**12)
    assert eleven.p_value == pytest.approx(3.2e-3, abs=5e-5)


STEPS = {
    "kfac": [32, 34, 34, 36, 34, 32, 36, 34],
    "adam": [36, 52, 54, 54, 52, 54, 50, 54],
    "muon": [18, 20, 32, 58, 100, 100, 18, 56],  # two have not arrived after 100 steps
}


def raced(**lengths):
    rows = [(arm, seed, value) for arm, steps in lengths.items() for seed, value in enumerate(steps)]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"]).assign(quantity="q0")


@pytest.mark.parametrize("seeds", [8, 12])
def test_a_rival_that_is_beaten_at_every_seed_is_decided_whatever_another_does(seeds):
    """All were inconclusive: Muon was the best rival by its mean, two values of which are where a run was stopped."""
    table = raced(**{arm: (steps + steps)[:seeds] for arm, steps in STEPS.items()})
    rivals = [
        claim(Wins("q0", "less"), id=f"steps-{rival}",
              estimate=lambda rows, rival=rival: difference_by_seed(rows, "arm", "kfac", rival))
        for rival in ("adam", "muon")
    ]  # fmt: skip
    adam, muon = judge(rivals, table)
    assert (adam.outcome, adam.p_value) == ("supported", 2.0**-seeds)
    assert adam.note == f"{seeds} wins, 0 losses, 0 ties"
    assert muon.outcome == "inconclusive"


def accuracies(means, noise=4.0, seeds=12):
    """Test accuracies of arms: points of a seed that all arms share, and of their own."""
    draws = np.random.default_rng(88)
    shared = draws.normal(0.0, noise, size=(seeds, 1))
    arms = np.asarray(means) + np.sqrt(0.7) * shared + np.sqrt(0.3) * draws.normal(0.0, noise, size=(seeds, len(means)))
    return raced(**{f"γ = {k}": column for k, column in enumerate(arms.T)})


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_arms_without_an_effect_do_not_lie_apart(margin):
    """The best minus the worst of eight arms, chosen on the judged seeds, is above one point: *supported*."""
    table = accuracies([88.0] * 8)
    best_minus_worst = table.groupby("seed")["value"].agg(np.ptp).to_numpy()
    assert one(Inequality("q0", "greater", 1.0, centre="mean"), best_minus_worst).outcome == "supported"
    verdict = judge([claim(Spread("q0", "arm", margin))], table)[0]
    assert verdict.outcome != "supported"


@pytest.mark.parametrize(("margin", "outcome"), [(0.0, "supported"), (1.0, "supported"), (20.0, "refuted")])
def test_arms_that_lie_nine_points_apart_are_not_said_to_agree(margin, outcome):
    """*More than one point* was refuted, at −9.5: the arm with the best validation had the worst test accuracy."""
    verdict = judge([claim(Spread("q0", "arm", margin))], accuracies([88.0, 87.0, 78.5]))[0]
    assert verdict.outcome == outcome
    assert verdict.estimate == pytest.approx(9.5, abs=2.0)


def claims(config):
    """The dummy's claims, and explorations on the same cells of which one is nearly decided."""

    def close(k):
        return Inequality("alpha", "greater", 3.0 - 0.02 * k, centre="mean")

    at = {"structure": "block-diagonal", "offset": 0.0}
    shared = {"statement": "s", "source": "s", "measured": "m", "at": at, "expected": refuted("it was made so")}
    explored = [replace(claim(close(k), "alpha", id=f"close-{k}", group="exploration"), **shared) for k in range(8)]
    return [*dummy_analysis.claims(config), *explored]


CLOSE = replace(dummy_analysis.ANALYSIS, figures={}, experiments=(replace(dummy_analysis.NUMBERS, claims=claims),))


def verdicts(run, *arguments):
    assert run(*arguments, analysis=CLOSE) == 0
    return run.stored().verdicts.set_index("claim").drop(columns=["values"])


@pytest.mark.parametrize("seeds", ["12", "auto"])
@pytest.mark.parametrize("cache", ["empty", "full"])
def test_asking_for_some_claims_changes_none_of_their_verdicts(run, seeds, cache, tmp_path, monkeypatch):
    """A family of the claims that were asked for made three inconclusive ones decided, from the same measurements."""
    asked = ["close-4", "D-3"]
    if cache == "full":
        whole = verdicts(run, "--seeds", seeds)
        some = verdicts(run, "--seeds", seeds, "--claims", *asked)
    else:
        some = verdicts(run, "--seeds", seeds, "--claims", *asked)
        whole = verdicts(run, "--seeds", seeds)
    assert sorted(some.index) == sorted(asked)
    pd.testing.assert_frame_equal(some, whole.loc[some.index])
    assert len(set(whole["outcome"])) == 3, "something is decided, and something is not"
