"""Every analysis still gives the frozen results, and the comparison sees what changes."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from . import names
from .comparison import compare, store
from .runs import KEY, RUNS, Results, canonical, results


@pytest.mark.study
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")  # by Monte Carlo the full matrix is short of rank
def test_results_are_the_frozen_ones(name: str) -> None:
    comparison = compare(name, results(name))
    assert comparison.clean, str(comparison)


VERDICT = {
    "claim": "share", "outcome": "supported", "estimate": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.9, "seeds": 2,
    "p_value": 0.01, "p_adjusted": 0.02, "rule": "mean > 0", "expected": "supported",
}  # fmt: skip


def measured(shift: float = 0.0, *, quantity: str = "share", coordinate: str = "seed", status: str = "") -> Results:
    """Two seeds of a quantity, whose scale is 2, and one that is timed."""
    labels = {"step": 3} | ({"status": status} if status else {})
    numbers = pd.DataFrame(
        [
            {
                "run": "digits", "cell": canonical({"experiment": "response", coordinate: seed}), "quantity": name,
                "labels": canonical(labels), "column": "value", "occurrence": 0, "number": number,
            }
            for name, values in ((quantity, (1.0 + shift, 2.0)), ("seconds_per_step", (0.1 + shift, 0.2)))
            for seed, number in enumerate(values)
        ]
    )  # fmt: skip
    return Results(numbers[[*KEY, "number"]], {"digits": {"share": dict(VERDICT)}}, 1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where such results are stored, from two measurements 1e-13 apart."""
    monkeypatch.setattr("frozen.comparison.check_whole", lambda *_: None)
    store("ntk_isotropy", measured(), measured(1e-13), tmp_path)
    return tmp_path


def test_the_same_results_are_clean(folder: Path) -> None:
    comparison = compare("ntk_isotropy", measured(), folder)
    assert comparison.clean
    assert comparison.largest == "none"
    assert (comparison.numbers, comparison.verdicts) == (2, 1)


@pytest.mark.parametrize(
    ("shift", "clean"), [(1e-9, True), (1e-8, False), (float("nan"), False), (float("inf"), False)]
)
def test_numbers_agree_to_round_off_and_seconds_need_not(shift: float, clean: bool, folder: Path) -> None:
    comparison = compare("ntk_isotropy", measured(shift), folder)
    assert comparison.clean is clean
    assert len(comparison.deviations) == (0 if clean else 1)


def test_what_an_echo_has_lost_is_held_to_the_range_of_the_seeds(folder: Path) -> None:
    store("ntk_isotropy", measured(), measured(1e-3), folder)
    assert compare("ntk_isotropy", measured(0.9), folder).clean
    assert not compare("ntk_isotropy", measured(1.1), folder).clean


def test_numbers_that_changed_on_purpose_have_changed_by_no_more_than_a_factor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "FACTORS", {"ntk_isotropy": {("share", "value"): 1.5}})
    assert compare("ntk_isotropy", measured(0.4), folder).clean
    assert not compare("ntk_isotropy", measured(0.6), folder).clean


def test_what_is_missing_or_new_is_named(folder: Path) -> None:
    comparison = compare("ntk_isotropy", measured(quantity="ratio"), folder)
    assert not comparison.clean
    (missing,), (new,) = comparison.missing, comparison.new
    assert missing.startswith("share: 2 numbers")
    assert new.startswith("ratio: 2 numbers")
    found = measured()
    other = replace(found, verdicts={"digits": {"another": VERDICT | {"claim": "another"}}})
    comparison = compare("ntk_isotropy", other, folder)
    assert comparison.missing == ["claim share (digits)"]
    assert comparison.new == ["claim another (digits)"]


@pytest.mark.parametrize(
    ("field", "entry"), [("outcome", "refuted"), ("estimate", 0.5 + 1e-8), ("rule", "mean > 1"), ("low", None)]
)
def test_a_verdict_that_changes_is_named(field: str, entry: object, folder: Path) -> None:
    found = measured()
    changed = replace(found, verdicts={"digits": {"share": VERDICT | {field: entry}}})
    (line,) = compare("ntk_isotropy", changed, folder).deviations
    assert f"claim share (digits): {field} is" in line


