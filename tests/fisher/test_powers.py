"""Powers of every structure against the eigendecomposition of its dense matrix."""

from typing import Any

import pytest
import torch
from fisher_cases import NETWORKS, case, draw
from fisher_oracle import SPECS, build, positions
from oracle import DOUBLE
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.errors import NotPositiveDefinite, OutsideRange
from curvlab.fisher.block import Block
from curvlab.fisher.diagonal import DiagonalBlock
from curvlab.rows import Rows, sqrt_fisher
from curvlab.testing.oracle import assert_close

POWERS = (0.25, 0.5, 1.0, 2.0)
INDEFINITE = [spec for spec in SPECS if "tridiagonal" in spec]
SPLIT = {f"kfac-split-{sharing}": {"factored_damping": True, "sharing": sharing} for sharing in ("expand", "reduce")}


def function(dense: Tensor, of: Any, null: float = 1e-10) -> Tensor:
    """Return f(F), 0 on null directions."""
    values, vectors = torch.linalg.eigh(dense)
    kept = values > null * values.max()
    return vectors @ (torch.where(kept, of(torch.where(kept, values, 1)), 0)[:, None] * vectors.T)


def damped(dense: Tensor, of: Any, null: float = 1e-10) -> Tensor:
    """Return f(F), f(0) on null directions."""
    values, vectors = torch.linalg.eigh(dense)
    return vectors @ (of(torch.where(values > null * values.max(), values, 0))[:, None] * vectors.T)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in INDEFINITE])
def test_powers_are_those_of_the_dense_matrix(spec: str, network: str) -> None:
    data = case(network, "ce-all")
    structure = build(spec, list(positions(data.model))).update(data.rows)
    dense, v = structure.to_dense(), draw(3, data.reference.P)
    top = structure.largest_eigenvalue()
    rho = 0.01 * top
    for p in POWERS:
        assert_close(structure.matvec(v, power=p), v @ function(dense, lambda x, p=p: x**p), 1e-7)
        matrix = damped(dense, lambda x, p=p: (x + rho) ** -p)
        assert_close(structure.solve(v, rho, power=p), v @ matrix, 1e-8)
        root = damped(dense, lambda x, p=p: 1 / (x**p + rho))
        assert_close(structure.solve(v, rho, power=p, damps="power"), v @ root, 1e-7)
        relative = damped(dense, lambda x, p=p: 1 / (x**p + 0.1 * top**p))
        assert_close(structure.solve(v, "rel:0.1", power=p, damps="power"), v @ relative, 1e-7)
    half = structure.solve(structure.solve(v, rho, power=0.5), rho, power=0.5)
    assert_close(half, structure.solve(v, rho), 1e-8)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in INDEFINITE])
def test_undamped_inverse_powers_are_those_on_the_range(spec: str) -> None:
    data = case("mlp", "ce")
    structure = build(spec, list(positions(data.model))).update(data.rows)
    dense = structure.to_dense()
    # Eigenvalues far above round-off, so that all agree which directions are null.
    inside = draw(2, data.reference.P) @ dense
    for p in (0.25, 0.5, 2.0):
        found, info = structure.solve(inside, 0.0, power=p, info=True)
        assert_close(structure.matvec(found, power=p), inside, 1e-6)
        assert float(info.outside.max()) < 1e-6
        assert info.damping == 0


def test_what_lies_outside_the_range_of_a_root_is_reported() -> None:
    data = case("mlp", "ce", N=2)
    structure = cf.Full().update(data.rows)
    v = draw(data.reference.P)
    with pytest.warns(OutsideRange, match="outside the range of the undamped full structure"):
        structure.solve(v, 0.0, power=0.5)


@pytest.mark.parametrize("name", SPLIT)
def test_split_damping_has_the_powers_of_its_damped_factors(name: str) -> None:
    data = case("cnn", "mse")
    structure = cf.KFAC(**SPLIT[name]).update(data.rows)
    v = draw(2, data.reference.P)
    inverse = structure.solve(torch.eye(data.reference.P, dtype=DOUBLE), 0.1)
    for p in (0.25, 0.5, 2.0):
        expected = v @ damped((inverse + inverse.T) / 2, lambda x, p=p: x**p)
        assert_close(structure.solve(v, 0.1, power=p), expected, 1e-8)


