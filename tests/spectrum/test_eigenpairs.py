"""Extreme eigenpairs against dense decompositions and SciPy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DOUBLE
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from curvlab.spectrum import DenseOperator, Eigenpairs, Hessian, NotConverged, eigenpairs

ENDS = ("largest", "smallest", "both")


def matrix(values: list[float], seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))[0]
    A = (Q * torch.tensor(values, dtype=DOUBLE)) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def extreme(values: list[float], k: int, which: str) -> list[float]:
    ordered = sorted(values, reverse=True)
    both = ordered if 2 * k >= len(ordered) else ordered[:k] + ordered[-k:]
    return {"largest": ordered[:k], "smallest": ordered[::-1][:k], "both": both}[which]


def check(found: Eigenpairs, A: Tensor, values: list[float], k: int, which: str, tolerance: float) -> None:
    """Check values, vectors and residuals against what they are."""
    expected = torch.tensor(extreme(values, k, which), dtype=DOUBLE)
    largest = max(map(abs, values))
    assert found.values.shape == expected.shape
    residuals = (found.vectors @ A - found.values[:, None] * found.vectors).norm(dim=1)
    assert float((residuals - found.residuals).abs().max()) <= 1e-12 * largest
    assert bool(found.converged.all())
    assert float(found.residuals.max()) <= max(tolerance, 1e-13) * largest
    assert float((found.values - expected).abs().max()) <= max(tolerance, 1e-12) * largest
    assert float((found.vectors @ found.vectors.T - torch.eye(len(expected), dtype=DOUBLE)).abs().max()) < 1e-12


SPREAD = [(-1) ** i * 0.99**i for i in range(200)]
SPECTRA = {
    "spread": SPREAD,
    "cluster": [3.0 - 1e-5 * i for i in range(4)] + [0.01 * i for i in range(150)],
    "multiple": [2.0] * 4 + [-2.0] * 3 + [0.005 * i for i in range(193)],
    "negative": [-5.0, -4.0, -3.5] + [-0.01 * i for i in range(1, 150)],
    "zero": [0.0] * 160 + [1.0, 2.0, 3.0, -1.0],
    "nothing": [0.0] * 130,
    "identity": [1.0] * 130,
    "small": [1.0, 0.5, -0.25, -0.3, 0.0, 2.0],
}


class TestAgainstDense:
    @pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
    @pytest.mark.parametrize("which", ENDS)
    @pytest.mark.parametrize("name", SPECTRA)
    def test_spectra(self, name: str, which: Any, tolerance: float) -> None:
        values = SPECTRA[name]
        A = matrix(values)
        for k in (1, 3):
            found = eigenpairs(DenseOperator(A), k, which, tolerance=tolerance)
            check(found, A, values, k, which, tolerance)

    @pytest.mark.parametrize("which", ENDS)
    @pytest.mark.parametrize("k", [1, 5, 39, 40])
    def test_up_to_the_dimension(self, which: Any, k: int) -> None:
        values = [float(np.cos(i)) for i in range(80 if which == "both" else 40)]
        A = matrix(values)
        found = eigenpairs(DenseOperator(A), k, which, tolerance=1e-10)
        check(found, A, values, k, which, 1e-10)
        assert found.products <= len(values)

    def test_no_separation_at_all(self) -> None:
        values = [0.0001 * 0.97**i for i in range(400)] + [1.0]
        A = matrix(values)
        found = eigenpairs(DenseOperator(A), 2, "smallest", tolerance=1e-12)
        check(found, A, values, 2, "smallest", 1e-12)
        assert found.products <= 3 * len(values)

    def test_restarts(self) -> None:
        values = [0.99**i for i in range(400)]
        A = matrix(values)
        for block in (1, 2, 7):
            found = eigenpairs(DenseOperator(A), 2, tolerance=1e-8, block=block)
            check(found, A, values, 2, "largest", 1e-8)
            assert found.products > 10 * block + 2, "the case needs restarts"

    @settings(max_examples=40)
    @given(
        n=st.integers(1, 40),
        k=st.integers(1, 6),
        which=st.sampled_from(ENDS),
        distinct=st.integers(1, 10),
        scale=st.floats(-8, 8),
        block=st.sampled_from([None, 3, 8]),
        seed=st.integers(0, 2**20),
    )
    def test_drawn(self, n: int, k: int, which: Any, distinct: int, scale: float, block: int | None, seed: int) -> None:
        k = min(k, max(n // 2, 1) if which == "both" else n)
        if which == "both" and n == 1:
            which = "largest"
        draw = np.random.default_rng(seed)
        values = (10**scale * draw.normal(size=distinct))[draw.integers(distinct, size=n)].tolist()
        A = matrix(values, seed)
        found = eigenpairs(DenseOperator(A), k, which, tolerance=1e-9, block=None if block is None else max(block, k))
        check(found, A, values, k, which, 1e-9)

    @pytest.mark.parametrize("which", ["largest", "smallest"])
    def test_agrees_with_scipy(self, which: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 5)).double()
        x, y = torch.randn(30, 10, dtype=DOUBLE), torch.randint(5, (30,))
        H = Hessian(model, nn.CrossEntropyLoss(), (x, y))
        found = eigenpairs(H, 4, which, tolerance=1e-7)
        theirs = eigsh(H.scipy(), k=4, which={"largest": "LA", "smallest": "SA"}[which], return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(found.values.numpy()), np.sort(theirs), rtol=1e-10)

    def test_single_precision(self) -> None:
        values = SPECTRA["spread"]
        found = eigenpairs(DenseOperator(matrix(values, dtype=torch.float32)), 2, tolerance=0.0)
        assert found.vectors.dtype == torch.float32
        assert found.values.dtype == DOUBLE
        assert bool(found.converged.all())
        assert float((found.values - torch.tensor(extreme(values, 2, "largest"), dtype=DOUBLE)).abs().max()) < 1e-5


class TestStart:
    def near(self, A: Tensor, size: float) -> DenseOperator:
        E = torch.randn(*A.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(9))
        return DenseOperator(A + size * (E + E.T) / len(A) ** 0.5)

    def test_a_result_is_its_own_start(self) -> None:
        A = DenseOperator(matrix(SPREAD))
        cold = eigenpairs(A, 2, tolerance=1e-8)
        warm = eigenpairs(A, 2, tolerance=1e-8, start=cold)
        assert (warm.products, warm.block_products) == (4, 1)
        assert warm.values.tolist() == pytest.approx(cold.values.tolist(), abs=1e-12)

    @pytest.mark.parametrize("which", ENDS)
    def test_saves_products(self, which: Any) -> None:
        A = matrix([(-1) ** i * 0.97**i for i in range(400)])
        cold = eigenpairs(DenseOperator(A), 2, which, tolerance=1e-4)
        moved = self.near(A, 1e-3)
        again, warm = (eigenpairs(moved, 2, which, tolerance=1e-4, start=start) for start in (None, cold))
        assert warm.products <= again.products / 2
        assert float((warm.values - again.values).abs().max()) < 1e-4

    def test_crossing_eigenvalues(self) -> None:
        Q = matrix([float(i) for i in range(60)])
        basis = torch.linalg.eigh(Q).eigenvectors
        found = None
        for t in np.linspace(0, 1, 11):
            values = [0.01 * i for i in range(58)] + [1.0 + t, 2.0 - t]
            A = (basis * torch.tensor(values, dtype=DOUBLE)) @ basis.T
            found = eigenpairs(DenseOperator(A), 1, tolerance=1e-6, start=found)
            assert float(found.values[0]) == pytest.approx(max(values), abs=1e-9)

    def test_plain_vectors(self) -> None:
        values = SPECTRA["cluster"]
        A = matrix(values)
        top = torch.linalg.eigh(A).eigenvectors.T.flip(0)
        of_all_lengths = torch.tensor([1e-8, 1.0, 1e8, 0.0], dtype=DOUBLE)[:, None] * top[:4]
        nothing = torch.zeros(1, len(A), dtype=DOUBLE)
        for start in (top[:1], top[:3], 5 * top[:3].repeat(2, 1), of_all_lengths, nothing, top):
            check(eigenpairs(DenseOperator(A), 3, tolerance=1e-8, start=start), A, values, 3, "largest", 1e-8)

    def test_a_start_without_the_wanted_vector(self) -> None:
        values = [4.0] + [0.01 * i for i in range(100)]
        A = matrix(values)
        wrong = torch.linalg.eigh(A).eigenvectors.T[60:61]
        check(eigenpairs(DenseOperator(A), 1, tolerance=1e-8, start=wrong), A, values, 1, "largest", 1e-8)

    def test_an_invariant_subspace_is_left(self) -> None:
        values = [4.0, 3.5, 3.0, 2.0] + [0.0] * 60
        A = matrix(values)
        found = eigenpairs(DenseOperator(A), 4, tolerance=1e-9, block=1)
        check(found, A, values, 4, "largest", 1e-9)

    def test_the_same_every_time(self) -> None:
        A = DenseOperator(matrix(SPREAD))
        torch.manual_seed(1)
        first = eigenpairs(A, 3, "both")
        torch.manual_seed(2)
        assert torch.equal(first.vectors, eigenpairs(A, 3, "both").vectors)


class TestErrors:
    A = DenseOperator(matrix(SPECTRA["small"]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"k": 0}, "There are 6 eigenpairs; k=0 with which='largest' asks for 0"),
            ({"k": 7}, "There are 6 eigenpairs; k=7"),
            ({"k": 4, "which": "both"}, "k=4 with which='both' asks for 8"),
            ({"tolerance": -1.0}, "tolerance is a finite number ≥ 0, got -1"),
            ({"tolerance": float("nan")}, "tolerance is a finite number"),
            ({"block": 0}, "block is a number of vectors ≥ 1, got 0"),
            ({"max_products": 0}, "max_products must be at least 1, got 0"),
            ({"start": torch.zeros(2, 5, dtype=DOUBLE)}, r"start holds vectors of 6 entries.*got \(2, 5\)"),
            ({"start": torch.full((1, 6), torch.inf, dtype=DOUBLE)}, "start holds vectors that are not finite"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            eigenpairs(self.A, **options)

    def test_products_that_are_not_finite(self) -> None:
        with pytest.raises(ValueError, match=r"A product with DenseOperator\(.*is not finite"):
            eigenpairs(DenseOperator(torch.full((3, 3), torch.nan, dtype=DOUBLE)))

    def test_not_converged(self) -> None:
        A = DenseOperator(matrix([float(i) for i in range(400)]))
        with pytest.warns(NotConverged, match=r"1 of 1 eigenpairs have residuals above .* after 12 products"):
            found = eigenpairs(A, 1, tolerance=1e-10, max_products=12)
        assert not bool(found.converged.any())
        assert abs(float(found.values[0]) - 399) <= float(found.residuals[0])

    @pytest.mark.usefixtures("unchecked_types")
    def test_an_unknown_end(self) -> None:
        with pytest.raises(ValueError, match=r"Unknown end of the spectrum 'bigest'\. Did"):
            eigenpairs(self.A, 1, "bigest")  # type: ignore[arg-type]


def test_an_operator_that_is_not_symmetric_is_named() -> None:
    matrix = torch.randn(30, 30, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"DenseOperator.*is not symmetric.*mend the product"):
        eigenpairs(DenseOperator(matrix), k=2)


@pytest.mark.parametrize("size", [40, 300])
def test_no_more_products_than_dimensions(size: int) -> None:
    """Eigenvalues that lie close together, to a tolerance that no Krylov space reaches early."""
    values = 1 + 1e-9 * torch.arange(size, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    found = eigenpairs(DenseOperator(basis * values @ basis.T), k=3, tolerance=1e-15)
    assert found.products <= size
    assert torch.allclose(found.values, values[-3:].flip(0), rtol=1e-12)
