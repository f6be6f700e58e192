"""What changed between two runs, and whether that is more than noise."""

import dataclasses
import math
import shutil

import dummy_analysis
import numpy as np
import pytest
import reported
from dummy_analysis import ANALYSIS, UNDRAWN, changed
from scipy import stats

from curvlab.study import UsageError, main, worst_by_seed
from curvlab.study.overviews.commands import diff
from curvlab.study.overviews.difference import _paired, _unpaired, difference
from curvlab.study.overviews.standing import Run
from curvlab.study.results import latest
from curvlab.tools.storage import write_json

FULL_REPORTED = dataclasses.replace(reported.ANALYSIS, figures={})


def made(results, *arguments, analysis=UNDRAWN):
    """Run an analysis; the run that this leaves."""
    assert main(analysis, ["--quiet", "--workers", "1", "--results", str(results), *arguments]) == 0
    return Run.of(latest(results, analysis.name))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(results):
    return made(results)


@pytest.fixture(scope="module")
def others(results):
    return made(results, "--first-seed", "100")


def of(found, claim):
    return next(change for change in found.changes if change.claim == claim)


def test_other_seeds_are_within_noise(first, others):
    found = difference(first, others)
    assert found.options == {"first_seed": (0, 100)}
    assert found.environment == {}
    assert found.telling == []
    assert [change.same for change in found.changes] == [False, False, False, True, False]
    assert found.words(of(found, "D-1")).startswith("within noise (p = 0.")
    assert found.level == 0.05 / 4


def test_a_shift_is_more_than_noise_on_other_seeds_and_on_the_same(results, first):
    def shifted(cell, context):
        alpha, *others = dummy_analysis.measure(cell, context)
        return [alpha | {"value": alpha["value"] + 0.2}, *others]

    analysis = dataclasses.replace(changed(measure=shifted), version=2)
    for arguments in ([], ["--first-seed", "100"]):
        found = difference(first, made(results, *arguments, analysis=analysis))
        assert {change.claim for change in found.telling} == {"D-1", "D-2", "D-3", "D-5"}
        assert found.words(of(found, "D-1")).startswith("more than noise (p = ")


def test_another_scale_of_the_noise_changes_what_it_decides(results, first):
    found = difference(first, made(results, "--scale", "5"))
    assert found.options == {"scale": (0.1, 5.0)}
    change = of(found, "D-1")
    assert (change.before.outcome, change.after.outcome) == ("supported", "inconclusive")
    assert change.decided_otherwise
    assert change in found.telling


def test_the_same_run_again_has_the_same_values(results, first):
    found = difference(first, made(results, "--fresh"))
    assert found.telling == []
    assert all(change.same for change in found.changes)
    assert found.words(of(found, "D-2")) == "the same values"


def test_a_claim_that_is_another_says_in_what(results, first):
    def claims(config):
        one, two, three, *rest = dummy_analysis.claims(config)
        wide = dataclasses.replace(one, rule=dataclasses.replace(one.rule, margin=0.7))
        return [wide, dataclasses.replace(two, estimate=worst_by_seed), dataclasses.replace(three, id="new"), *rest]

    found = difference(first, made(results, analysis=changed(claims=claims)))
    assert found.words(of(found, "D-1")) == "another claim: rule; the same values"
    assert found.words(of(found, "D-2")) == "another claim: what is computed for it; the same values"
    assert found.words(of(found, "D-3")) == found.words(of(found, "new")) == "only in one run"
    assert [change.claim for change in found.telling] == ["D-1", "D-2", "D-3", "new"]


def test_a_change_of_the_environment_is_told_by_its_name(results, first, tmp_path):
    copy = shutil.copytree(first.results.folder, tmp_path / "copy")
    facts = first.results.environment
    packages, git = facts["packages"] | {"torch": "1.0"}, {"commit": "f" * 40, "dirty": False}
    write_json(
        copy / "environment.json", facts | {"packages": packages, "git": git, "started": "2030-01-01T00:00:00+00:00"}
    )
    found = difference(first, Run.of(copy)).environment
    assert found["packages.torch"] == (facts["packages"]["torch"], "1.0")
    assert found["git.commit"] == (facts["git"]["commit"], "f" * 40)
    assert set(found) <= {"packages.torch", "git.commit", "git.dirty"}


