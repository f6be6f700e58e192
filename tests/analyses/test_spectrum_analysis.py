"""The spectrum analysis: its command line on a small real instance, and its measurements against dense matrices."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.spectrum import ANALYSIS
from analyses.spectrum.config import HESSIAN, Config
from analyses.spectrum.measure import WHOLE, Restricted, measure, operator_of, problem_of
from curvlab import spectrum
from curvlab.spectrum import Operator
from curvlab.study import Cell, Context, judge, main
from curvlab.study.cache import CellCache

SMALL = Config(width=6, structures=("full", "kfac"), seeds=2, top=3, steps=2, probes=2, lanczos=12)


def observed(matrix: str, seed: int = 0) -> pd.DataFrame:
    """What is measured of a matrix at a seed."""
    cell = Cell({"experiment": "spectra", "problem": "digits", "matrix": matrix, "seed": seed})
    return pd.DataFrame(measure(cell, Context(SMALL, cell, CellCache(Path(), {}), {})))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    options = ["--width", "6", "--structures", "full", "kfac", "--seeds", "3", "--top", "3", "--probes", "2"]
    options += ["--lanczos", "12", "--workers", "1", "--results", str(results)]
    assert main(ANALYSIS, options) == 0
    return results / "spectrum" / "latest"


def test_the_command_ends_with_verdicts_and_files(folder: Path) -> None:
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(ANALYSIS.figures)
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in verdicts}
    assert outcomes["largest-full"] == "supported"
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["matrix"]) == {"hessian", "ggn", "full", "kfac"}
    assert set(table["layer"].dropna()) == {WHOLE, "0", "2", "4"}


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "kfac"])
def test_measurements_are_those_of_the_dense_matrix(matrix: str) -> None:
    rows = observed(matrix)
    whole = operator_of(matrix, problem_of(SMALL, 0))
    names = list(whole.space.shapes)
    for layer, dense in ((WHOLE, whole.to_dense()), ("0", Restricted(whole, names[:1]).to_dense())):
        values = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)[:3].numpy()
        found = rows[(rows["quantity"] == "eigenvalue") & (rows["layer"] == layer)].sort_values("index")
        assert found["value"].to_numpy() == pytest.approx(values, rel=1e-3, abs=1e-3 * values[0])
        (trace,) = rows[(rows["quantity"] == "trace") & (rows["layer"] == layer)].to_dict("records")
        assert abs(trace["value"] - float(dense.trace())) < 6 * trace["error"] + 1e-9


def test_a_layers_block_is_that_of_the_dense_matrix() -> None:
    whole = operator_of(HESSIAN, problem_of(SMALL, 0))
    names = list(whole.space.shapes)
    sizes = [shape.numel() for shape in whole.space.shapes.values()]
    start = sum(sizes[:1])
    block = Restricted(whole, names[1:2]).to_dense()
    assert torch.allclose(block, whole.to_dense()[start : start + sizes[1], start : start + sizes[1]])


def test_the_density_integrates_to_one() -> None:
    rows = observed("ggn")
    density = rows[rows["quantity"] == "density"].sort_values("place")
    scale = 1e-3 * rows.loc[rows["quantity"] == "eigenvalue", "value"].max()
    axis = np.arcsinh(density["eigenvalue"] / scale)
    assert np.trapezoid(density["value"], axis) == pytest.approx(1.0, abs=0.02)
    assert axis.min() == 0, "a positive matrix has nothing below 0"
    hessian = observed(HESSIAN)
    assert hessian.loc[hessian["quantity"] == "density", "eigenvalue"].min() < 0


def test_probes_are_the_same_for_every_matrix_and_others_at_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def traced(operator: Operator, *, products: int, generator: torch.Generator) -> spectrum.Estimate:
        drawn.append(float(torch.randn(1, generator=generator)))
        return spectrum.Estimate(1.0, 0.0, products)

    monkeypatch.setattr(spectrum, "trace", traced)
    for matrix, seed in (("ggn", 0), ("kfac", 0), ("ggn", 1)):
        observed(matrix, seed)
    first, second, third = np.array(drawn).reshape(3, -1).tolist()
    assert first == second
    assert not set(first) & set(third)
    assert len(set(first)) == 4, "every layer has its own"


def test_bounds_on_largest_eigenvalues_can_be_broken() -> None:
    """A structure above the Gauss–Newton matrix, and one below a third of it, of three layers."""
    claims = {claim.id: claim for claim in ANALYSIS.claims(Config(structures=("block-diagonal", "ekfac")))}
    columns = {"quantity": "eigenvalue", "index": 1, "seed": 0}
    layers = [{**columns, "matrix": "ggn", "layer": name, "value": 1.0} for name in (WHOLE, "0", "2", "4")]

    def outcomes(block_diagonal: float, ekfac: float) -> list[str]:
        found = {"block-diagonal": block_diagonal, "ekfac": ekfac}
        rows = [{**columns, "matrix": name, "layer": WHOLE, "value": value} for name, value in found.items()]
        judged = judge([claims["largest-compressed"], claims["largest-blocks"]], pd.DataFrame(layers + rows))
        return [verdict.outcome for verdict in judged]

    assert outcomes(0.5, 0.4) == ["supported", "supported"]
    assert outcomes(0.5, 1.01) == ["refuted", "supported"]
    assert outcomes(0.3, 0.2) == ["supported", "refuted"]


def test_steps_descend() -> None:
    trained, start = problem_of(SMALL, 1), problem_of(Config(width=6), 1)
    before, after = (float(p.loss(p.model(p.train[0]), p.train[1]).detach()) for p in (start, trained))
    assert after < before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"structures": ("kfacc",)}, "Did you mean 'kfac'"), ({"probes": 1}, "--probes"), ({"steps": -1}, "--steps")],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
