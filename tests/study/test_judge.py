"""Verdicts on synthetic measurements with known truth."""

import logging

import numpy as np
import pandas as pd
import pytest
from made_up_claims import claim, measured, one
from statsmodels.stats.weightstats import DescrStatsW

from curvlab.study import (
    Cell,
    Equivalence,
    Failure,
    Identity,
    Inequality,
    Share,
    Spread,
    Wins,
    difference_by_seed,
    judge,
    outside,
    refuted,
    supported,
    undecided,
)
from curvlab.study.claims import contradicts

SEEDS = 12
LESS, GREATER = (Inequality("q0", way, 0.0, centre="mean") for way in ("less", "greater"))


@pytest.fixture
def noise():
    """A generator of its own for every test, so that their order does not matter."""
    return np.random.default_rng(20261121)


def test_tost_is_statsmodels(noise):
    values = noise.normal(0.3, 1.0, size=SEEDS)
    p_value, *_ = DescrStatsW(values).ttost_mean(-1.2, 1.2)
    verdict = one(Equivalence("q0", 0.0, 1.2, centre="mean"), values)
    assert verdict.p_value == pytest.approx(p_value, rel=1e-9)
    assert verdict.estimate == pytest.approx(values.mean())
    assert (verdict.low, verdict.high) == pytest.approx(DescrStatsW(values).tconfint_mean(alpha=0.1))


def test_a_true_claim_is_refuted_in_at_most_one_run_of_twenty(noise):
    """From measurements to verdict; `test_multiplicity.py` has families, which are harder."""
    on_its_bound = [claim(GREATER)]
    runs = noise.normal(size=(300, SEEDS))
    refuted = sum(judge(on_its_bound, measured(values))[0].outcome == "refuted" for values in runs)
    assert 3 <= refuted <= 28, f"{refuted} of 300 true claims are refuted"


def test_interval_says_the_same_as_the_verdict(noise):
    seen = set()
    for _ in range(60):
        draws = noise.normal(noise.uniform(-2, 2, size=(4, 1)), 1.0, size=(4, SEEDS))
        rules = [LESS, GREATER, Equivalence("q0", 0.0, 1.0, centre="mean"), Equivalence("q0", 0.0, 1.0, centre="mean")]
        claims = [claim(rule, f"q{k}") for k, rule in enumerate(rules)]
        for rule, verdict in zip(rules, judge(claims, measured(*draws)), strict=True):
            if isinstance(rule, Equivalence):
                inside = verdict.low >= -1 and verdict.high <= 1
                outside = verdict.low >= 1 or verdict.high <= -1
            else:
                inside = verdict.high <= 0 if rule.direction == "less" else verdict.low >= 0
                outside = verdict.low >= 0 if rule.direction == "less" else verdict.high <= 0
            said = "supported" if inside else "refuted" if outside else "inconclusive"
            assert verdict.outcome == said
            assert (verdict.p_adjusted <= 0.05) == (said != "inconclusive")
            seen.add((type(rule), said))
    assert len(seen) == 6


def test_the_family_counts_every_claim_with_a_p_value_even_an_untestable_one(noise):
    values = noise.normal(-1.0, 1.0, size=SEEDS)
    untestable = claim(LESS, "q1", assumptions=lambda _: "not here")
    identity = claim(Identity("q0"), "q2", estimate=lambda rows: rows.assign(tolerance=1e-3))
    alone = one(LESS, values)
    first, second, third = judge([claim(LESS), untestable, identity], measured(values, values, np.zeros(SEEDS)))
    assert first.p_value == alone.p_value
    assert first.p_adjusted == pytest.approx(2 * alone.p_value)
    assert (second.outcome, second.note) == ("outside the assumptions", "not here")
    assert np.isnan(second.p_value)
    assert third.outcome == "supported"
    assert np.isnan(third.p_value)


def test_identity_is_refuted_by_one_observation():
    def estimate(rows):
        return rows.assign(tolerance=[1e-12, 1e-12, 1e-9, 0.0])

    fine = one(Identity("q0"), [1e-13, -1e-12, 5e-10, 0.0], estimate=estimate)
    assert (fine.outcome, fine.estimate, fine.seeds) == ("supported", 1e-12, 4)
    broken = one(Identity("q0"), [1e-13, -2e-12, 5e-10, 0.0], estimate=estimate)
    assert (broken.outcome, broken.estimate) == ("refuted", 2e-12)
    assert broken.note.startswith("1 of 4 observations exceed")
    exact = one(Identity("q0"), [0.0, 0.0, 0.0, 1e-300], estimate=estimate)
    assert (exact.outcome, exact.estimate) == ("refuted", 1e-300)