def test_every_rule_is_compared(tmp_path):
    arguments = [[], ["--first-seed", "50"], ["--first-seed", "50", "--fresh"]]
    runs = [made(tmp_path, *words, analysis=FULL_REPORTED) for words in arguments]
    found = difference(*runs[:2])
    compared = {change.claim for change in found.changes if not math.isnan(change.p_value)}
    assert compared == {"ratio", "level", "survives", "wide", "faster", "bounded", "spread"}
    assert found.words(of(found, "residual")) == "not compared"
    assert not any(map(found.significant, found.changes))
    values = [np.log(of(found, "ratio").before.values), np.log(of(found, "ratio").after.values)]
    assert of(found, "ratio").p_value == pytest.approx(stats.ttest_ind(*values, equal_var=False).pvalue)
    spreads = [of(found, "spread").before.by_seed, of(found, "spread").after.by_seed]
    assert of(found, "spread").p_value == pytest.approx(stats.ttest_ind(*spreads, equal_var=False).pvalue)
    again = difference(*runs[1:])
    assert all(change.same for change in again.changes if change.before.values)


VALUES = np.random.default_rng(5).normal(np.array([[3.0], [3.5]]), size=(2, 12))


def test_tests_of_different_seeds_are_the_textbook_ones():
    one, other = VALUES
    assert _unpaired("linear", one, other) == pytest.approx(stats.ttest_ind(one, other, equal_var=False).pvalue)
    assert _unpaired("log", one, other) == pytest.approx(
        stats.ttest_ind(np.log(one), np.log(other), equal_var=False).pvalue
    )
    assert _unpaired("rank", one, other) == pytest.approx(stats.mannwhitneyu(one, other).pvalue)
    shares = (one > 3).astype(float), (other > 3).astype(float)
    table = [[part.sum(), 12 - part.sum()] for part in shares]
    assert _unpaired("share", *shares) == pytest.approx(stats.fisher_exact(table).pvalue)
    assert _unpaired("linear", np.ones(12), np.full(12, 2.0)) < 1e-4
    assert _unpaired("linear", np.ones(12), np.ones(12) + 1e-13 * one) <= 1


def test_tests_of_the_same_seeds_are_of_the_changes():
    one, other = VALUES
    assert _paired("linear", one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert _paired("log", one, other) == pytest.approx(stats.ttest_rel(np.log(one), np.log(other)).pvalue)
    wins = int((other > one).sum())
    assert _paired("rank", one, other) == pytest.approx(stats.binomtest(wins, 12).pvalue)
    before, after = np.array([0.0] * 9 + [1.0] * 3), np.array([1.0] * 12)
    assert _paired("share", before, after) == pytest.approx(stats.binomtest(9, 9).pvalue)
    assert _paired("linear", one, one + 1.0) == pytest.approx(2 * 0.5**12)


def test_pairs_find_what_the_spread_of_the_seeds_hides(results, first):
    one = np.random.default_rng(0).normal(0, 10, 12)
    other = one + np.random.default_rng(1).normal(0.5, 0.1, 12)
    assert _paired("linear", one, other) < 1e-6 < 0.5 < _unpaired("linear", one, other)


@pytest.mark.parametrize("scale", ["linear", "log", "rank", "share"])
@pytest.mark.parametrize("test", [_paired, _unpaired])
def test_what_did_not_change_is_rarely_more_than_noise(scale, test):
    draws = np.random.default_rng(7)
    values = draws.lognormal(size=(800, 2, 12))
    values = (values > 1).astype(float) if scale == "share" else values + (scale == "linear") * 20
    with np.errstate(all="raise"):
        found = [1.0 if np.array_equal(*pair) else test(scale, *pair) for pair in values]
    assert np.mean(np.array(found) <= 0.05) < 0.075


def test_runs_of_different_analyses_are_not_compared(first, tmp_path):
    with pytest.raises(UsageError, match="different analyses, dummy and reported"):
        difference(first, made(tmp_path, "--seeds", "2", analysis=FULL_REPORTED))


def test_the_command_shows_what_changed(results, first, others, capsys):
    assert diff(first.results.folder, others.results.folder) == 0
    out = capsys.readouterr().out
    assert "option first_seed: 0 → 100" in out
    assert "5 claims: 0 changed, 5 did not (1 with the same values at every seed)" in out
    noisy = made(results, "--scale", "5")
    assert diff(first.results.folder, noisy.results.folder) == 0
    out = capsys.readouterr().out
    assert "option scale: 0.1 → 5.0" in out
    assert "supported" in out
    assert "inconclusive" in out
    assert ANALYSIS.name == "dummy"
