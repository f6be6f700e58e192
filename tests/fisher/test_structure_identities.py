"""Structures held against each other and against the Hessian, on models for which theory says that they agree."""

import pytest
import torch
from fisher_cases import case, draw
from fisher_oracle import DOUBLE, build, positions, reference, sigma_of
from torch import Tensor, nn
from torch.func import functional_call, hessian

import curvlab.fisher as cf
from curvlab.nn import HalfSquaredError
from curvlab.rows import sqrt_fisher
from curvlab.testing.oracle import assert_close


def hessian_of(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = hessian(lambda p: loss(functional_call(model, p, (x,)), y))(parameters)
    sizes = [p.numel() for p in parameters.values()]
    rows = [
        torch.cat([blocks[a][b].reshape(m, n) for b, n in zip(parameters, sizes, strict=True)], dim=1)
        for a, m in zip(parameters, sizes, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("loss", [nn.MSELoss(), HalfSquaredError(), nn.MSELoss(reduction="sum")])
def test_one_linear_layer_all_blocks_are_the_hessian(loss: nn.Module) -> None:
    model = nn.Linear(3, 2).double()
    x, y = draw(5, 3), draw(5, 2, seed=1)
    rows, H = sqrt_fisher(model, loss, x, y), hessian_of(model, loss, x, y)
    for key in ("full", "block-diagonal", "block-tridiagonal", "layer-wise", "kfac", "ekfac", "unit-wise"):
        assert_close(cf.make(key).update(rows).to_dense(), H)


def test_full_is_the_hessian_of_a_softmax_regression() -> None:
    model = nn.Linear(3, 4).double()
    x, y, loss = draw(5, 3), torch.tensor([0, 1, 2, 3, 0]), nn.CrossEntropyLoss(label_smoothing=0.1)
    H = hessian_of(model, loss, x, y)
    assert_close(cf.Full().update(sqrt_fisher(model, loss, x, y)).to_dense(), H)


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("loss", [nn.MSELoss(), HalfSquaredError(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_is_block_diagonal_on_a_deep_linear_network(loss: nn.Module, sharing: str) -> None:
    """The output derivatives of a linear network are those of every sample, so B ⊗ A is exact."""
    rows = sqrt_fisher(deep_linear(), loss, draw(6, 3), draw(6, 2, seed=1))
    exact = cf.BlockDiagonal().update(rows).to_dense()
    assert_close(cf.KFAC(sharing=sharing).update(rows).to_dense(), exact)
    assert_close(cf.EKFAC(sharing=sharing).update(rows).to_dense(), exact)


def test_kfac_expand_and_reduce_are_exact_where_they_should_be() -> None:
    """Linear layers on T positions: expand is exact if every position has its own target, reduce for their mean.

    Source: Eschenhagen et al. 2023, propositions 1 and 2.
    """
    T, N = 3, 4
    x = draw(N, T, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()

    class PerPosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mT

    class Mean(PerPosition):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mean(1)

    for network, targets, right, wrong in (
        (PerPosition(), draw(N, 2, T), "expand", "reduce"),
        (Mean(), draw(N, 2), "reduce", "expand"),
    ):
        rows = sqrt_fisher(network, HalfSquaredError(), x, targets)
        exact = cf.BlockDiagonal().update(rows).to_dense()
        assert_close(cf.KFAC(sharing=right).update(rows).to_dense(), exact)
        other = cf.KFAC(sharing=wrong).update(rows).to_dense()
        assert float((other - exact).norm()) > 0.1 * float(exact.norm())


@pytest.mark.parametrize("network", ["mlp", "cnn", "sequence"])
def test_the_layer_wise_family_contains_its_special_cases(network: str) -> None:
    data = case(network, "mse")
    for key, sigma in (
        ("full", lambda L: torch.ones(L, L)),
        ("block-diagonal", lambda L: torch.eye(L)),
        ("block-tridiagonal", lambda L: torch.ones(L, L).triu(-1).tril(1)),
    ):
        for side in ("rows", "parameters"):
            family = cf.LayerWise(sigma, side=side).update(data.rows)
            assert_close(family.to_dense(), cf.make(key).update(data.rows).to_dense())
    fixed = sigma_of(len(data.reference.layers))
    assert_close(
        cf.LayerWise(fixed.tolist()).update(data.rows).to_dense(), cf.LayerWise(sigma_of).update(data.rows).to_dense()
    )


def test_the_undamped_family_is_isotropic_on_a_wide_network() -> None:
    """J F_Σ⁺ Jᵀ/N = 1ᵀΣ⁻¹1 · I where every layer's Gram matrix is invertible (Karakida & Osawa 2020)."""
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 2)).double()
    rows = sqrt_fisher(model, HalfSquaredError(), draw(5, 6), draw(5, 2))
    structure = cf.LayerWise(sigma_of).update(rows)
    alpha = float(torch.linalg.inv(sigma_of(3)).sum())
    expected = alpha * torch.eye(10, dtype=DOUBLE)
    assert_close(structure.response(rows.jacobian(), 0.0), expected, 1e-14 * structure.condition_number())


def test_ekfac_has_the_trace_of_the_blocks_and_is_the_best_diagonal() -> None:
    """In a fixed basis the diagonal minimises the Frobenius distance to the exact blocks (George et al. 2018)."""
    for network in ("mlp", "cnn", "sequence"):
        rows = case(network, "ce").rows
        exact = cf.BlockDiagonal().update(rows)
        kfac, ekfac = cf.KFAC().update(rows), cf.EKFAC().update(rows)
        assert ekfac.trace() == pytest.approx(exact.trace())
        distance = [float((s.to_dense() - exact.to_dense()).norm()) for s in (ekfac, kfac)]
        assert distance[0] < distance[1]


@pytest.mark.parametrize("spec", ["full", "block-diagonal", "unit-wise", "diagonal", "kfac", "ekfac", "layer-wise"])
def test_structures_are_positive_semi_definite(spec: str) -> None:
    structure = build(spec, []).update(case("sequence", "ce-all", kind="empirical").rows)
    values = structure.eigvalsh()
    assert float(values.min()) >= -1e-12 * float(values.max())


def test_both_sides_agree_on_singular_and_regular_systems() -> None:
    data = case("mlp", "ce-all")
    g = data.rows.rmatvec(draw(data.rows.R))
    for key in ("full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise"):
        rows, parameters, auto = (cf.make(key, side=side).update(data.rows) for side in ("rows", "parameters", "auto"))
        for rho in (0.3, "rel:1e-3", 0.0):
            expected = rows.space.flatten(rows.solve(g, rho))
            tolerance = 1e-9 if rho else 1e-13 * rows.condition_number()
            for other in (parameters, auto):
                assert_close(other.space.flatten(other.solve(g, rho)), expected, tolerance)
        if key != "unit-wise":  # whose row side counts the inputs' condition alone
            assert parameters.condition_number() == pytest.approx(rows.condition_number(), rel=1e-4)


def test_reference_merges_like_the_rows() -> None:
    """The oracle itself: its F is the moment of the rows."""
    data = case("cnn", "mse")
    S = data.rows.dense()
    assert_close(data.reference.F, S.T @ S)
    again = reference(data.model, data.loss, data.inputs, data.targets)
    assert [len(names) for names in again.names] == [len(layer.layout.slots) for layer in data.rows.layers]
    assert list(positions(data.model)) == list(data.rows.space.shapes)
