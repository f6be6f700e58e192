"""The Jacobian-rank analysis: its command line on a small real instance, its measurements, and its power to refute."""

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import curvlab
from analyses.descent import Descent, Direction, length
from analyses.jacobian_rank import ANALYSIS, descent
from analyses.jacobian_rank.analysis import FIGURES
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.experiments import ball, networks, structures, training, width
from analyses.jacobian_rank.networks import network_setting
from analyses.jacobian_rank.setting import Setting
from curvlab import theory
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError, TwoLayer, linearize
from curvlab.problems import Problem
from curvlab.study import Cell, Verdict, judge
from curvlab.study.execution import Plan
from curvlab.study.loop import Process
from curvlab.study.measurements import OUTSIDE, Row, tabulate
from curvlab.testing.oracle import assert_close, dense_jacobian

SMALL = ("--widths", "64", "256", "--seeds", "1", "--samples", "8", "--structures", "full", "kfac")
IDENTITIES = (
    "rank-initial", "rank-duplicated", "rank-parallel", "rank-networks", "rank-layers", "rank-units", "rank-training",
    "rate-linear", "modes-damped", "kfac-leverages", "general-newton", "structures-linearised", "structures-kept",
    "trained-redundant", "trained-jacobian", "ball-search", "ball-worst-relu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "analyses.jacobian_rank", *SMALL, "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, results / "jacobian_rank" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "Redraw:" in done.stdout
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(FIGURES)
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments}


