"""Trace and diagonal against dense matrices."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import DOUBLE
from torch import Tensor

from curvlab.spectrum import DenseOperator, diagonal, trace
from curvlab.testing.oracle import assert_close


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))[0]
    return (Q * values) @ Q.T


def decaying(n: int = 200) -> Tensor:
    return symmetric(0.9 ** torch.arange(n, dtype=DOUBLE))


SPECTRA = {
    "decaying": 0.9 ** torch.arange(150, dtype=DOUBLE),
    "flat": torch.linspace(1, 2, 150, dtype=DOUBLE),
    "indefinite": torch.linspace(-1, 2, 150, dtype=DOUBLE),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_unbiased_with_honest_errors(name: str) -> None:
    A = symmetric(SPECTRA[name])
    sources = [torch.Generator().manual_seed(seed) for seed in range(60)]
    traces = [trace(DenseOperator(A), products=40, generator=source) for source in sources]
    errors = torch.tensor([found.value - float(A.trace()) for found in traces], dtype=DOUBLE)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / 60**0.5
    claimed = torch.tensor([found.standard_error for found in traces], dtype=DOUBLE).square().mean().sqrt()
    assert 0.5 < float(claimed / errors.std()) < 1.5
    diagonals = [diagonal(DenseOperator(A), products=40, generator=source) for source in sources]
    off = torch.stack([found.value - A.diagonal() for found in diagonals])
    assert float((off.mean(0).abs() * 60**0.5 / off.std(0)).max()) < 5
    claimed = torch.stack([found.standard_error for found in diagonals]).square().mean().sqrt()
    assert 0.7 < float(claimed / off.square().mean().sqrt()) < 1.4


def test_much_better_than_plain_probes_where_the_spectrum_decays() -> None:
    A = decaying()
    found = trace(DenseOperator(A), products=80)
    probes = torch.randn(80, 200, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).sign()
    plain = float(((probes @ A) * probes).sum(1).std()) / 80**0.5
    assert found.products == 80
    assert found.standard_error < plain / 20
    assert abs(found.value - float(A.trace())) < 5 * found.standard_error


@settings(max_examples=25)
@given(rank=st.integers(0, 6), n=st.integers(20, 60), seed=st.integers(0, 2**20))
@example(rank=1, n=53, seed=955)
def test_a_low_rank_is_exact(rank: int, n: int, seed: int) -> None:
    values = torch.zeros(n, dtype=DOUBLE)
    values[:rank] = torch.arange(1, rank + 1, dtype=DOUBLE) * (-1) ** torch.arange(rank)
    A = symmetric(values, seed)
    found = trace(DenseOperator(A), products=16)
    assert found.value == pytest.approx(float(values.sum()), abs=1e-10)
    assert found.standard_error == 0
    each = diagonal(DenseOperator(A), products=16)
    assert float((each.value - A.diagonal()).abs().max()) < 1e-10
    assert float(each.standard_error.max()) == 0


def test_a_long_tail_of_small_eigenvalues_counts() -> None:
    n = 4000
    values = 1e-5 * torch.linspace(0, 2, n)
    values[0] = 1
    A = torch.diag(values)
    found = trace(DenseOperator(A), products=16)
    assert found.standard_error > 0
    assert abs(found.value - float(values.sum())) < 5 * found.standard_error
    each = diagonal(DenseOperator(A), products=16)
    assert float(each.standard_error[1:].min()) > 0


@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_enough_products_are_exact(estimate: Any) -> None:
    A = decaying(30)
    found = estimate(DenseOperator(A), products=30)
    assert found.products == 30
    if estimate is trace:
        assert (found.value, found.standard_error) == (pytest.approx(float(A.trace())), 0)
    else:
        assert_close(found.value, A.diagonal())
        assert float(found.standard_error.max()) == 0


@pytest.mark.parametrize("products", [10, 40])
@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_a_product_that_is_not_finite(estimate: Any, products: int) -> None:
    A = decaying(30)
    A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"product with .* is not finite"):
        estimate(DenseOperator(A), products=products)


@pytest.mark.parametrize("estimate", [trace, diagonal])
def test_too_few_products(estimate: Any) -> None:
    with pytest.raises(ValueError, match="products must be at least 4, got 3"):
        estimate(DenseOperator(decaying()), products=3)
