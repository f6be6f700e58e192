"""What the monitor's benchmark counts as shown, told and wrong, and its command line, on few steps."""

import json
from dataclasses import replace

import pytest

from benchmarks.monitor.__main__ import main
from benchmarks.monitor.courses import SHOWS, SMOOTH, Followed, Shown, follow
from benchmarks.monitor.report import Line

RUN = Followed(
    steps=100,
    seconds=10.0,
    monitored=0.1,
    share=0.01,
    measured={"edge": 2},
    told={"at the edge": 50},
    shown=60,
    reasons={},
)


def test_the_loss_shows_an_instability_by_a_mean_far_above_the_lowest():
    shown = Shown()
    assert not any(shown.at(loss) for loss in [9.0] * SMOOTH + [1.0] * SMOOTH)
    seen = [shown.at(1.0 + SHOWS) for _ in range(SMOOTH)]
    assert seen.index(True) == pytest.approx((SHOWS - 1) / SHOWS * SMOOTH, abs=1.5)
    assert Shown().at(float("nan"))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, False),
        ({"monitored": 0.3}, True),
        ({"told": {}}, True),
        ({"told": {"at the edge": 60}}, True),
        ({"told": {}, "shown": None}, False),
    ],
)
def test_too_much_time_and_telling_too_late_are_wrong(changes, wrong):
    assert Line("digits-mlp", 0, 30.0, 0.02, replace(RUN, **changes)).wrong == wrong


def test_a_run_counts_its_measurements_and_stops_where_the_loss_shows_an_instability():
    found = follow("karate-gcn", 400, 0.5, ramp=1e6)
    assert found.shown == found.steps < 400
    assert set(found.measured) <= {"edge"}
    assert found.seconds > found.monitored > 0


def test_the_command_writes_what_it_found(tmp_path):
    path = tmp_path / "monitor.json"
    main(["--problems", "karate-gcn", "--steps", "60", "--budget", "1", "--threads", "1", "--output", str(path)])
    assert [line["course"] for line in json.loads(path.read_text())["measurements"]] == ["karate-gcn"] * 2


def test_options_out_of_range_are_refused(capsys):
    assert main(["--ramp", "1"]) == 2
    assert "--ramp must be above 1" in capsys.readouterr().err
