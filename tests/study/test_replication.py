"""One analysis on several problems: which verdicts travel, and the effect over all problems."""

import dataclasses
import math

import numpy as np
import pytest
import reported
from scipy.stats import t
from statsmodels.stats.meta_analysis import combine_effects
from travelling import SEVERAL, TRAVELLING

from curvlab.study import main
from curvlab.study.command import main as curvlab
from curvlab.study.overviews.commands import run_on
from curvlab.study.overviews.replication import Pooled, pooled, random_effects
from curvlab.study.overviews.standing import Judged, Standing, finished, standings
from curvlab.study.report.page import anchor
from curvlab.tools.errors import DataUnavailable

OPTIONS = ["--seeds", "8", "--scale", "0.3", "--quiet", "--workers", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    results = tmp_path_factory.mktemp("several")
    assert run_on(TRAVELLING, SEVERAL, [*OPTIONS, "--results", str(results)]) == 0
    return results / TRAVELLING.name


@pytest.fixture(scope="module")
def found(home):
    runs, _ = finished(home.parent)
    return {one.claim: one for one in standings(runs)}


def changed(standing, problem, **parts):
    """A standing with another finding on one problem."""
    before = standing.judged[problem]
    findings = [*before.run.findings]
    findings[before.place] = dataclasses.replace(before.finding, **parts)
    after = Judged(dataclasses.replace(before.run, findings=findings), before.place)
    return Standing({**standing.judged, problem: after})


def paule_and_mandel(effects, variances):
    """τ², as metafor defines it, on a fine grid: the smallest at which Q is not above its expectation."""
    grid = np.linspace(0, np.var(effects) * 3, 200_001)
    weights = 1 / (np.asarray(variances)[:, None] + grid)
    means = (weights * np.asarray(effects)[:, None]).sum(axis=0) / weights.sum(axis=0)
    q = (weights * (np.asarray(effects)[:, None] - means) ** 2).sum(axis=0)
    return grid[np.argmax(q <= len(effects) - 1)]


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e7])
def test_random_effects_are_those_of_an_independent_computation_in_any_unit(spread, unit):
    draws = np.random.default_rng(3)
    variances = draws.uniform(0.05, 0.4, 7)
    effects = 1 + draws.normal(size=7) * np.sqrt(variances + spread**2)
    between = paule_and_mandel(effects, variances)
    weights = 1 / (variances + between)
    expected = (weights * effects).sum() / weights.sum()
    hartung_knapp = (weights * (effects - expected) ** 2).sum() / 6 / weights.sum()
    mean, error, heterogeneity = random_effects(effects * unit, variances * unit**2)
    assert mean / unit == pytest.approx(expected, rel=1e-4)
    assert (error / unit) ** 2 == pytest.approx(max(hartung_knapp, 1 / weights.sum()), rel=1e-4)
    reference = combine_effects(effects, variances, method_re="iterated", use_t=True, atol=1e-12)
    assert mean / unit == pytest.approx(reference.mean_effect_re, rel=1e-5)
    assert heterogeneity == pytest.approx(max(0.0, reference.i2), abs=1e-9)
    if spread > 1:
        assert error / unit == pytest.approx(reference.sd_eff_w_re_hksj, rel=1e-5)


def test_problems_that_agree_by_chance_do_not_make_the_error_vanish():
    mean, error, heterogeneity = random_effects(np.full(5, 2.0), np.full(5, 0.05))
    assert (mean, heterogeneity) == (2.0, 0.0)
    assert error == pytest.approx(math.sqrt(0.05 / 5))


def test_intervals_cover_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0)
    hits = 0
    for _ in range(1500):
        variances = draws.uniform(0.05, 0.4, 5)
        mean, error, _ = random_effects(draws.normal(size=5) * np.sqrt(variances + 0.5), variances)
        hits += abs(mean) <= -t.ppf(0.025, 4) * error
    assert 0.93 < hits / 1500 < 0.985


def test_the_pooled_effect_is_that_of_the_values_over_seeds(found):
    effect = pooled(found["D-2"])
    values = [np.array(one.finding.values) for one in found["D-2"].judged.values()]
    mean, error, _ = random_effects(
        np.array([one.mean() for one in values]), np.array([one.var(ddof=1) / 8 for one in values])
    )
    half = t.ppf(0.975, 4) * error
    assert [effect.estimate, effect.low, effect.high] == pytest.approx([mean, mean - half, mean + half])
    assert effect.problems == 5
    assert effect.heterogeneity > 0.9


def test_the_pooled_effect_of_ratios_is_geometric(found):
    standing = found["D-2"]
    for problem in standing.judged:
        values = tuple(map(math.exp, standing.judged[problem].finding.values))
        standing = changed(standing, problem, scale="log", values=values)
    linear, ratio = pooled(found["D-2"]), pooled(standing)
    assert [ratio.estimate, ratio.low, ratio.high] == pytest.approx(
        [math.exp(x) for x in (linear.estimate, linear.low, linear.high)]
    )


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"outcome": "not measured"}, "measured on 4 problems"),
        ({"outcome": "outside the assumptions"}, "measured on 4 problems"),
        ({"scale": "rank"}, "only means"),
        ({"scale": ""}, "only means"),
        ({"sort": "Spread"}, "only means"),
        ({"rule": "mean > 3"}, "the claim is another on plus-0.3"),
        ({"values": (1.0,) * 8}, "do not vary"),
    ],
)
def test_what_has_no_mean_with_an_error_is_not_pooled_and_the_reason_is_told(found, parts, reason):
    assert isinstance(pooled(found["D-1"]), Pooled)
    assert reason in pooled(changed(found["D-1"], "plus-0.3", **parts))


