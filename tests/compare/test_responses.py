"""The linearised model in a comparison, against dense matrices."""

from math import isnan

import pytest
import torch
from comparison_cases import LOSSES, X, small_model

import curvlab
from curvlab.fisher import STRUCTURES


@pytest.mark.parametrize("name", LOSSES)
def test_the_full_matrix_is_the_reference(name: str) -> None:
    loss, y = LOSSES[name]
    found = curvlab.compare(small_model(), loss, (X, y), ["full", "block-diagonal"], 0.0, steps=0)
    table = found.table.set_index("structure")
    full, blocks = table.loc["full"], table.loc["block-diagonal"]
    assert full["alpha"] == pytest.approx(1, abs=1e-9)
    assert full["anisotropy"] < 1e-9
    assert full["cosine"] == pytest.approx(1, abs=1e-9)
    assert full["cosine"] <= 1
    assert full["eta_linear"] == pytest.approx(2, abs=1e-9)
    assert blocks["alpha"] == pytest.approx(3, abs=1e-8)
    assert blocks["anisotropy"] < 1e-8
    assert blocks["cosine"] < 0.999
    directions = 24 if name == "cross-entropy" else 36
    assert full["rank"] == directions


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_column_of_the_linearised_model_against_dense_matrices(structure: str) -> None:
    loss, y = LOSSES["half"]
    model = small_model(12)
    rho = 1e-3
    row = curvlab.compare(model, loss, (X, y), structure, rho, steps=0).table.iloc[0]
    S = curvlab.sqrt_fisher(model, loss, X, y)
    dense = S.dense()
    F = STRUCTURES[structure]().update(S).to_dense()
    inverse = torch.linalg.inv(F + rho * torch.eye(S.P, dtype=F.dtype))
    response = dense @ inverse @ dense.T
    alpha = float(response.diagonal().mean())
    assert row["alpha"] == pytest.approx(alpha, rel=1e-8)
    deviation = (response - alpha * torch.eye(S.R, dtype=F.dtype)).norm() / (abs(alpha) * S.R**0.5)
    assert row["anisotropy"] == pytest.approx(float(deviation), rel=1e-7)
    top = float(torch.linalg.eigvalsh(response)[-1])
    assert row["lambda_max"] == pytest.approx(top, rel=1e-8)
    assert row["eta_linear"] == pytest.approx(2 / top, rel=1e-8)
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), parameters)])
    exact = torch.linalg.inv(dense.T @ dense + rho * torch.eye(S.P, dtype=F.dtype)) @ gradient
    step = inverse @ gradient
    assert row["cosine"] == pytest.approx(float(step @ exact / (step.norm() * exact.norm())), rel=1e-8)
    assert row["rho_rel"] == pytest.approx(rho / float(torch.linalg.eigvalsh(F)[-1]), rel=1e-8)
    assert row["seconds"] > 0
    assert isnan(row["eta"])


def test_relative_damping_is_recorded_both_ways() -> None:
    loss, y = LOSSES["mse"]
    table = curvlab.compare(
        small_model(), loss, (X, y), structures=["full", "diagonal"], damping=["rel:1e-2"], steps=0
    ).table
    assert table["damping"].tolist() == ["rel:1e-2"] * 2
    assert table["rho_rel"].tolist() == pytest.approx([1e-2, 1e-2])
    assert table["rho"].nunique() == 2
