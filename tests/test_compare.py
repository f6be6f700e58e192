"""The comparison table, against dense constructions."""

import pytest
import torch
from torch import nn

import curvlab
from curvlab.fisher import STRUCTURES, BlockDiagonal, Diagonal, Full
from curvlab.nn import HalfSquaredError


def _model(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    ).double()


X = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LOSSES = {
    "mse": (nn.MSELoss(), torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))),
    "half": (HalfSquaredError(), torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))),
    "sum": (nn.MSELoss(reduction="sum"), torch.zeros(12, 3, dtype=torch.float64)),
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(12) % 3),
    "bce": (nn.BCEWithLogitsLoss(), (torch.arange(36) % 2).double().view(12, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_full_matrix_is_the_reference(name: str) -> None:
    loss, y = LOSSES[name]
    table = curvlab.compare(_model(), loss, (X, y), structures=["full", "block-diagonal"], damping=[0.0]).set_index(
        "structure"
    )
    full, blocks = table.loc["full"], table.loc["block-diagonal"]
    assert full["alpha"] == pytest.approx(1, abs=1e-9)
    assert full["anisotropy"] < 1e-9
    assert full["cosine"] == pytest.approx(1, abs=1e-9)
    assert full["eta_max"] == pytest.approx(2, abs=1e-9)
    assert blocks["alpha"] == pytest.approx(3, abs=1e-8)
    assert blocks["anisotropy"] < 1e-8
    assert blocks["cosine"] < 0.999
    directions = 24 if name == "cross-entropy" else 36
    assert full["rank"] == directions


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_column_against_dense_matrices(structure: str) -> None:
    loss, y = LOSSES["half"]
    model = _model(12)
    rho = 1e-3
    row = curvlab.compare(model, loss, (X, y), structures=[structure], damping=[rho]).iloc[0]
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
    assert row["eta_max"] == pytest.approx(2 / top, rel=1e-8)
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X), y), parameters)])
    exact = torch.linalg.inv(dense.T @ dense + rho * torch.eye(S.P, dtype=F.dtype)) @ gradient
    step = inverse @ gradient
    assert row["cosine"] == pytest.approx(float(step @ exact / (step.norm() * exact.norm())), rel=1e-8)
    assert row["rho_rel"] == pytest.approx(rho / float(torch.linalg.eigvalsh(F)[-1]), rel=1e-8)
    assert row["seconds"] > 0
    assert row["mib"] > 0


def test_relative_damping_is_recorded_both_ways() -> None:
    loss, y = LOSSES["mse"]
    table = curvlab.compare(_model(), loss, (X, y), structures=["full", "diagonal"], damping=["rel:1e-2"])
    assert table["damping"].tolist() == ["rel:1e-2"] * 2
    assert table["rho_rel"].tolist() == pytest.approx([1e-2, 1e-2])
    assert table["rho"].nunique() == 2


def test_structures_of_the_user_and_other_kinds() -> None:
    loss, y = LOSSES["cross-entropy"]
    halves = BlockDiagonal(partition=[["0.weight", "0.bias", "2.weight"], ["2.bias", "4.weight", "4.bias"]])
    generator = torch.Generator().manual_seed(0)
    table = curvlab.compare(
        _model(), loss, (X, y), structures={"two blocks": halves, "exact": Full()}, kind="mc", generator=generator
    )
    assert table["structure"].unique().tolist() == ["two blocks", "exact"]
    assert (table.loc[table["structure"] == "exact", "anisotropy"] > 1e-3).all(), (
        "rows of one draw are not the exact ones"
    )


def test_all_structures_that_there_are_by_then_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a user has registered since curvlab was imported, too."""
    loss, y = LOSSES["mse"]
    monkeypatch.setitem(STRUCTURES._things, "mine", Diagonal)
    table = curvlab.compare(_model(4), loss, (X, y), damping=[1.0])
    assert table["structure"].tolist() == [*STRUCTURES]
    assert "mine" in [*STRUCTURES]


def test_an_unknown_structure_is_named_with_the_nearest() -> None:
    loss, y = LOSSES["mse"]
    with pytest.raises(ValueError, match="Did you mean 'block-diagonal'"):
        curvlab.compare(_model(), loss, (X, y), structures=["blockdiagonal"])


def test_a_fisher_matrix_of_zero_is_refused() -> None:
    model = nn.Linear(10, 1).double()
    with pytest.raises(ValueError, match=r"The exact Fisher matrix of Linear and CrossEntropyLoss .* is zero"):
        curvlab.compare(model, nn.CrossEntropyLoss(), (X, torch.zeros(12, dtype=torch.long)), ["full", "kfac"])


def test_a_structure_of_rows_of_zero_is_named() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"The structure 'kfac' of rows of kind 'empirical' is zero"):
        curvlab.compare(model, nn.MSELoss(), (X, model(X).detach()), ["kfac"], kind="empirical")


def test_the_model_is_left_as_it_was() -> None:
    loss, y = LOSSES["mse"]
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curvlab.compare(model, loss, (X, y), structures=["full", "kfac"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
