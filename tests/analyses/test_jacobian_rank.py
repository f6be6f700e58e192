"""The Jacobian-rank analysis: its command line on a small real instance, its measurements, and its power to refute."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import assert_close, dense_jacobian
from torch import nn

import curvlab
from analyses.jacobian_rank import ANALYSIS, descent
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.figures import FIGURES
from analyses.jacobian_rank.networks import network_setting
from analyses.jacobian_rank.parts import PARTS, networks, width
from analyses.jacobian_rank.setting import Setting, setting_of
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError, TwoLayer, linearize
from curvlab.problems import Problem
from curvlab.study import Cell, Verdict, judge
from curvlab.study.measurements import normalise, tabulate

SMALL = ("--widths", "64", "256", "--seeds", "1", "--samples", "8", "--structures", "full", "kfac")
IDENTITIES = (
    "rank-initial", "rank-duplicated", "rank-parallel", "rank-networks", "rank-layers", "rank-training", "rate-linear",
    "modes-damped", "kfac-leverages", "general-newton", "response-rank-full", "linearised-full", "linearised-kfac", "kept-full",
    "trained-redundant", "trained-jacobian",
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
    assert set(table["part"]) == set(PARTS)


def test_what_holds_exactly_is_supported(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = run
    outcomes = {v["claim"]: v["outcome"] for v in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert {claim: outcomes[claim] for claim in IDENTITIES} == dict.fromkeys(IDENTITIES, "supported")


def verdict_of(claim_id: str, config: Config, **only: object) -> Verdict:
    """Measure what a claim needs and judge it."""
    (claim,) = (claim for claim in ANALYSIS.claims(config) if claim.id == claim_id)
    cells = [cell for cell in ANALYSIS.cells(config) if claim.needs(cell)]
    cells = [cell for cell in cells if all(cell.coordinates.get(name) == value for name, value in only.items())]
    measured = {cell: normalise(cell, ANALYSIS.measure(cell, config)) for cell in cells}
    (verdict,) = judge([claim], tabulate(measured))
    return verdict


TINY = Config(widths=(64,), samples=10, seeds=2)


def test_a_wrong_step_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Natural gradient with a little damping, which nobody would see in a figure."""
    damped = partial(descent.natural, damping=1e-6)
    monkeypatch.setattr("analyses.jacobian_rank.parts.training.natural", damped)
    assert verdict_of("rate-linear", TINY, data="own").outcome == "refuted"


def test_an_unnoticed_duplicate_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.jacobian_rank.parts.rank._expected_missing", lambda _: 0)
    assert verdict_of("rank-duplicated", TINY).outcome == "refuted"
    assert verdict_of("rank-initial", TINY).outcome == "supported"