def test_what_holds_exactly_is_supported(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = run
    outcomes = {v["claim"]: v["outcome"] for v in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert {claim: outcomes[claim] for claim in IDENTITIES} == dict.fromkeys(IDENTITIES, "supported")


def measured(config: Config, cells: Sequence[Cell]) -> dict[Cell, list[Row]]:
    task = Plan.of(ANALYSIS, config).task()
    return {cell: task.observe(cell) for cell in cells}


def verdict_of(claim_id: str, config: Config, **only: object) -> Verdict:
    """Measure what a claim needs and judge it."""
    (claim,) = (claim for claim in ANALYSIS.claims(config) if claim.id == claim_id)
    cells = [cell for cell in ANALYSIS.cells(config) if claim.needs(cell)]
    cells = [cell for cell in cells if all(cell.coordinates.get(name) == value for name, value in only.items())]
    (verdict,) = judge([claim], tabulate(measured(config, cells)))
    return verdict


TINY = Config(widths=(64,), samples=10, seeds=2)


def test_a_wrong_step_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Natural gradient with a little damping, which nobody would see in a figure."""
    monkeypatch.setattr(Setting, "natural", partialmethod(Setting.natural, damping=1e-6))
    assert verdict_of("rate-linear", TINY, data="own").outcome == "refuted"


def test_an_unnoticed_duplicate_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.jacobian_rank.experiments.rank._expected_missing", lambda _: 0)
    assert verdict_of("rank-duplicated", TINY).outcome == "refuted"
    assert verdict_of("rank-initial", TINY).outcome == "supported"


def test_the_bound_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the bound (1 − η)^3k, steps that the theorem covers would exceed it."""
    monkeypatch.setattr("analyses.jacobian_rank.experiments.training.theory.ngd_rate_bound", lambda eta: (1 - eta) ** 3)
    config = Config(widths=(64, 8192), activation=("erf",), seeds=1)
    assert verdict_of("rate-bound-path", config, data="few", eta=0.1).outcome == "refuted"


@pytest.fixture
def setting() -> Setting:
    cell = Cell({"problem": "two-layer", "width": 30, "activation": "erf", "samples": 8, "seed": 0})
    return Setting.of(cell, Config())


def test_steps_are_those_of_the_dense_jacobian(setting: Setting) -> None:
    model, x = setting.problem.model, setting.inputs
    J = dense_jacobian(model, x)
    r = setting.residual
    natural = setting.natural(Full())(model)["hidden.weight"].flatten()
    assert_close(natural, torch.linalg.pinv(J) @ r, 1e-8)
    assert_close(setting.gradient()(model)["hidden.weight"].flatten(), J.T @ r, 1e-8)
    moved = copy.deepcopy(model)
    path = descent.descend(setting, setting.natural(Full()), 0.3, 1, moved)
    assert_close(moved.hidden.weight.detach().flatten(), model.hidden.weight.detach().flatten() - 0.3 * natural)
    assert_close(torch.from_numpy(path[1]), moved(x).detach().flatten())
    assert length(descent.moved(moved, setting)) == pytest.approx(0.3 * float(natural.norm()), rel=1e-9)


def test_the_change_of_the_jacobian_is_the_dense_one(setting: Setting) -> None:
    direction = {"hidden.weight": torch.ones_like(setting.problem.model.hidden.weight)}
    model = descent.displaced(setting, 2.0, direction)
    assert length(descent.moved(model, setting)) == pytest.approx(2.0)
    difference = dense_jacobian(model, setting.inputs) - dense_jacobian(setting.problem.model, setting.inputs)
    point = setting.inspect(curvlab.jacobian(model, setting.inputs))
    assert point.change == pytest.approx(float(torch.linalg.matrix_norm(difference, 2)), rel=1e-8)
    assert point.change_frobenius == pytest.approx(float(difference.norm()), rel=1e-8)
    assert point.deficiency == 0


def test_random_points_of_the_ball_are_not_the_initial_weights_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from the same generator they were W(0), a positive multiple of which leaves a ReLU network's Jacobian as it is."""
    monkeypatch.setattr(training, "BALL_POINTS", 1)
    at = Cell({"problem": "two-layer", "width": 30, "activation": "relu", "samples": 8, "seed": 3})
    assert training._at_random(Setting.of(at, Config()), 3) > 0.1


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_the_worst_point_of_the_ball_is_worse_than_random_ones_and_not_beyond_the_bound(activation: str) -> None:
    at = {"problem": "synthetic-two-layer", "similarity": 0.0, "width": 16384, "samples": 4, "seed": 0}
    setting = Setting.of(Cell({**at, "activation": activation}), Config())
    radius = theory.condition_radius(float(setting.residual.norm()), float(setting.eigenvalues[0]))
    directions = [ball._worst(setting, activation, sample) for sample in range(4)]
    assert all(0.9 * radius < length(direction) < radius for direction in directions)
    worst = max(descent.on_surface(setting, direction) for direction in directions)
    assert worst > 1.5 * training._at_random(setting, 0)
    assert activation == "relu" or 0.5 * ball._bound(setting) < worst < ball._bound(setting)


def test_a_run_is_seen_before_the_first_step_and_after_each(setting: Setting) -> None:
    direction = setting.natural(Full())
    path, seen = descent.watch(setting, Full(), 0.3, 2, see=lambda rows: rows.dense())
    plain = setting.network()
    assert len(path) == len(seen) == 3
    for outputs, jacobian in zip(path, seen, strict=True):
        assert_close(jacobian, dense_jacobian(plain, setting.inputs))
        assert_close(torch.from_numpy(outputs), plain(setting.inputs).detach().flatten())
        descent.descend(setting, direction, 0.3, 1, plain)


def test_a_run_that_diverges_is_stopped(setting: Setting) -> None:
    model = linearize(setting.problem.model)
    path, seen = descent.watch(setting, Full(), 101.0, 9, model=model, see=lambda _: None)
    grown = np.sqrt(setting.squared_residuals(path)) / float(setting.residual.norm())
    assert grown == pytest.approx([1, 100, 10_000], rel=1e-6)
    assert len(seen) == 3


def test_a_descent_that_takes_up_a_state_goes_on_from_there(setting: Setting) -> None:
    direction = setting.gradient()
    first, second = (Descent(setting.network(), direction, 0.1, setting.see) for _ in range(2))
    assert isinstance(first, Process)
    first.step(0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for process in (first, second):
        process.step(1)
    assert np.array_equal(first.look(2)["outputs"], second.look(2)["outputs"])


def test_contraction_and_excess() -> None:
    squared = np.array([4.0, 1.0, 0.25, 1e-13])
    assert descent.contraction(squared[:3]) == pytest.approx(0.25)
    assert descent.excess(squared[:3], 0.25) == 0
    assert descent.excess(squared[:3], 0.125) == pytest.approx(0.125)


def test_a_wrong_step_of_a_structure_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setting, "natural", partialmethod(Setting.natural, damping=1e-6))
    config = Config(widths=(64,), samples=10, seeds=1)
    assert verdict_of("structures-linearised", config, network="mlp", structure="full").outcome == "refuted"


def test_of_a_structure_that_no_run_has_shown_nothing_is_expected() -> None:
    assert {expected.outcome for expected in structures._expected("of a package")} == {"open"}


def test_unit_ranks_are_those_of_the_dense_blocks() -> None:
    cell = Cell({"problem": "two-layer", "width": 8, "network": "mlp", "units": 6, "samples": 9, "seed": 0})
    setting = network_setting(cell, Config())
    layer = setting.jacobian.layers[1]
    ranks, active = descent.ranks_and_active(layer.unit_stack())
    J = dense_jacobian(setting.problem.model, setting.inputs)[:, 6 * 64 : 6 * 64 + 36].unflatten(1, (6, 6))
    assert ranks.tolist() == [int(torch.linalg.matrix_rank(J[:, unit])) for unit in range(6)]
    assert active.tolist() == [min(6, int((J[:, unit] != 0).any(1).sum())) for unit in range(6)]


def test_a_layer_that_training_deprives_of_rank_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that puts out all units of the first layer."""
    natural = Setting.natural

    def numbing(setting: Setting, structure: Full) -> Direction:
        step = natural(setting, structure)
        return lambda model: {**step(model), "0.weight": model[0].weight.detach() / networks.ETA}

    monkeypatch.setattr(Setting, "natural", numbing)
    config = Config(widths=(64,), samples=10, seeds=1, activation=("relu",))
    assert verdict_of("networks-layers", config, network="mlp", units=64).outcome == "refuted"


def test_the_needed_width_is_the_least_that_concludes() -> None:
    config = Config(seeds=1)
    (cell,) = (cell for cell in ANALYSIS.cells(config) if cell["experiment"] == "width" and cell["samples"] == 8)
    found = {(row["quantity"], row["run"]): row for row in measured(config, [cell])[cell]}
    for name, run in width.THEOREMS.items():
        needed = found["needed", name]["value"]
        reached = {
            m: width._concludes(Setting.of(cell, config, width=m), run, least=0.1) for m in width.WIDTHS if m <= needed
        }
        assert [m for m, constant in reached.items() if constant is not None] == [needed]
    assert found["constant_natural", "natural"]["value"] == pytest.approx(
        width._concludes(
            Setting.of(cell, config, width=found["needed", "natural"]["value"]), width.THEOREMS["natural"], 0.1
        )
    )


def narrow() -> Problem:
    """One hidden unit on three features: three parameters for eight rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    model = TwoLayer(3, 1, generator=generator, dtype=torch.float64)
    data = x, torch.ones(8, 1, dtype=torch.float64)
    return Problem("narrow", model, HalfSquaredError(), data, data)


def test_fewer_parameters_than_rows_are_said_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(problem="test_jacobian_rank:narrow", seeds=1)
    assert config.swept_widths == (0,)
    with caplog.at_level("WARNING", logger="curvlab"):
        cells = [cell for cell in ANALYSIS.cells(config) if cell["experiment"] in ("rank", "training", "general-loss")]
        found = measured(config, [cell for cell in cells if cell.coordinates.get("network", "own") == "own"])
    assert len(found) > 5
    assert "P = 3 parameters, fewer than its R = 8 rows" in caplog.text
    rows = [row for rows in found.values() for row in rows]
    assert not {row["quantity"] for row in rows} & {"constant_trajectory", "movement_ratio"}
    covered = {row["quantity"] for row in rows if str(row["quantity"]).startswith("excess") and "status" not in row}
    assert covered == {"excess"}
    assert verdict_of("rate-bound-path", config).outcome == verdict_of("general-bound", config).outcome == OUTSIDE


def test_what_a_graph_plans_no_cell_for_is_not_measured_and_in_no_family() -> None:
    config = Config(problem="karate-gcn", samples=4, widths=(8,), seeds=3)
    claims, cells = ANALYSIS.claims(config), ANALYSIS.cells(config)
    table = tabulate(measured(config, [cell for cell in cells if cell["experiment"] == "generalisation"]))
    verdicts = {verdict.claim: verdict for verdict in judge(claims, table, planned=cells)}
    without = [claim for claim in claims if verdicts[claim.id].outcome == "not measured"]
    assert {claim.experiment for claim in without} == {"rank", "networks", "structures", "paths"}
    assert {"rank-parallel", "rank-near-erf", "networks-bound-mlp", "linear-kfac"} <= {claim.id for claim in without}
    for claim in without:
        assert f"plans no cell with experiment {claim.experiment}" in verdicts[claim.id].note
    others = [claim for claim in claims if claim not in without]
    family = {verdict.claim: verdict for verdict in judge(others, table)}
    assert {claim: repr(verdicts[claim]) for claim in family} == {claim: repr(family[claim]) for claim in family}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"structures": ("layer-wise",)}, "'layer-wise' is a family of structures"),
        ({"activation": ("rel",)}, "Did you mean 'relu'"),
        ({"widths": (0,)}, "--widths"),
        ({"samples": 1}, "--samples"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