@pytest.mark.parametrize("side", ["rows", "parameters"])
def test_an_indefinite_matrix_has_whole_powers_and_damped_ones(side: Any) -> None:
    data = case("mlp", "ce-all")
    structure = cf.BlockTridiagonal(side=side).update(data.rows)
    dense, v = structure.to_dense(), draw(2, data.reference.P)
    lowest = -float(torch.linalg.eigvalsh(dense).min())
    assert lowest > 0
    with pytest.raises(NotPositiveDefinite, match=r"layers 0, 2, 4: F has the eigenvalue -.*no power 0\.5"):
        structure.matvec(v, power=0.5)
    with pytest.raises(NotPositiveDefinite, match=r"F \+ ρI has the eigenvalue -.* damps='matrix'"):
        structure.solve(v, lowest / 2, power=0.5)
    assert_close(structure.matvec(v, power=2.0), v @ dense @ dense, 1e-9)
    rho = 2 * lowest
    values, vectors = torch.linalg.eigh(dense)
    expected = v @ (vectors @ ((values + rho) ** -0.5)[:, None].mul(vectors.T))
    assert_close(structure.solve(v, rho, power=0.5), expected, 1e-8)


def test_adam_and_shampoo_are_powers() -> None:
    """`g/(√v + ε)` with the diagonal of one row, and `L^{-1/4} G R^{-1/4}` with the factors of one."""
    model = nn.Linear(3, 2, bias=False).double()
    x, loss = draw(1, 3), nn.MSELoss()
    rows = sqrt_fisher(model, loss, x, draw(1, 2), "empirical")
    g, eps = draw(2, 3), 1e-3
    diagonal = cf.Diagonal().update(rows)
    v = diagonal.to_dense().diagonal().view(2, 3)
    found = diagonal.solve({"weight": g}, eps, power=0.5, damps="power")["weight"]
    assert_close(found, g / (v.sqrt() + eps))
    kfac = cf.KFAC(factored_damping="equal").update(rows)
    block = kfac._blocks[0]
    L, R = block.units.dense()[0], block.width.dense()[0]  # type: ignore[attr-defined]
    left, right = (damped(M + eps**0.5 * torch.eye(len(M), dtype=DOUBLE), lambda x: x**-0.25) for M in (L, R))
    assert_close(kfac.solve({"weight": g}, eps, power=0.25)["weight"], left @ g @ right, 1e-10)


class Blind(DiagonalBlock):
    """A block whose author has implemented no powers."""

    transform = Block.transform


class BlindDiagonal(cf.Diagonal):
    """A structure of such blocks."""

    key = "blind"

    def _make_blocks(self, rows: Rows) -> list[Block]:
        return [Blind(layer.name, layer.layout, None) for layer in rows.layers]


@pytest.mark.usefixtures("unchecked_types")
def test_powers_that_do_not_exist_are_refused_by_name() -> None:
    rows = case("mlp").rows
    structure, v = BlindDiagonal().update(rows), draw(rows.P)
    assert_close(structure.solve(v, 0.1), cf.Diagonal().update(rows).solve(v, 0.1))
    for verb in (lambda: structure.matvec(v, power=0.5), lambda: structure.solve(v, 0.1, power=2.0)):
        with pytest.raises(
            NotImplementedError,
            match=r"Blind of layers 0 has no power but the first.*Use another.*implement Block\.transform",
        ):
            verb()
    full = cf.Full().update(rows)
    for power in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="power is a finite number > 0"):
            full.matvec(v, power=power)
        with pytest.raises(ValueError, match="power is a finite number > 0"):
            full.solve(v, 0.1, power=power)
    with pytest.raises(ValueError, match=r"Unknown damps 'powers'\. Did you mean 'power'\?"):
        full.solve(v, 0.1, damps="powers")


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in INDEFINITE])
def test_the_response_of_a_power_is_that_of_the_dense_matrix(spec: str, network: str) -> None:
    data = case(network, "ce-all")
    structure = build(spec, list(positions(data.model))).update(data.rows)
    dense, J, (elsewhere, other) = structure.to_dense(), data.reference.rows_of_J(), data.elsewhere
    rho, count = 0.01 * structure.largest_eigenvalue(), data.reference.count
    inverse = damped(dense, lambda x: (x + rho) ** -0.5)
    assert_close(structure.response(data.rows.jacobian(), rho, power=0.5), J @ inverse @ J.T / count, 1e-7)
    inverse = damped(dense, lambda x: 1 / (x**0.25 + rho))
    found = structure.response(data.rows.jacobian(), rho, test=elsewhere, power=0.25, damps="power")
    assert_close(found, other @ inverse @ J.T / count, 1e-7)