def test_an_ill_conditioned_observation_can_only_refute():
    def estimate(rows):
        return rows.assign(tolerance=[1e-12, 5.0, 5.0, 5.0])

    fine = one(Identity("q0"), [1e-13, 1.0, 4.0, 0.0], estimate=estimate)
    assert (fine.outcome, fine.estimate) == ("supported", 1e-13)
    assert fine.note.endswith("3 more are too ill-conditioned to count")
    assert one(Identity("q0"), [1e-13, 6.0, 0.0, 0.0], estimate=estimate).outcome == "refuted"
    assert one(Identity("q0"), [2e-12, 1.0, 1.0, 1.0], estimate=estimate).outcome == "refuted"


@pytest.mark.parametrize("tolerance", [np.inf, np.nan, -1.0, 0.5])
def test_identity_needs_a_tolerance_that_can_fail(tolerance):
    verdict = one(Identity("q0"), [0.0, 0.0], estimate=lambda rows: rows.assign(tolerance=tolerance))
    assert verdict.outcome == "inconclusive"
    assert "tolerance" in verdict.note


def test_one_seed_is_inconclusive_and_says_what_to_do():
    verdict = one(LESS, [-5.0])
    assert (verdict.outcome, verdict.estimate, verdict.seeds) == ("inconclusive", -5.0, 1)
    assert "--seeds" in verdict.note
    assert np.isnan([verdict.low, verdict.high, verdict.p_value]).all()


@pytest.mark.parametrize(
    ("seeds", "value", "outcome"),
    [(12, 40.0, "supported"), (12, 41.0, "refuted"), (2, 40.0, "inconclusive"), (12, 40.5, "inconclusive")],
)
def test_a_quantity_without_variance_is_judged_by_the_sign_test(seeds, value, outcome):
    verdict = one(Equivalence("q0", 40.0, 0.5, centre="mean"), np.full(seeds, value))
    assert verdict.outcome == outcome
    assert "sign test" in verdict.note
    assert (verdict.low, verdict.high) == ((value, value) if seeds > 2 else (-np.inf, np.inf))


def in_cells(values):
    """Measurements of one quantity with a cell per seed."""
    table = measured(np.asarray(values))
    return table.assign(cell=[Cell({"width": 8, "seed": int(seed)}).key for seed in table["seed"]], layer=3)


def test_a_value_that_is_not_finite_is_named_and_never_dropped():
    table = in_cells([-5.0, -5.1, np.nan, -5.2])
    skipping = claim(LESS, estimate=lambda rows: rows.dropna(subset="value"))
    [verdict] = judge([skipping], table)
    assert verdict.outcome == "inconclusive"
    assert verdict.note == "non-finite measurement: q0 = nan, layer 3, cell seed=2, width=8"
    bystander = claim(LESS, "q1")
    both = pd.concat([table, measured(np.zeros(1), [-5.0, -5.1, -5.2]).query("quantity == 'q1'")])
    assert judge([bystander], both.fillna({"cell": Cell({"seed": 9}).key}))[0].outcome == "supported"


def test_divergence_is_a_status_and_the_claim_says_what_it_makes_of_it():
    table = in_cells([-5.0, -5.1, np.inf, -5.2]).assign(status=["ok", "ok", "diverged", None])
    counted = claim(
        Share("q0", "less", 0.5), estimate=lambda rows: rows.assign(value=(rows["status"] == "diverged") * 1.0)
    )
    assert judge([counted], table)[0].estimate == 0.25
    plain, dropped = judge(
        [claim(LESS), claim(LESS, id="dropping", estimate=lambda rows: rows[np.isfinite(rows["value"])])], table
    )
    assert (plain.outcome, plain.note) == ("inconclusive", "its estimate is not finite at seed 2")
    assert (dropped.outcome, dropped.note) == ("inconclusive", "its estimate has no value for seed 2")


def test_only_declared_cells_and_quantities_reach_the_estimate(noise):
    seen = []

    def estimate(rows):
        seen.append(rows)
        return rows

    table = pd.concat([in_cells(noise.normal(size=4)), in_cells([0.0] * 4).assign(quantity="other")])
    judge([claim(LESS, estimate=estimate, at={"seed": (1, 3)})], table)
    assert set(seen[0]["seed"]) == {1, 3}
    assert set(seen[0]["quantity"]) == {"q0"}