def test_the_bound_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the bound (1 − η)^3k, steps that the theorem covers would exceed it."""
    monkeypatch.setattr("analyses.jacobian_rank.parts.training.theory.ngd_rate_bound", lambda eta: (1 - eta) ** 3)
    config = Config(widths=(64, 8192), activation=("erf",), seeds=1)
    assert verdict_of("rate-bound-path", config, data="easy", eta=0.1).outcome == "refuted"


@pytest.fixture
def setting() -> Setting:
    cell = Cell({"problem": "two-layer", "width": 30, "activation": "erf", "samples": 8, "seed": 0})
    return setting_of(cell, Config())


def test_steps_are_those_of_the_dense_jacobian(setting: Setting) -> None:
    model, x = setting.problem.model, setting.inputs
    J = dense_jacobian(model, x)
    r = setting.residual
    natural = descent.natural(Full(), setting)(model)["hidden.weight"].flatten()
    assert_close(natural, torch.linalg.pinv(J) @ r, 1e-8)
    assert_close(descent.gradient(setting)(model)["hidden.weight"].flatten(), J.T @ r, 1e-8)
    moved = copy.deepcopy(model)
    path = descent.descend(moved, setting, descent.natural(Full(), setting), 0.3, 1)
    assert_close(moved.hidden.weight.detach().flatten(), model.hidden.weight.detach().flatten() - 0.3 * natural)
    assert_close(torch.from_numpy(path[1]), moved(x).detach().flatten())
    assert descent.movement(moved, setting) == pytest.approx(0.3 * float(natural.norm()), rel=1e-9)


def test_the_change_of_the_jacobian_is_the_dense_one(setting: Setting) -> None:
    direction = {"hidden.weight": torch.ones_like(setting.problem.model.hidden.weight)}
    model = descent.displaced(setting, 2.0, direction)
    assert descent.movement(model, setting) == pytest.approx(2.0)
    difference = dense_jacobian(model, setting.inputs) - dense_jacobian(setting.problem.model, setting.inputs)
    point = descent.inspect(curvlab.jacobian(model, setting.inputs), setting)
    assert point.change == pytest.approx(float(torch.linalg.matrix_norm(difference, 2)), rel=1e-8)
    assert point.change_frobenius == pytest.approx(float(difference.norm()), rel=1e-8)
    assert point.deficiency == 0


def test_following_a_run_looks_before_the_first_step_and_after_each(setting: Setting) -> None:
    def run(model: nn.Module) -> tuple[np.ndarray, list[torch.Tensor]]:
        structure = Full()
        return descent.follow(
            model, setting, structure, descent.natural(structure, setting), 0.3, 2, lambda rows: rows.dense()
        )

    path, seen = run(copy.deepcopy(setting.problem.model))
    plain = copy.deepcopy(setting.problem.model)
    direction = descent.natural(Full(), setting)
    assert len(path) == len(seen) == 3
    for k, jacobian in enumerate(seen):
        assert_close(jacobian, dense_jacobian(plain, setting.inputs))
        assert_close(torch.from_numpy(path[k]), plain(setting.inputs).detach().flatten())
        descent.descend(plain, setting, direction, 0.3, 1)


def test_a_run_that_diverges_is_stopped(setting: Setting) -> None:
    structure = Full()
    path, seen = descent.follow(
        linearize(setting.problem.model),
        setting,
        structure,
        descent.natural(structure, setting),
        101.0,
        9,
        lambda _: None,
    )
    grown = np.sqrt(descent.squared_residuals(path, setting)) / float(setting.residual.norm())
    assert grown == pytest.approx([1, 100, 10_000], rel=1e-6)
    assert len(seen) == 3


def test_contraction_and_excess() -> None:
    squared = np.array([4.0, 1.0, 0.25, 1e-13])
    assert descent.contraction(squared[:3]) == pytest.approx(0.25)
    assert descent.excess(squared[:3], 0.25) == 0
    assert descent.excess(squared[:3], 0.125) == pytest.approx(0.125)


def test_a_wrong_step_of_a_structure_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    damped = partial(descent.natural, damping=1e-6)
    monkeypatch.setattr("analyses.jacobian_rank.parts.structures.natural", damped)
    config = Config(widths=(64,), samples=10, seeds=1)
    assert verdict_of("linearised-full", config, network="mlp").outcome == "refuted"


def test_unit_ranks_are_those_of_the_dense_blocks() -> None:
    cell = Cell({"problem": "two-layer", "width": 8, "network": "mlp", "units": 6, "samples": 9, "seed": 0})
    setting = network_setting(cell, Config())
    layer = setting.jacobian.layers[1]
    ranks, active = networks._unit_ranks(layer)
    J = dense_jacobian(setting.problem.model, setting.inputs)[:, 6 * 64 : 6 * 64 + 36].unflatten(1, (6, 6))
    assert ranks.tolist() == [int(torch.linalg.matrix_rank(J[:, unit])) for unit in range(6)]
    assert active.tolist() == [min(6, int((J[:, unit] != 0).any(1).sum())) for unit in range(6)]


def test_a_layer_that_training_deprives_of_rank_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that puts out all units of the first layer."""

    def numbing(structure: Full, setting: Setting) -> descent.Direction:
        step = descent.natural(structure, setting)
        return lambda model: {**step(model), "0.weight": model[0].weight.detach() / networks.ETA}

    monkeypatch.setattr("analyses.jacobian_rank.parts.networks.natural", numbing)
    config = Config(widths=(64,), samples=10, seeds=1, activation=("relu",))
    assert verdict_of("networks-layers", config, network="mlp", units=64).outcome == "refuted"


def test_the_needed_width_is_the_least_that_concludes() -> None:
    config = Config(seeds=1)
    (cell,) = (cell for cell in ANALYSIS.cells(config) if cell["part"] == "width" and cell["samples"] == 8)
    measured = {(row["quantity"], row["run"]): row for row in width.PART.measure(cell, config)}
    for name, run in width.RUNS.items():
        needed = measured["needed", name]["value"]
        reached = {
            m: width._concludes(setting_of(cell, config, width=m), run, least=0.1) for m in width.WIDTHS if m <= needed
        }
        assert [m for m, constant in reached.items() if constant is not None] == [needed]
    assert measured["constant", "natural"]["value"] == pytest.approx(
        width._concludes(
            setting_of(cell, config, width=measured["needed", "natural"]["value"]), width.RUNS["natural"], 0.1
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
        cells = [cell for cell in ANALYSIS.cells(config) if cell["part"] in ("rank", "training", "general-loss")]
        measured = {
            cell: ANALYSIS.measure(cell, config) for cell in cells if cell.coordinates.get("network") in (None, "own")
        }
    assert len(measured) > 5
    assert "P = 3 parameters, fewer than its R = 8 rows" in caplog.text
    quantities = {row["quantity"] for rows in measured.values() for row in rows}
    assert "excess_uncovered" in quantities
    assert not quantities & {"excess_in_ball", "constant_trajectory", "movement_ratio"}


def test_claims_have_distinct_ids_sources_and_cells() -> None:
    config = Config()
    claims, cells = ANALYSIS.claims(config), ANALYSIS.cells(config)
    assert len({claim.id for claim in claims}) == len(claims)
    assert len({cell.key for cell in cells}) == len(cells)
    for claim in claims:
        assert "Zhang, Martens & Grosse 2019" in claim.source
        assert any(claim.needs(cell) for cell in cells), claim.id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"activation": ("rel",)}, "Did you mean 'relu'"),
        ({"widths": (0,)}, "--widths"),
        ({"samples": 1}, "--samples"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
