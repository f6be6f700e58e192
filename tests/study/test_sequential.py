"""Runs that add seeds until claims are decided: what is measured, what claims stand on, and that interruptions change nothing."""

import signal
from dataclasses import replace

import dummy_analysis
import numpy as np
import pandas as pd
import pytest
from made_up_claims import claim

from curvlab.study import Always, Cell, Equivalence, Experiment, Failure, Inequality, judge, outside, supported
from curvlab.study.statistics.multiplicity import LOOKS, Looks


def measure(cell, context):
    """An effect of 8 standard deviations ("plain"), of 1 ("faint") and of 0 ("none"), and what it shares with another."""
    rows = dummy_analysis.measure(cell, context)
    return [rows[0] | {"value": cell["effect"] + np.random.default_rng([cell["seed"], 5]).normal()}, *rows[1:]]


def claims(config):
    def above(effect, **fields):
        rule = Inequality("alpha", "greater", 0.0, centre="mean")
        return replace(
            claim(rule, "alpha", at={"effect": effect}, expected=supported("it was made so")),
            id=f"above-{effect}",
            **fields,
        )

    steady = Always("alpha", "greater", -50.0)
    return [
        *(above(effect) for effect in (8.0, 1.0, 0.0)),
        above(2.0, group="exploration", given="above-0.0"),
        replace(claim(steady, "alpha"), id="steady"),
    ]


EFFECTS = Experiment(
    name="numbers",
    cells=[{"structure": "full", "offset": 0.0, "effect": effect} for effect in (8.0, 2.0, 1.0, 0.0)],
    measure=measure,
    varies=("draws",),
    claims=claims,
    seconds=0.01,
)
GROWING = replace(dummy_analysis.ANALYSIS, figures={}, experiments=(EFFECTS,))


def counted(cells):
    """How many seeds of each effect were measured."""
    effects = [float(cell.split("effect=")[1].split(",")[0]) for cell in cells]
    return {effect: effects.count(effect) for effect in sorted(set(effects), reverse=True)}


@pytest.fixture
def grown(run):
    """The verdicts of a sequential run."""
    assert run("--seeds", "auto", analysis=GROWING) == 0
    return run.stored().verdicts.set_index("claim")


def test_seeds_are_added_for_claims_that_are_not_decided_yet(run, grown):
    assert counted(run.measured) == {8.0: 12, 2.0: 12, 1.0: 24, 0.0: 48}
    assert grown["outcome"].to_dict() == {
        "above-8.0": "supported",
        "above-1.0": "supported",
        "above-0.0": "inconclusive",
        "above-2.0": "inconclusive",
        "steady": "supported",
    }
    assert grown["seeds"].to_dict() == {
        "above-8.0": 12,
        "above-1.0": 24,
        "above-0.0": 48,
        "above-2.0": 12,
        "steady": 48,
    }
    assert all(len(row["values"]) == row["seeds"] for claim, row in grown.iterrows() if claim != "steady")


def test_a_claim_that_waits_for_another_is_not_measured_further_itself(grown):
    waiting = grown.loc["above-2.0"]
    assert waiting["p_adjusted"] < 0.05
    assert "it has a meaning only if above-0.0 holds, which is inconclusive" in waiting["note"]


def test_the_same_command_measures_nothing_and_decides_the_same(run, grown):
    assert run("--seeds", "auto", analysis=GROWING) == 0
    assert run.measured == []
    pd.testing.assert_frame_equal(run.stored().verdicts.set_index("claim"), grown)


def test_a_fresh_run_measures_every_cell_once(run, grown):
    assert run("--seeds", "auto", "--fresh", analysis=GROWING) == 0
    assert counted(run.measured) == {8.0: 12, 2.0: 12, 1.0: 24, 0.0: 48}
    pd.testing.assert_frame_equal(run.stored().verdicts.set_index("claim"), grown)


@pytest.mark.parametrize("after", [30, 60, 80])
def test_an_interrupted_run_goes_on_where_it_was(run, after, capsys):
    count = iter(range(1000))

    def interrupted(cell, context):
        if next(count) == after:
            signal.raise_signal(signal.SIGINT)
        return measure(cell, context)

    assert (
        run("--seeds", "auto", analysis=replace(GROWING, experiments=(replace(EFFECTS, measure=interrupted),))) == 130
    )
    assert len(run.measured) == after
    assert "the same command goes on" in capsys.readouterr().out
    assert run("--seeds", "auto", analysis=GROWING) == 0
    assert len(run.measured) == 12 + 12 + 24 + 48 - after
    first = run.stored()
    assert run("--seeds", "auto", "--fresh", analysis=GROWING) == 0
    pd.testing.assert_frame_equal(run.stored().verdicts, first.verdicts)
    pd.testing.assert_frame_equal(run.stored().measurements, first.measurements)