def test_a_failed_cell_makes_the_claims_inconclusive_that_need_it(noise):
    table = in_cells(noise.normal(-5, 1, size=SEEDS))
    failures = [Failure(Cell({"seed": 7, "width": 4}), "RuntimeError: no"), Failure(Cell({"seed": 8, "width": 4}), "n")]
    needing = claim(LESS, id="needing")
    other = claim(LESS, id="other", at={"width": lambda width: width == 8})
    first, second = judge([needing, other], table, failures)
    assert first.outcome == "inconclusive"
    assert first.note == "no measurement in cell seed=7, width=4 (and 1 more): RuntimeError: no"
    assert second.outcome == "supported"


@pytest.mark.parametrize(
    ("estimate", "note"),
    [
        (lambda rows: rows["nothing"], "KeyError"),
        (lambda rows: rows[["value"]], "no column seed"),
        (lambda rows: pd.concat([rows, rows]), "several rows per seed"),
        (lambda rows: rows.iloc[:0], "empty"),
    ],
)
def test_an_estimate_that_cannot_be_used_costs_only_its_own_claim(estimate, note, caplog, noise):
    values = noise.normal(-5, 1, size=SEEDS)
    with caplog.at_level(logging.CRITICAL):
        broken, fine = judge([claim(LESS, estimate=estimate), claim(LESS, "q1")], measured(values, values))
    assert broken.outcome == "inconclusive"
    assert note in broken.note
    assert fine.outcome == "supported"


def test_observations_outside_the_assumptions_are_left_out_and_counted(noise):
    values = np.sort(noise.normal(-5, 1, size=SEEDS))
    table = measured(values).assign(status="ok")
    table.loc[3, "value"], table.loc[3, "status"] = np.inf, outside("short of rank")["status"]
    [verdict] = judge([claim(LESS)], table)
    assert (verdict.outcome, verdict.seeds) == ("supported", SEEDS - 1)
    assert verdict.values == pytest.approx(np.delete(values, 3))  # noqa: PD011
    assert verdict.note == "outside the assumptions and left out: 1 of 12 observations: short of rank"
    [none] = judge([claim(LESS)], table.assign(status=outside("short of rank")["status"]))
    assert (none.outcome, none.note) == ("outside the assumptions", "12 of 12 observations: short of rank")


def test_a_claim_that_no_planned_cell_serves_is_in_no_family(noise):
    table, planned = in_cells(noise.normal(-1, 1, size=SEEDS)), [Cell({"width": 8, "seed": 0})]
    elsewhere = claim(LESS, id="elsewhere", at={"width": (4, 16)})
    alone, both = judge([claim(LESS)], table), judge([claim(LESS), elsewhere], table, planned=planned)
    assert both[0] == alone[0]
    assert (both[1].outcome, both[1].note) == ("not measured", "the configuration plans no cell with width 4 or 16")


def test_nothing_measured():
    nothing = pd.DataFrame({"quantity": [], "value": [], "seed": []})
    [verdict] = judge([claim(LESS)], nothing)
    assert (verdict.outcome, verdict.note) == ("inconclusive", "nothing was measured for it")
    assert judge([], nothing) == []


@pytest.mark.parametrize(
    ("expected", "values", "contradiction"),
    [(supported, 5.0, True), (refuted, -5.0, True), (refuted, 5.0, False), (undecided, 5.0, False)],
)
def test_contradiction(expected, values, contradiction, noise):
    subject = claim(LESS, expected=expected("r"))
    [verdict] = judge([subject], measured(noise.normal(values, 1.0, size=SEEDS)))
    assert contradicts(subject, verdict) == contradiction


def test_groups_are_families_of_their_own(noise):
    values = noise.normal(-1.0, 1.0, size=SEEDS)
    alone = one(LESS, values)
    checks = [claim(LESS, f"q{k}", group="self-check") for k in range(1, 5)]
    assert judge([claim(LESS), *checks], measured(*[values] * 5))[0] == alone
    derived = [claim(LESS, "q1", group="derived"), claim(LESS, "q2", group="derived")]
    found = judge([claim(LESS), *derived], measured(*[values] * 3))
    assert [verdict.p_adjusted for verdict in found] == pytest.approx([alone.p_value] + [2 * alone.p_value] * 2)