@pytest.mark.parametrize(
    ("stored", "now", "clean"),
    [
        ("", "", True), ("", "ok", False), ("", "outside the assumptions: few", False), ("ok", "", False),
        ("diverged", "diverged at step 3", True), ("diverged at step 3", "diverged at step 4", False),
    ],
)  # fmt: skip
def test_a_status_may_say_more_where_there_was_one(stored: str, now: str, clean: bool, folder: Path) -> None:
    results_of_then = measured(status=stored)
    store("ntk_isotropy", results_of_then, results_of_then, folder)
    assert compare("ntk_isotropy", measured(status=now), folder).clean is clean


def family(outcome: str, *, rule: str = "mean > 0", p_adjusted: float = 0.02) -> Results:
    """Results with a claim for which nothing is measured, and what becomes of the other claim beside it."""
    nothing = dict.fromkeys(("estimate", "low", "high", "confidence", "p_value", "p_adjusted"))
    other = VERDICT | nothing | {"claim": "planless", "outcome": outcome, "seeds": 0, "rule": rule}
    verdicts = {"share": VERDICT | {"p_adjusted": p_adjusted}, "planless": other}
    return replace(measured(), verdicts={"digits": verdicts})


def test_a_claim_without_measurements_may_leave_its_family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = family("inconclusive")
    store("ntk_isotropy", then, then, folder)
    assert not compare("ntk_isotropy", family("inconclusive", p_adjusted=0.01), folder).clean
    assert compare("ntk_isotropy", family("not measured", p_adjusted=0.01), folder).clean
    assert not compare("ntk_isotropy", family("supported"), folder).clean
    assert not compare("ntk_isotropy", family("outside the assumptions"), folder).clean
    monkeypatch.setattr(names, "OUTCOMES", {"ntk_isotropy": {"planless": "outside the assumptions"}})
    assert compare("ntk_isotropy", family("outside the assumptions"), folder).clean


def test_an_identity_without_measurements_was_in_no_family(folder: Path) -> None:
    then = family("inconclusive", rule="|value| ≤ tolerance")
    store("ntk_isotropy", then, then, folder)
    assert compare("ntk_isotropy", family("not measured", rule="|value| ≤ tolerance"), folder).clean
    changed = family("not measured", rule="|value| ≤ tolerance", p_adjusted=0.01)
    assert not compare("ntk_isotropy", changed, folder).clean


def test_a_measured_claim_must_stay_measured(folder: Path) -> None:
    found = replace(measured(), verdicts={"digits": {"share": VERDICT | {"outcome": "not measured"}}})
    assert not compare("ntk_isotropy", found, folder).clean


def test_names_that_changed_are_translated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = measured(quantity="ratio_3", coordinate="draw")
    renamed = replace(renamed, verdicts={"digits": {"whole": VERDICT | {"claim": "whole"}}})
    assert not compare("ntk_isotropy", renamed, folder).clean
    monkeypatch.setattr(names, "COORDINATES", {"ntk_isotropy": {"seed": "draw"}})
    monkeypatch.setattr(names, "QUANTITIES", {"ntk_isotropy": {"share": "ratio_{step}"}})
    monkeypatch.setattr(names, "CLAIMS", {"ntk_isotropy": {"share": "whole"}})
    assert compare("ntk_isotropy", renamed, folder).clean
    monkeypatch.setattr(names, "ADDED", {"ntk_isotropy": {"split": "public"}})
    assert not compare("ntk_isotropy", renamed, folder).clean
    monkeypatch.setattr(names, "ADDED", {})
    monkeypatch.setattr(names, "QUANTITIES", {"ntk_isotropy": {"share": None}})
    comparison = compare("ntk_isotropy", renamed, folder)
    assert comparison.clean
    assert len(comparison.new) == 1
