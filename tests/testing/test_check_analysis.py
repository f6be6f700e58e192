"""An analysis that keeps the contract passes, and one that does not is told why."""

import random
from dataclasses import replace

import dummy_analysis
import pytest

from curvlab.study import Claim, Inequality, undecided
from curvlab.testing import check_analysis

ANALYSIS = dummy_analysis.ANALYSIS


def changed(**fields):
    return replace(ANALYSIS, experiments=(replace(dummy_analysis.NUMBERS, **fields),), figures={})


def test_the_dummy_keeps_the_contract():
    check_analysis(ANALYSIS, "--seeds", "2")


def failing(cell, context):
    raise RuntimeError("no")


def random_numbers(cell, context):
    return [row | {"value": random.random()} for row in dummy_analysis.measure(cell, context)]


def reading_nothing(config):
    return [Claim(id="none", statement="s", rule=Inequality("absent", "less", 1.0, centre="mean"), group="paper",
                  source="s", measured="m", expected=undecided("r"))]  # fmt: skip


def refuse(measurements, verdicts):
    raise ValueError("nothing to draw")


@pytest.mark.parametrize(
    ("analysis", "statement"),
    [
        (changed(measure=failing), "every cell is measured does not hold: .*RuntimeError: no"),
        (changed(measure=random_numbers), "a fresh run measures the same does not hold: .*of cell"),
        (
            changed(claims=reading_nothing),
            "every claim finds the quantities that it reads does not hold: .*none: nothing",
        ),
        (changed(measure=lambda *a: dummy_analysis.measure(*a)), "measurements can be sent to other processes"),
        (replace(ANALYSIS, figures={"gone": refuse}), r"every figure is drawn does not hold: .*\['gone'\] are missing"),
    ],
)
def test_what_is_wrong_with_an_analysis_is_named(analysis, statement):
    with pytest.raises(AssertionError, match=f"dummy: {statement}"):
        check_analysis(analysis)
