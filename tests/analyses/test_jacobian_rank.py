"""The Jacobian-rank analysis: its command line on a small real instance, its measurements, and its power to refute."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from oracle import assert_close, dense_jacobian

from analyses.jacobian_rank import ANALYSIS, descent
from analyses.jacobian_rank.config import Config
from analyses.jacobian_rank.figures import FIGURES
from analyses.jacobian_rank.parts import PARTS
from analyses.jacobian_rank.setting import Setting, setting_of
from curvlab.fisher import Full
from curvlab.nn import HalfSquaredError, TwoLayer
from curvlab.problems import Problem
from curvlab.study import Cell, Verdict, judge
from curvlab.study.measurements import normalise, tabulate

SMALL = ("--widths", "64", "256", "--seeds", "3", "--samples", "12", "--structures", "full", "kfac")
IDENTITIES = (
    "rank-initial", "rank-duplicated", "rank-parallel", "rank-networks", "rank-layers", "rank-training", "rate-linear",
    "modes-damped", "kfac-leverages", "general-newton", "response-rank-full", "trained-redundant", "trained-jacobian",
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
    point = descent.inspect(model, setting)
    assert point.change == pytest.approx(float(torch.linalg.matrix_norm(difference, 2)), rel=1e-8)
    assert point.change_frobenius == pytest.approx(float(difference.norm()), rel=1e-8)
    assert point.deficiency == 0


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
