"""Experiments that read what others measured."""

from dataclasses import replace

import dummy_analysis
import pytest
from dummy_analysis import UNDRAWN, changed

from curvlab.study import Claim, Equivalence, Experiment, supported


def test_names_that_occur_twice_are_a_bug_of_the_analysis(run):
    with pytest.raises(ValueError, match="two experiments of dummy have one name: numbers"):
        replace(UNDRAWN, experiments=(dummy_analysis.NUMBERS,) * 2)

    def claims(config) -> list[Claim]:
        return [*dummy_analysis.claims(config)[:1]] * 2

    with pytest.raises(ValueError, match="dummy has claims that are called the same: D-1"):
        run("--seeds", "1", analysis=changed(claims=claims))


CHOICE = Experiment(name="choice", cells=lambda _: [{"rival": rival, "seed": 100} for rival in (1, 2, 3)],
                    measure=lambda cell, _: [{"quantity": "cost", "value": float(cell["rival"])}],
                    varies=("draws",))  # fmt: skip
"""What an experiment chooses by."""


def chosen(cell, context):
    costs = context.rows("choice", rival=(2, 3)).set_index("rival")["value"]
    return [{"quantity": "chosen", "value": float(costs.idxmin())}]


JUDGED = Experiment(
    name="judged",
    cells=lambda config: [{"arm": "best"}] if config.scale < 1 else [],
    measure=chosen,
    varies=("draws",),
    claims=lambda _: [
        Claim(id="best", statement="The cheapest is 2.", rule=Equivalence("chosen", 2.0, 0.1, centre="mean"),
              source="nowhere", measured="which is cheapest", group="paper", expected=supported("it was made so"))
    ],
    after=("choice",),
)  # fmt: skip


CHOOSING = replace(UNDRAWN, experiments=(JUDGED, CHOICE))


def test_an_experiment_reads_what_those_before_it_measured(run, capsys):
    assert run("--seeds", "8", analysis=CHOOSING) == 0
    assert [str(cell)[:17] for cell in CHOOSING.cells(dummy_analysis.Options(seeds=3))] == (
        ["experiment=choice"] * 3 + ["experiment=judged"] * 3
    )
    assert run.outcomes() == {"best": "supported"}
    capsys.readouterr()
    assert run("--seeds", "9", "--claims", "best", analysis=CHOOSING) == 0
    assert "12 cells, 11 cached, 1 to run" in capsys.readouterr().out


def test_a_shard_measures_what_it_reads_and_nobody_has_measured(run):
    assert run("--seeds", "3", "--shard", "6/6", analysis=CHOOSING) == 0
    assert len(list((run.results / ".cache" / "dummy").glob("*.json"))) == 3, "a cell of its own, and two that it reads"


def test_a_fresh_run_reads_only_what_it_measured_itself(run):
    assert run("--seeds", "2", analysis=CHOOSING) == 0
    dearer = replace(CHOICE, measure=lambda cell, _: [{"quantity": "cost", "value": -float(cell["rival"])}])
    other = replace(UNDRAWN, experiments=(JUDGED, dearer))
    assert run("--seeds", "2", analysis=other) == 0
    assert run.outcomes() == {"best": "inconclusive"}, "two seeds of one value"
    assert list(run.stored().measurements.query("quantity == 'chosen'")["value"]) == [2.0, 2.0]
    assert run("--seeds", "2", "--fresh", analysis=other) == 0
    assert list(run.stored().measurements.query("quantity == 'chosen'")["value"]) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda context: context.rows("judged"), "experiment 'judged' reads what 'judged' measured; name that in its"),
        (lambda context: context.rows("choice", rival=9), "experiment 'choice' plans no cell with rival 9"),
    ],
)
def test_what_cannot_be_read_is_named(run, read, message):
    broken = replace(JUDGED, measure=lambda _, context: read(context))
    assert run("--seeds", "2", analysis=replace(UNDRAWN, experiments=(broken, CHOICE))) == 0
    assert all(failure.reason.startswith(f"LookupError: {message}") for failure in run.stored().failures)
    assert len(run.stored().failures) == 2


def test_experiments_that_wait_for_each_other_or_for_nobody_are_refused():
    with pytest.raises(ValueError, match="experiments of dummy wait for each other: choice, judged"):
        replace(UNDRAWN, experiments=(JUDGED, replace(CHOICE, after=("judged",))))
    with pytest.raises(ValueError, match="experiment 'judged' comes after choice, unknown here"):
        replace(UNDRAWN, experiments=(JUDGED,))


def test_a_claim_without_planned_cells_is_not_measured_and_in_no_family(run, capsys):
    both = replace(UNDRAWN, experiments=(dummy_analysis.NUMBERS, JUDGED, CHOICE))
    assert run("--scale", "1.5", analysis=both) == 0
    verdicts = run.stored().verdicts.set_index("claim")
    assert verdicts.loc["best", "outcome"] == "not measured"
    assert "not measured: best: the configuration plans no cell with experiment judged" in capsys.readouterr().out
    assert "| best | the configuration plans no cell with experiment judged |" in (
        (run.stored().folder / "report.md").read_text()
    )
    assert run("--scale", "1.5") == 0
    alone = run.stored().verdicts.set_index("claim")
    assert list(alone["p_adjusted"].dropna()) == list(verdicts.loc[alone.index, "p_adjusted"].dropna())


def test_experiments_that_are_left_out_count_as_undecided(run):
    both = replace(UNDRAWN, experiments=(dummy_analysis.NUMBERS, JUDGED, CHOICE))
    assert run("--seeds", "8", analysis=both) == 0
    whole = run.stored().verdicts.set_index("claim")
    assert run("--seeds", "8", "--fresh", "--experiments", "judged", analysis=both) == 0
    assert run.measured == []
    assert run.stored().measurements["cell"].nunique() == 11, "those of the experiment that comes before it, too"
    verdicts = run.stored().verdicts.set_index("claim")
    assert verdicts.loc["D-1", "note"] == "--experiments leaves out numbers; it counts as undecided"
    assert verdicts.loc["best", "p_adjusted"] > whole.loc["best", "p_adjusted"]
    assert run("--experiments", "numbr", analysis=both) == 2