@pytest.mark.parametrize(
    ("gate", "outcome"),
    [(-5.0, "supported"), (5.0, "outside the assumptions"), (0.0, "inconclusive")],
)
def test_a_claim_has_no_meaning_unless_the_one_that_it_is_given_holds(gate, outcome, noise):
    values = noise.normal(-5.0, 1.0, size=(3, SEEDS)) + np.array([0.0, 0.0, 5.0 + gate])[:, None]
    chain = [claim(LESS, "q0", given="q1"), claim(LESS, "q1", given="q2"), claim(LESS, "q2")]
    found = judge(chain, measured(*values))
    assert [verdict.outcome for verdict in found[:2]] == [outcome, outcome], "through the gate's own gate, too"
    if gate:
        assert found[2].outcome == ("supported" if gate < 0 else "refuted")
    if outcome != "supported":
        assert f"it has a meaning only if q1 holds, which is {outcome}" in found[0].note
    assert found[0].p_adjusted == judge([claim(LESS), *chain[1:]], measured(*values))[0].p_adjusted


def test_seeds_that_were_explored_judge_nothing(noise):
    seen, fresh = np.full(12, 50.0), noise.normal(-5.0, 1.0, size=SEEDS)
    expected = supported("it was so", explored=12)
    assert str(expected) == "supported. it was so (set after seeds 0 to 11 were seen)"
    subject, table = claim(LESS, expected=expected), measured(np.append(seen, fresh))
    [verdict] = judge([subject], table)
    assert (verdict.outcome, verdict.seeds) == ("supported", 12)
    assert verdict.values == tuple(fresh)  # noqa: PD011
    other, alone = claim(LESS, "q1"), one(LESS, fresh)
    none, bystander = judge([subject, other], measured(seen, fresh))
    assert (none.outcome, none.note) == (
        "not measured",
        "its expectation was set after seeds 0 to 11 were seen, which do not judge it: run with --first-seed 1000",
    )
    assert bystander.p_adjusted == alone.p_adjusted


def test_a_claim_whose_cells_were_left_out_is_not_measured_and_counts(noise):
    table = in_cells(noise.normal(-1.0, 1.0, size=SEEDS))
    away = Cell({"experiment": "away", "seed": 0})
    elsewhere = claim(LESS, id="elsewhere", at={"experiment": "away"})
    [alone] = judge([claim(LESS)], table)
    planned = [Cell.from_key(key) for key in table["cell"]]
    here, there = judge([claim(LESS, at={"width": 8}), elsewhere], table, planned=planned, left_out=[away])
    assert here.p_adjusted == pytest.approx(2 * alone.p_value)
    assert (there.outcome, there.note) == ("not measured", "--experiments leaves out away; it counts as undecided")


def test_a_verdict_shows_every_seed_and_the_plain_interval(noise):
    values = noise.normal(-1.0, 1.0, size=SEEDS)
    first, second = judge([claim(LESS), claim(LESS, "q1")], measured(values, values - 1))
    assert first.values == tuple(values)  # noqa: PD011
    for verdict, shift in ((first, 0.0), (second, 1.0)):
        plain = DescrStatsW(values - shift).tconfint_mean(alpha=0.05)
        assert (verdict.low_95, verdict.high_95) == pytest.approx(plain)
    assert "beyond the bound" in first.detectable


def test_a_spread_reads_every_arm_at_every_seed(noise):
    arms = noise.normal(size=(SEEDS, 3)) + np.array([0.0, 0.0, 5.0])
    table = measured(*arms.T).assign(arm=np.repeat(["a", "b", "c"], SEEDS), quantity="q0")
    subject = claim(Spread("q0", "arm", margin=2.0))
    [verdict] = judge([subject], table)
    assert (verdict.outcome, verdict.seeds, len(verdict.values)) == ("supported", SEEDS, 3 * SEEDS)
    assert judge([subject], table.iloc[:-1])[0].note == "a spread needs every arm at every seed"


def test_wins_are_paired_by_the_estimate(noise):
    rival = noise.normal(100.0, 50.0, size=SEEDS)
    table = measured(rival - 1.0, rival).assign(arm=np.repeat(["mine", "rival"], SEEDS), quantity="q0")
    paired = claim(Wins("q0", "less"), estimate=lambda rows: difference_by_seed(rows, "arm", "mine", "rival"))
    [verdict] = judge([paired], table)
    assert (verdict.outcome, verdict.p_value) == ("supported", 2.0**-SEEDS)
    assert verdict.note == "12 wins, 0 losses, 0 ties"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "two words"}, "without spaces"),
        ({"group": "papers"}, "Unknown group of claim q0 'papers'. Did you mean 'paper'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_claims_that_cannot_be_placed_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        claim(LESS, **fields)
