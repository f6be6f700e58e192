"""The run of the published code's README: its milestones are read as they are meant, and its cell works."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from analyses.edge_of_stability import ANALYSIS
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.experiments import published
from analyses.edge_of_stability.windows import Edge
from curvlab.problems import DataUnavailable
from curvlab.study import Trace, judge
from curvlab.study.execution import Plan
from curvlab.study.measurements import normalise, tabulate

CONFIG = Config(structures=(), preconditioners=(), seeds=2, published=True)


def test_milestones_of_a_run_by_hand() -> None:
    steps = range(0, 10_001, 50)
    sharpness = [78.0 if step == 0 else 71.0 if step == 400 else 0.04 * max(step, 1900) for step in steps]
    seen = [{"step": step, "loss": 0.6 - 4e-5 * step} for step in range(10_001)]
    for step, value in zip(steps, sharpness, strict=True):
        seen[step]["sharpness"] = min(value, 208.0)
    run = Edge(Trace(seen), 200.0, 0.01)
    found = {name: milestone.read(run) for name, milestone in published.MILESTONES.items()}
    expected = {
        "first-sharpness": 78.0,
        "first-loss": 0.6,
        "loss-100": 0.596,
        "dip": 71.0,
        "passes-100": 2500.0,
        "passes-135": 3400.0,
        "passes-200": 5000.0,
        "loss-4500": 0.42,
        "last-step": 10_000.0,
        "last-loss": 0.2,
    }
    plateau = found.pop("plateau")
    assert found == pytest.approx(expected)
    assert 200.0 < plateau < 208.0


def test_what_is_not_reached_counts_as_late() -> None:
    run = Edge(Trace([{"step": 0, "loss": 0.6, "sharpness": 50.0}]), 200.0, 0.01)
    assert published.MILESTONES["passes-200"].read(run) == published.LIMIT


def outcomes(runs: int, **factors: list[float]) -> dict[str, str]:
    """Verdicts on runs that meet every milestone but for some factors, one a run."""
    config = replace(CONFIG, published_seeds=runs, seeds=runs)
    met = {name: milestone.value for name, milestone in published.MILESTONES.items()}
    table = {
        cell: normalise(cell, [{"quantity": n, "value": v * factors.get(n, [1.0] * runs)[i]} for n, v in met.items()])
        for i, cell in enumerate(published.PUBLISHED.planned(config))
    }
    verdicts = judge(published.PUBLISHED.claimed(config), tabulate(table))
    return {verdict.claim.removeprefix("published-"): verdict.outcome for verdict in verdicts}


def test_a_milestone_that_a_single_run_misses_is_refuted() -> None:
    found = outcomes(1, **{"passes-200": [1.2], "dip": [0.95]})
    assert found.pop("passes-200") == "refuted"
    assert set(found.values()) == {"supported"}


def test_several_runs_meet_a_milestone_within_the_prediction_interval() -> None:
    wide, narrow = [1.04, 1.10, 1.16, 1.10], [1.09, 1.10, 1.11, 1.10]
    half = t.ppf(0.975, 3) * np.log(wide).std(ddof=1) * np.sqrt(1.25)
    assert abs(np.log(wide).mean()) < half
    found = outcomes(4, plateau=wide, dip=narrow, **{"last-loss": [0.5, 1.0, 2.0, 1.0]})
    assert found.pop("plateau") == "supported"
    assert found.pop("dip") == "refuted"
    assert found.pop("last-loss") == "inconclusive"
    assert set(found.values()) == {"supported"}


def test_its_cell_ends_at_the_accuracy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = {**published.SETTING, "problem": "digits", "width": 8, "samples": 20}
    monkeypatch.setattr(published, "SETTING", tiny)
    monkeypatch.setattr(published, "ACCURACY", 0.3)
    config = replace(CONFIG, results=tmp_path)
    (cell,) = published.PUBLISHED.planned(config)
    rows = Plan.of(ANALYSIS, config).task().observe(cell)
    last = next(row["value"] for row in rows if row["quantity"] == "last-step")
    assert 0 < last < published.LIMIT
    assert last % published.EVERY == 0


def test_missing_images_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataUnavailable, match="cifar10"):
        ANALYSIS.data_hash(CONFIG)