def test_a_spread_is_not_pooled_by_the_levels_of_its_arms(tmp_path):
    undrawn = dataclasses.replace(reported.ANALYSIS, figures={})
    for problem in "abcde":
        main(undrawn, ["--problem", problem, "--seeds", "6", "--quiet", "--workers", "1", "--results", str(tmp_path)])
    spread = next(one for one in standings(finished(tmp_path)[0]) if one.claim == "spread")
    assert [len(one.finding.values) for one in spread.judged.values()] == [18] * 5
    assert pooled(spread).startswith("not pooled: only means")


def test_verdicts_that_do_not_travel_say_so(found):
    assert {claim: one.state for claim, one in found.items()} == {
        "D-1": "contradicted", "D-2": "contradicted", "D-3": "contradicted", "D-4": "replicated", "D-5": "replicated",
    }  # fmt: skip
    assert found["D-2"].travels == (
        "does not travel: supported on plus-0, plus-0.1, plus-0.2 and plus-0.3, but refuted on plus--2"
    )
    assert found["D-5"].travels == "refuted on 5 of 5 problems"


def test_one_verdict_is_open_and_an_undecided_one_contradicts_nothing(found):
    one = Standing({"plus-0": found["D-2"].judged["plus-0"]})
    assert (one.state, one.travels) == ("open", "supported on 1 of 1 problem")
    none = changed(one, "plus-0", outcome="inconclusive")
    assert (none.state, none.travels) == ("open", "decided on none of 1 problem")
    both = Standing({"a": none.first, "b": one.first})
    assert (both.state, both.travels) == ("open", "supported on 1 of 2 problems")


def test_the_page_and_the_markdown_show_problems_side_by_side_and_first_what_does_not_travel(home, found):
    page, text = (home / "replication.html").read_text(), (home / "replication.md").read_text()
    assert page.index("Does not travel") < page.index('id="group-1"')
    assert text.index("## Does not travel") < text.index("## Claims of the paper")
    assert f"| claim | statement | {' | '.join(SEVERAL)} | over problems | pooled |" in text
    assert "**refuted** " in text
    assert f"{pooled(found['D-1']).estimate:.4g} [" in text
    assert page.count('class="strip"') == 5 * 5 + 4
    for problem, judged in found["D-1"].judged.items():
        address = f"{judged.run.results.folder.name}/report.html#{anchor(judged.place)}"
        assert f'href="{address}"' in page, problem


def test_drawings_of_a_claim_have_one_axis(home):
    page = (home / "replication.html").read_text()
    card = page.partition('id="claim-1"')[2].partition("</article>")[0]
    regions = [part.partition("/>")[0] for part in card.split('class="region"')[1:]]
    assert len(regions) == 6
    assert len(set(regions)) == 1


@pytest.mark.parametrize(("option", "message"), [
    (["--problem", "a"], "--problem and --problems exclude each other"),
    (["--redraw", "x"], "are for one problem"),
    (["--list-claims"], "are for one problem"),
])  # fmt: skip
def test_options_of_one_run_are_refused(option, message):
    with pytest.raises(Exception, match=message):
        run_on(TRAVELLING, ["plus-0", "plus-1"], option)


@pytest.mark.parametrize("option", [["--dry-run"], ["--shard", "1/2"]])
def test_runs_without_results_leave_no_page(option, tmp_path, capsys):
    assert run_on(TRAVELLING, ["plus-0", "plus-1"], [*OPTIONS, *option, "--results", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("**/replication.html"))


def test_a_wrong_option_is_told_before_anything_runs(tmp_path, capsys):
    command = ["run", "travelling:TRAVELLING", "--problems", "plus-0", "plus-1", "--results", str(tmp_path)]
    assert curvlab([*command, "--sedes", "3"]) == 2
    assert curvlab([*command, "--help"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_contradicted_expectation_ends_no_replication_but_is_in_its_exit_code(tmp_path):
    arguments = [*OPTIONS, "--strict", "--results", str(tmp_path)]
    assert run_on(TRAVELLING, ["plus--2", "plus-0"], arguments) == 1
    assert "plus-0" in (tmp_path / TRAVELLING.name / "replication.md").read_text()


def test_a_problem_without_data_is_told_before_anything_runs(tmp_path):
    with pytest.raises(DataUnavailable, match="the data set 'absent' is not in the data folder"):
        run_on(TRAVELLING, ["plus-0", "absent", "plus-1"], [*OPTIONS, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_short_of_memory_ends_it(tmp_path, capsys):
    arguments = [*OPTIONS, "--first-seed", "0", "--results", str(tmp_path)]
    assert run_on(TRAVELLING, ["plus-0", "huge", "plus-1"], arguments) == 3
    assert "not enough memory" in capsys.readouterr().err
    assert [run.problem for run in finished(tmp_path)[0]] == ["plus-0"]
