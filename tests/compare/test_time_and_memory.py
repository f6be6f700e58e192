"""What a comparison leaves out for lack of time or memory, and the memory that it tells."""

from math import isnan

import pytest
import torch
from comparison_cases import LOSSES, X, small_model

import curvlab
from curvlab.compare import candidates
from curvlab.fisher import KFAC, Full
from curvlab.problems.vision import digits_residual_problem


def test_a_residual_network_with_batch_normalisation_answers_soon_with_all_defaults() -> None:
    """Structures that would take minutes are left out by name, and whatever there is no time for is named, too."""
    problem = digits_residual_problem(width=40, dtype=torch.float32)
    (x, y), model = problem.train, problem.model.eval()
    found = curvlab.compare(model, problem.loss, (x[:32], y[:32]), seconds=6)
    table = found.table.set_index("structure")
    assert sum(p.numel() for p in model.parameters()) > 100_000
    for name in ("layer-wise", "block-tridiagonal", "unit-wise", "component-wise"):
        assert table.loc[name, "note"].str.contains("costly at this size").all()
    assert table["note"][table["eta_linear"].isna()].str.startswith("not measured").all()
    assert table["eta_linear"].notna().any()


def test_what_there_is_no_time_for_is_named() -> None:
    loss, y = LOSSES["cross-entropy"]
    found = curvlab.compare(small_model(4), loss, (X, y), ["full", "kfac"], seconds=1e-9)
    assert found.table["note"].eq("not measured: no time was left of the 0.0 s").all()
    assert "full, kfac: not measured: no time was left of the 0.0 s." in found.text(80)
    with pytest.raises(ValueError, match="no learning rate was seen to hold for steps in a row"):
        found.best()
    assert len(found.plot().axes) == 2


def test_what_does_not_fit_is_left_out_by_name_or_refused() -> None:
    loss, y = LOSSES["half"]
    model = small_model(60)
    structures = {"whole": Full(side="parameters"), "kfac": KFAC()}
    table = curvlab.compare(model, loss, (X, y), structures, 1.0, memory="4MiB", steps=0).table.set_index("structure")
    left_out, kept = table.loc["whole"], table.loc["kfac"]
    assert left_out["note"].startswith("not measured: its matrices and their factorisation need 309.4 MiB, 3.")
    assert isnan(left_out["alpha"])
    assert kept["alpha"] > 0
    with pytest.raises(MemoryError, match=r"R = 18 rows, .* 1.0 KiB are allowed"):
        curvlab.compare(model, loss, (X, y), memory=1024)


def test_a_candidate_whose_steps_run_out_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory for a step")

    monkeypatch.setattr(candidates, "trial", fail)
    loss, y = LOSSES["half"]
    table = curvlab.compare(small_model(4), loss, (X, y), "kfac", [1.0, 2.0]).table
    assert table["note"].tolist() == ["not measured: no memory for a step"] * 2
    assert table["eta_linear"].isna().all()


def test_memory_is_that_of_the_state_in_training() -> None:
    """Factors of K-FAC, a number a parameter of the diagonal, rows and nothing else of the full matrix on their side."""
    loss, y = LOSSES["half"]
    model = small_model(40)
    structures = ["full", "diagonal", "kfac", "ekfac"]
    table = curvlab.compare(model, loss, (X, y), structures, 1.0, steps=0).table.set_index("structure")
    P = sum(p.numel() for p in model.parameters())
    factors = 11**2 + 40**2 + 41**2 + 40**2 + 41**2 + 3**2
    rows = curvlab.sqrt_fisher(model, loss, X, y)
    numbers = table["mib"] * 2**20 / 8
    assert numbers["diagonal"] == pytest.approx(P, rel=0.01)
    assert numbers["kfac"] == pytest.approx(factors, rel=0.01)
    assert factors <= numbers["ekfac"] <= factors + 2 * P
    assert numbers["full"] == pytest.approx(sum(f.numel() for layer in rows.layers for f in layer.factors), rel=0.01)
    assert (table["peak_mib"] > 0).all()
    assert table.loc["kfac", "peak_mib"] > table.loc["diagonal", "mib"]
