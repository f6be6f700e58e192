"""The isotropy analysis: its command line on a small real instance, and its power to refute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.ntk_isotropy import ANALYSIS
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.parts import PARTS
from analyses.ntk_isotropy.parts.response import measured_response, probes
from analyses.ntk_isotropy.setting import make, setting_of
from curvlab.fisher import LayerWise
from curvlab.study import Cell, judge

SMALL = (
    "--widths", "128", "144", "--seeds", "3", "--structures", "full", "block-diagonal", "block-tridiagonal", "kfac",
    "--other-depths", "5", "--other-activations", "--other-kinds", "--step-scales", "2.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "analyses.ntk_isotropy", *SMALL, "--results", str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done, results / "ntk_isotropy" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "Redraw:" in done.stdout
    for name in ("config.json", "environment.json", "measurements.parquet", "verdicts.json", "report.md", "log.txt"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "figures").glob("*.pdf"))


def test_identities_are_supported_and_known_failures_refuted(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    verdicts = json.loads((run[1] / "verdicts.json").read_text())
    table = verdicts if isinstance(verdicts, list) else verdicts["verdicts"]
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in table}
    for claim in (
        "isotropic-full",
        "isotropic-block-diagonal",
        "isotropic-block-tridiagonal",
        "test-response-full",
        "linear-training-full",
        "damping-linear",
        "gradient-descent-linear",
        "tridiagonal-damped-test",
        "kfac-leverage",
        "kfac-forster",
    ):
        assert outcomes[claim] == "supported", claim
    assert outcomes["kfac-published-alpha"] == "refuted"
    assert "supported" not in {outcome for claim, outcome in outcomes.items() if claim == "unit-wise-alpha"}


def test_measurements_are_one_row_an_observation(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    table = pd.read_parquet(run[1] / "measurements.parquet")
    assert {"part", "structure", "width", "depth", "seed", "quantity", "value"} <= set(table.columns)
    assert set(table["part"]) == set(PARTS)
    alphas = table[
        (table["quantity"] == "alpha") & (table["structure"] == "block-diagonal") & (table["kind"] == "exact")
    ]
    assert alphas["value"].to_numpy() == pytest.approx(alphas["depth"].to_numpy(), rel=1e-6)


def test_a_wrong_structure_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An isotropy claim must fail where the structure is not what it claims to be."""
    config = Config(widths=(64,), seeds=2, structures=("block-diagonal",))
    crooked = [[1.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 1.0]]
    monkeypatch.setattr("analyses.ntk_isotropy.parts.response.make", lambda *_: LayerWise(crooked))
    part = PARTS["response"]
    (claim,) = (claim for claim in part.claims(config) if claim.id == "isotropic-block-diagonal")
    cells = [cell for cell in part.cells(config) if claim.needs(cell) and cell["depth"] == 3]
    rows = [{**cell.coordinates, **row} for cell in cells for row in part.measure(cell, config)]
    (verdict,) = judge([claim], _table(rows, cells))
    assert verdict.outcome == "refuted"


def _table(rows: list[dict[str, object]], cells: list[Cell]) -> pd.DataFrame:
    from curvlab.study.measurements import normalise, tabulate

    grouped = {
        cell: normalise(cell, [
            {k: v for k, v in row.items() if k not in cell.coordinates}
            for row in rows
            if all(row[name] == value for name, value in cell.coordinates.items())
        ])
        for cell in cells
    }  # fmt: skip
    return tabulate(grouped)


@pytest.mark.parametrize(
    "structure", ["full", "block-diagonal", "block-tridiagonal", "layer-wise", "kfac", "unit-wise"]
)
def test_the_measured_response_is_the_dense_one(structure: str) -> None:
    config = Config(widths=(12,), seeds=1)
    cell = Cell({"width": 12, "depth": 3, "activation": "erf", "outputs": 1, "seed": 0})
    setting = setting_of(cell, config)
    built = make(structure, setting.depth).update(setting.rows)
    directions = probes(setting, 0)
    shares, tested = measured_response(built, setting, directions)
    J, test = setting.jacobian.dense(), setting.test_jacobian.dense()
    inverse = torch.linalg.pinv(built.to_dense(), rtol=1e-13, hermitian=True)
    expected = directions @ J @ inverse @ J.T / setting.samples
    assert torch.allclose(shares.sum(0), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    expected = directions @ J @ inverse @ test.T / setting.samples
    assert torch.allclose(tested, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_networks_short_of_rank_do_not_count_against_kfac() -> None:
    """At width 16 fewer units than samples leave a factor of every hidden layer short of rank."""
    config = Config(widths=(16,), seeds=1, structures=("kfac",))
    claims = [claim for part in ("steps", "inputs") for claim in PARTS[part].claims(config)]
    wanted = [claim for claim in claims if claim.id in ("linear-training-kfac", "kfac-leverage", "kfac-forster")]
    cells = [
        cell
        for part in ("steps", "inputs")
        for cell in PARTS[part].cells(config)
        if cell.coordinates.get("scale", 1.0) == 1.0
    ]
    rows = [{**cell.coordinates, **row} for cell in cells for row in PARTS[str(cell["part"])].measure(cell, config)]
    verdicts = judge(wanted, _table(rows, cells))
    assert len(verdicts) == 3
    for verdict in verdicts:
        assert verdict.outcome == "inconclusive", verdict
        assert "short_of_rank" in verdict.note


def test_claims_have_distinct_ids_sources_and_cells() -> None:
    config = Config()
    claims = ANALYSIS.claims(config)
    cells = ANALYSIS.cells(config)
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert any(claim.needs(cell) for cell in cells), claim.id
        assert claim.quantities, claim.id


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="Did you mean 'kfac'"):
        Config(structures=("kfacs",))
    with pytest.raises(ValueError, match="--other-depths"):
        Config(other_depths=(1,))
    with pytest.raises(ValueError, match="Did you mean 'tanh'"):
        Config(activation="tanhh")


def test_the_papers_own_width_is_kept() -> None:
    assert Config(problem="karakida-osawa").swept_widths == (4096,)
    assert Config().swept_widths == (128, 512, 2048)
    assert Config(problem="karakida-osawa", widths=(64,)).swept_widths == (64,)


def test_a_network_whose_last_trained_layer_is_hidden_is_not_taken_for_a_plain_one() -> None:
    """K-FAC's and the units' scales hold for layers up to the outputs."""
    config = Config(problem="two-layer", seeds=1)
    setting = setting_of(Cell({"width": 16, "activation": "relu", "seed": 0}), config)
    assert not setting.plain
    assert setting.alpha("kfac") is None
    assert setting.alpha("full") == pytest.approx(1.0)
    plain = setting_of(Cell({"width": 16, "depth": 3, "activation": "relu", "outputs": 3, "seed": 0}), Config())
    assert plain.plain
