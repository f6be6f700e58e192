"""What analyses claim, as data with a fingerprint, written down before they run."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from datetime import datetime

import dummy_analysis
import pytest
from dummy_analysis import ANALYSIS, UNDRAWN, changed

from curvlab.study import UsageError, among, by_seed, load, main, refuted, worst_by_seed
from curvlab.study.command import main as curvlab
from curvlab.study.overviews.commands import preregister
from curvlab.study.preregistration import fingerprint, fingerprints, registered, registration
from curvlab.study.report import findings, text


def with_claim(**parts):
    """The dummy with another first claim."""

    def claims(config):
        first, *others = dummy_analysis.claims(config)
        return [dataclasses.replace(first, **parts), *others]

    return changed(claims=claims)


def of(analysis, config=ANALYSIS.defaults):
    return fingerprint(registered(analysis, config))


FIRST = dummy_analysis.claims(ANALYSIS.defaults)[0]


def above(limit):
    return lambda table: by_seed(table[table["value"] > limit])


@pytest.mark.parametrize(
    "parts",
    [
        {"statement": "The full number is 1.0."},
        {"source": "nowhere, Theorem 2"},
        {"rule": dataclasses.replace(FIRST.rule, target=1.1)},
        {"rule": dataclasses.replace(FIRST.rule, margin=0.4)},
        {"rule": dataclasses.replace(FIRST.rule, centre="median")},
        {"bound_from": "equation (1)"},
        {"expected": refuted("it was made so")},
        {"expected": dataclasses.replace(FIRST.expected, explored=12)},
        {"expected": dataclasses.replace(FIRST.expected, reason="why not")},
        {"group": "derived"},
        {"given": "D-2"},
        {"at": {"structure": "full", "offset": 1.0}},
        {"at": {"structure": "full", "offset": lambda offset: offset < 1}},
        {"estimate": by_seed},
        {"estimate": worst_by_seed},
        {"estimate": above(1.0)},
        {"estimate": above(2.0)},
        {"estimate": among(by_seed, layer=2)},
        {"estimate": functools.partial(above, 1.0)},
        {"assumptions": lambda table: None},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_the_fingerprint_changes_with_every_part_of_a_claim(parts):
    before, after = (fingerprints(registered(one, one.defaults)) for one in (UNDRAWN, with_claim(**parts)))
    assert {name for name in before if before[name] != after[name]} == {"D-1"}
    assert of(with_claim(**parts)) != of(UNDRAWN)


def test_the_fingerprint_does_not_depend_on_how_and_at_which_seeds_a_run_goes(tmp_path):
    def claims(config):
        first, *others = dummy_analysis.claims(config)
        return [dataclasses.replace(first, estimate=lambda table: table if config.scale else by_seed(table)), *others]

    closing, config = changed(claims=claims), ANALYSIS.defaults
    others = {"results": tmp_path, "seeds": 48, "first_seed": 7, "quiet": True, "claims": ("D-1",), "workers": 2}
    assert of(closing) == of(closing, dataclasses.replace(config, **others))
    assert of(closing) != of(closing, dataclasses.replace(config, scale=0.2))
    reversed_claims = changed(claims=lambda config: dummy_analysis.claims(config)[::-1])
    assert of(reversed_claims) == of(UNDRAWN)


def test_the_fingerprint_is_the_same_in_another_process():
    code = (
        "from dummy_analysis import UNDRAWN as a; from curvlab.study.preregistration import *; "
        "print(fingerprint(registered(a, a.defaults)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == of(UNDRAWN)


@pytest.fixture
def said(run):
    """Run the dummy; what its report says of the claims."""

    def call(*arguments, **further):
        assert run("--seeds", "2", "--quiet", *arguments, **further) == 0
        stored = run.stored()
        return text.measured_on(stored, findings(stored.verdicts))["claims"]

    call.results = run.results
    call.preregister = lambda *arguments: preregister(UNDRAWN, [*arguments, "--results", str(run.results)])
    return call


def test_a_run_says_whether_its_claims_were_written_down_before_it_and_when(said, capsys):
    known = f"fingerprint {of(UNDRAWN)[:12]}"
    assert said() == f"{known}, not written down before the run (curvlab preregister)"
    assert said.preregister("--seeds", "2") == 0
    assert "5 claims, fingerprint" in capsys.readouterr().out
    [path] = (said.results / "dummy").glob("preregistered-*.json")
    written = json.loads(path.read_text())
    assert written["claims"]["D-1"]["decided by"] == "mean = 1 ± 0.5"
    when = f"{datetime.fromisoformat(written['written']):%Y-%m-%d %H:%M}"
    assert said().startswith(f"{known}, written down on {when}, after some cells had been measured (since ")
    assert (
        said("--first-seed", "5")
        == f"{known}, written down on {when}, before anything was measured, for other options: first_seed 0"
    )
    assert said("--fresh") == f"{known}, written down on {when}, before anything was measured"
    report = load(said.results / "dummy" / "latest").folder / "report.html"
    assert "written down on" in report.read_text()


def test_what_is_written_down_stays_as_it_was(said):
    said.preregister("--seeds", "2")
    [path] = (said.results / "dummy").glob("preregistered-*.json")
    before = path.read_bytes()
    said.preregister("--seeds", "2")
    assert path.read_bytes() == before
    said.preregister("--seeds", "3")
    assert len(list(path.parent.glob("preregistered-*.json"))) == 2


def test_claims_that_were_changed_afterwards_are_not_those_written_down(said):
    said.preregister()
    assert said(analysis=with_claim(statement="Another.")).endswith(
        "not written down before the run (curvlab preregister)"
    )


@pytest.mark.parametrize(
    "damage", [lambda text: text[:40], lambda text: text.replace("is 1.", "is 2."), lambda text: "[]"]
)
def test_a_damaged_preregistration_is_refused(said, damage, capsys):
    said.preregister()
    [path] = (said.results / "dummy").glob("preregistered-*.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(UsageError, match=r"is damaged .*; restore it, or remove it and preregister again"):
        registration(UNDRAWN, dataclasses.replace(ANALYSIS.defaults, results=said.results))
    assert main(UNDRAWN, ["--seeds", "2", "--results", str(said.results)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_help_and_wrong_options_end_it_without_a_file(tmp_path, capsys):
    command = ["preregister", "dummy_analysis:UNDRAWN", "--results", str(tmp_path)]
    assert curvlab([*command, "--help"]) == 0
    assert curvlab([*command, "--sedes", "2"]) == 2
    assert not list(tmp_path.iterdir())