def test_a_cell_that_fails_is_tried_once_and_costs_only_what_stands_on_it(run):
    """Decided at 12 seeds, a claim stands, whatever becomes of cells that others need later; a failure does not come again."""
    tried = []

    def failing(cell, context):
        tried.append(str(cell))
        if cell["seed"] == 13:
            raise RuntimeError("this cell always fails")
        return measure(cell, context)

    def sharing(config):
        everywhere = replace(claims(config)[0], id="everywhere", at={"effect": (8.0, 1.0, 0.0)})
        return [replace(everywhere, rule=Inequality("alpha", "greater", -3.0, centre="mean")), *claims(config)]

    experiment = replace(EFFECTS, measure=failing, claims=sharing)
    assert run("--seeds", "auto", analysis=replace(GROWING, experiments=(experiment,))) == 0
    verdicts = run.stored().verdicts.set_index("claim")
    assert verdicts.loc[["everywhere", "above-8.0"], "outcome"].tolist() == ["supported", "supported"]
    assert verdicts.loc["above-1.0", "note"].startswith("no measurement in cell experiment=numbers")
    assert len(tried) == len(set(tried))
    assert len(run.stored().failures) == 2


def test_dry_runs_and_shards(run, capsys):
    assert run("--seeds", "auto", "--dry-run", analysis=GROWING) == 0
    assert "cells:  192, 0 cached, 192 to run" in capsys.readouterr().out
    assert run("--seeds", "auto", "--shard", "1/2", analysis=GROWING) == 2
    assert "--shard needs a number of seeds" in " ".join(capsys.readouterr().err.split())


def test_what_is_claimed_of_every_observation_sees_the_seeds_that_others_measured(run):
    """So a run of that claim alone measures, for the same verdict, what others would."""

    def violated(config):
        return [*claims(config)[:-1], replace(claims(config)[-1], rule=Always("alpha", "less", 11.0))]

    experiment = replace(EFFECTS, claims=violated, measure=lambda cell, context: [
        row | {"value": row["value"] + 99.0 * (cell["seed"] == 40 and cell["effect"] == 0.0)} for row in measure(cell, context)
    ])  # fmt: skip
    analysis = replace(GROWING, experiments=(experiment,))
    assert run("--seeds", "auto", "--claims", "steady", analysis=analysis) == 0
    [alone] = run.stored().verdicts.to_dict("records")
    assert (alone["outcome"], alone["seeds"]) == ("refuted", 48)
    assert run("--seeds", "auto", analysis=analysis) == 0
    everything = run.stored().verdicts.set_index("claim").loc["steady"]
    assert everything[["outcome", "seeds", "estimate", "note"]].tolist() == [
        alone[name] for name in ("outcome", "seeds", "estimate", "note")
    ]


SEQUENTIAL = Looks(LOOKS, first=100)
RISING = Inequality("q0", "greater", 0.0, centre="mean")


def table_of(values, first=100, **coordinates):
    cells = [Cell({"seed": first + k, **coordinates}) for k in range(len(values))]
    rows = {"quantity": "q0", "value": values, "seed": [cell["seed"] for cell in cells], "cell": [c.key for c in cells]}
    return pd.DataFrame(rows | coordinates), cells


def test_looks_are_at_seeds_not_at_what_is_left_of_them():
    """An observation outside the assumptions does not move a seed from one look to the one before."""
    values = np.append(np.random.default_rng(2).normal(5.0, 1.0, size=12), np.full(12, -99.0))
    table, cells = table_of(values)
    table["status"] = ["ok", outside("too far")["status"], *["ok"] * 22]
    [verdict] = judge([claim(RISING)], table, planned=cells, looks=SEQUENTIAL)
    assert (verdict.outcome, verdict.seeds) == ("supported", 11)
    assert verdict.values == tuple(np.delete(values[:12], 1))  # noqa: PD011


def test_seeds_at_which_only_a_part_is_planned_are_left_out():
    noise = np.random.default_rng(3).normal(size=48)
    both = [table_of(noise[:24], width=8), table_of(noise[:12], width=4)]
    table, cells = pd.concat([table for table, _ in both]), [cell for _, part in both for cell in part]
    mean, always = claim(RISING), claim(Always("q0", "less", float(noise[:12].max())), id="always")
    failures = [Failure(cells[20], "RuntimeError: no")]
    found = judge([mean, always], table, failures, planned=cells, looks=SEQUENTIAL)
    assert found[0].seeds == 12, "a mean over both widths"
    assert found[1].note.startswith("no measurement in cell"), "each single observation counts"
    assert judge([always], table, planned=cells, looks=SEQUENTIAL)[0].seeds == 24


def test_a_claim_that_is_not_measured_further_has_no_second_look():
    values = np.random.default_rng(4).normal(size=12)
    table, cells = table_of(values)
    [verdict] = judge([claim(RISING)], table, planned=cells, looks=SEQUENTIAL)
    [early] = judge([claim(RISING)], table)
    assert verdict.p_value == early.p_value
    assert verdict.p_adjusted == pytest.approx(SEQUENTIAL.repeated(early.p_value, 0))


def test_a_claim_needs_two_seeds_at_a_look():
    table, cells = table_of(np.random.default_rng(5).normal(9.0, 1.0, size=24))
    table["status"] = [*[outside("too far")["status"]] * 11, *["ok"] * 13]
    [verdict] = judge([claim(Equivalence("q0", 9.0, 8.0, centre="mean"))], table, planned=cells, looks=SEQUENTIAL)
    assert (verdict.outcome, verdict.seeds) == ("supported", 13)
