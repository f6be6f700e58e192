"""The monitor analysis: its command line on short runs, what it counts as shown and told, and its claims on made-up runs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses.monitor import ANALYSIS, config
from analyses.monitor.config import Config
from analyses.monitor.courses import COURSES, SHOWS, SMOOTH, SMOOTHING, Followed, Shown, _batches, follow, smoothed
from analyses.monitor.experiment import RAMP, RUNS, _observations
from analyses.monitor.panels import ahead, shares, told
from curvlab.monitor import Edge
from curvlab.nn import HalfSquaredError
from curvlab.problems import resolve
from curvlab.study import judge, main, style
from curvlab.study.measurements import normalise, tabulate


def test_the_command_trains_at_both_rates_judges_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SHORTEST", 1)
    options = ["--seeds", "1", "--steps", "60", "--budget", "1", "--workers", "1", "--results", str(tmp_path)]
    assert main(ANALYSIS, [*options, "--problem", "karate-gcn", "--further"]) == 0
    folder = tmp_path / "monitor" / "latest"
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == {"monitor"}
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["seed"]) == {1000 + 100 * list(COURSES).index("karate-gcn")}
    measured = table[table["quantity"] == "measured"]
    assert set(measured[measured["rate"] == RAMP]["of"]) <= {"edge"}
    assert "layers" in set(measured[measured["rate"] != RAMP]["of"])
    verdicts = {one["claim"]: one for one in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert verdicts["told-before-karate-gcn"]["outcome"] == "outside the assumptions"


def test_the_loss_shows_an_instability_by_a_mean_far_above_the_lowest() -> None:
    shown = Shown()
    assert not any(shown.at(loss) for loss in [9.0] * SMOOTH + [1.0] * SMOOTH)
    seen = [shown.at(1.0 + SHOWS) for _ in range(SMOOTH)]
    assert seen.index(True) == pytest.approx((SHOWS - 1) / SHOWS * SMOOTH, abs=1.5)
    assert Shown().at(float("nan"))


def test_a_run_at_a_growing_rate_stops_where_the_loss_shows_an_instability() -> None:
    problem = resolve("karate-gcn", seed=0).to("cpu", torch.float32)
    found = follow(problem, "karate-gcn", 400, 0.5, ramp=1e6, quantities=[Edge()])
    assert found.shown == found.steps < 400
    assert set(found.measured) <= {"edge"}
    assert found.seconds > found.monitored > 0


def test_time_of_the_monitor_is_that_between_readings_without_a_readings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves by readings: calls that pass read none, a look reads three, and each step has four of the loop."""
    now = iter(range(10**6))
    monkeypatch.setattr("analyses.monitor.courses.now", lambda device: float(next(now)))
    problem = resolve("karate-gcn", seed=0).to("cpu", torch.float32)
    found = follow(problem, "karate-gcn", 40, 1e-9, quantities=[Edge()])
    assert found.monitored in {3.0 * looks for looks in range(3, 40)}
    assert found.seconds == 40 * 4 + 1


def test_batches_have_every_sample_once_an_epoch_in_the_order_of_a_seed() -> None:
    problem = resolve("digits-mlp", seed=0)
    epoch = len(problem.train[0]) // 256

    def drawn(seed: int) -> list[bytes]:
        return [x.numpy().tobytes() for x, _ in _batches(problem, 256, epoch, seed, graph=False)]

    assert drawn(1) == drawn(1) != drawn(2)
    rows = [row.numpy().tobytes() for x, _ in _batches(problem, 256, epoch, 1, graph=False) for row in x]
    assert len(rows) == 256 * epoch
    assert set(rows) <= {row.numpy().tobytes() for row in problem.train[0]}


def test_labels_are_smooth_and_other_losses_stay() -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    assert (smoothed(loss).label_smoothing, smoothed(loss).reduction) == (SMOOTHING, "sum")
    assert loss.label_smoothing == 0
    other = HalfSquaredError()
    assert smoothed(other) is other


CONFIG = Config(seeds=12)


def made(share: float = 0.015, told_at: int | None = 4000, shown_at: int | None = 5000, odd: int = 0) -> pd.DataFrame:
    """Measurements of runs, of which so many at each problem were not told of and took 3 % of the time."""
    cells = {}
    for cell in RUNS.planned(CONFIG):
        ramped, strange = cell["rate"] == RAMP, int(cell["seed"]) % 100 < odd
        event = told_at if ramped and not strange else None
        took = 0.03 if strange else share * (1 + 0.01 * (int(cell["seed"]) % 7))
        run = Followed(8000, 1.0, took, {"edge": 5}, event, shown_at if ramped else None, ())
        cells[cell] = normalise(cell, _observations(run, CONFIG.budget, ramped=ramped))
    return tabulate(cells)


@pytest.mark.parametrize(
    ("table", "claim", "outcome"),
    [
        (made(), "share-always", "supported"),
        (made(odd=1), "share-always", "refuted"),
        (made(odd=1), "share-mean", "supported"),
        (made(share=0.022), "share-mean-karate-gcn", "refuted"),
        (made(), "told-before", "supported"),
        (made(odd=12), "told-before", "refuted"),
        (made(odd=6), "told-before-digits-mlp", "inconclusive"),
        (made(told_at=5000), "told-before-digits-mlp", "refuted"),
        (made(shown_at=None), "told-before", "outside the assumptions"),
        (made(), "ahead-digits-mlp", "supported"),
        (made(told_at=4960), "ahead-digits-mlp", "refuted"),
        (made(odd=12), "ahead-digits-mlp", "refuted"),
    ],
)
def test_claims_can_come_out_either_way(table: pd.DataFrame, claim: str, outcome: str) -> None:
    verdicts = judge(RUNS.claimed(CONFIG), table, planned=RUNS.planned(CONFIG))
    assert {verdict.claim: verdict.outcome for verdict in verdicts}[claim] == outcome


def test_figures_show_every_run_and_those_without_an_event_apart() -> None:
    table = made(odd=2)
    with style.use():
        _, axes = style.canvas(1, 3)
        for place, panel in enumerate((told, ahead, shares)):
            panel(axes[0, place], table)
    hollow = [line for line in axes[0, 0].lines if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [2, 2]
    points = [np.asarray(line.get_xdata()) for line in axes[0, 1].lines if line.get_marker() not in ("None", None)]
    assert sorted(np.concatenate(points)) == [0.0] * 4 + [1000.0] * 20
    ticks = [line for line in axes[0, 2].lines if line.get_marker() == "|"]
    assert sum(len(line.get_xdata()) for line in ticks if len(line.get_xdata()) > 2) == 48


def test_a_run_without_an_event_is_drawn() -> None:
    with style.use():
        _, axes = style.canvas(1, 1)
        told(axes[0, 0], made(odd=12))
    assert axes[0, 0].lines


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ramp": 1.0}, "--ramp"),
        ({"steps": 2999}, "--steps"),
        ({"budget": 0.0}, "--budget"),
        ({"seeds": 101}, "--seeds"),
    ],
)
def test_options_are_checked(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Config(**options)  # type: ignore[arg-type]
