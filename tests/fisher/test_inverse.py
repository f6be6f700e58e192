"""Every form of an inverse against the dense one."""

import pytest
import torch
from fisher_cases import draw
from oracle import DOUBLE
from torch import Tensor

from curvlab.fisher.inverse import (
    WORTH_FORMING,
    CholeskyInverse,
    DiagonalInverse,
    Inverse,
    LowRankInverse,
    MatrixInverse,
    from_dense,
    restored,
)
from curvlab.fisher.moment import DiagonalMoment, Moment, inverses
from curvlab.testing.oracle import assert_close

D = 9


def moment(groups: int, rows: int) -> Moment:
    found = Moment(None)
    found.update(draw(groups, rows, 1, D), 3.0, 0.0)
    return found


def diagonal() -> DiagonalMoment:
    found = DiagonalMoment()
    found.update(draw(1, D).square(), 3.0, 0.0)
    return found


CASES = {
    "few rows": (moment(1, 3), LowRankInverse),
    "few rows, groups": (moment(2, 3), LowRankInverse),
    "more rows": (moment(1, 6), MatrixInverse),
    "matrix": (moment(1, 20), CholeskyInverse),
    "matrix, groups": (moment(2, 20), MatrixInverse),
    "diagonal": (diagonal(), DiagonalInverse),
}


def made(name: str, uses: int = 1) -> tuple[Inverse, Tensor]:
    factor, form = CASES[name]
    rho = torch.tensor([0.3, 0.7], dtype=DOUBLE)[: factor.shape[0]]
    (inverse,) = inverses([(factor, rho)], uses)
    assert type(inverse) is form
    dense = factor.dense() if isinstance(factor, Moment) else torch.diag_embed(factor.basis.values)
    return inverse, torch.linalg.inv(dense + rho[:, None, None] * torch.eye(D, dtype=DOUBLE))


@pytest.mark.parametrize("blocks", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, blocks: tuple[int, ...]) -> None:
    inverse, dense = made(name)
    x = draw(*blocks, len(dense), 4, D)
    assert_close(inverse.times_rows(x), x @ dense)
    assert_close(inverse.times_columns(x.mT.contiguous()), dense @ x.mT)
    assert_close(inverse.times_columns(x.mT), dense @ x.mT)
    whole = inverse.dense()
    assert_close(whole if whole.ndim == 3 else torch.diag_embed(whole), dense)
    assert_close(from_dense(whole).times_rows(x), x @ dense)


@pytest.mark.parametrize("name", CASES)
def test_state(name: str) -> None:
    inverse, dense = made(name)
    x = draw(len(dense), 4, D)
    inverse.times_rows(x)
    again = restored(inverse.state())
    assert type(again) is type(inverse)
    for _ in range(2 * WORTH_FORMING * D // 4):
        assert torch.equal(again.times_rows(x), inverse.times_rows(x))


def test_many_vectors_form_the_inverse() -> None:
    inverse, dense = made("matrix")
    assert isinstance(inverse, CholeskyInverse)
    x = draw(1, D, D)
    for _ in range(WORTH_FORMING - 1):
        assert_close(inverse.times_rows(x), x @ dense)
        assert inverse.matrix is None
    assert_close(inverse.times_columns(x), dense @ x)
    assert inverse.matrix is not None
    assert_close(inverse.matrix, dense)
    assert_close(inverse.times_rows(x), x @ dense)


@pytest.mark.parametrize(("uses", "forms"), [(WORTH_FORMING * D - 1, False), (WORTH_FORMING * D, True)])
def test_many_uses_form_the_inverse_at_once(uses: int, forms: bool) -> None:
    inverse, dense = made("matrix", uses)
    assert isinstance(inverse, CholeskyInverse)
    x = draw(1, 1, D)
    assert_close(inverse.times_rows(x), x @ dense)
    assert (inverse.matrix is not None) == forms


@pytest.mark.parametrize("uses", [1, 1000])
def test_memory_wider_than_the_factor(uses: int) -> None:
    """Of 300 columns in single precision, rows lie 304 entries apart."""
    factor = Moment(None)
    factor.update(draw(1, 400, 1, 300).float(), 400.0, 0.0)
    (inverse,) = inverses([(factor, torch.tensor([0.1]))], uses)
    assert isinstance(inverse, CholeskyInverse)
    assert inverse.triangle is not None
    assert inverse.triangle.shape[-1] == 304
    dense = torch.linalg.inv(factor.dense().double() + 0.1 * torch.eye(300, dtype=DOUBLE))
    x = draw(1, 5, 300).float()
    torch.testing.assert_close(inverse.times_rows(x).double(), x.double() @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse.dense().double(), dense, rtol=1e-4, atol=1e-4)
