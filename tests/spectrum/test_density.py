"""Spectral density and log-determinant against exact spectra."""

from importlib import import_module
from math import log

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.errors import NotPositiveDefinite
from curvlab.spectrum import DenseOperator, Hessian, density, logdet
from curvlab.spectrum.lanczos import quadrature, quadratures
from curvlab.testing.oracle import assert_close


def operator(values: Tensor, seed: int = 0) -> DenseOperator:
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))[0]
    return DenseOperator((Q * values) @ Q.T)


def ramp(n: int = 300) -> Tensor:
    return torch.linspace(-1, 3, n, dtype=DOUBLE)


def smooth(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """The exact density, with the same kernel."""
    return torch.distributions.Normal(values, width).log_prob(grid[:, None]).exp().mean(1)


class TestBlocks:
    def test_a_block_is_its_vectors(self) -> None:
        A, starts = operator(ramp(60)), torch.randn(4, 60, dtype=DOUBLE)
        together = quadratures(A.matmat, starts, 12)
        for gauss, start in zip(together, starts, strict=True):
            alone = quadrature(lambda v: A.matrix @ v, start, 12)
            for name in ("nodes", "weights", "residuals"):
                assert_close(getattr(gauss, name), getattr(alone, name), 1e-9)

    def test_vectors_are_exhausted_one_by_one(self) -> None:
        values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)
        A = DenseOperator(values.diag())
        starts = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 2]], dtype=DOUBLE)
        found = quadratures(A.matmat, starts, 5)
        for gauss, expected in zip(found, ([0.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0], [4.0]), strict=True):
            assert gauss.nodes.tolist() == pytest.approx(expected, abs=1e-12)
            assert gauss.weights.tolist() == pytest.approx([1 / len(expected)] * len(expected), abs=1e-12)


class TestDensity:
    def test_all_steps_and_many_probes(self) -> None:
        values, grid = ramp(40), torch.linspace(-2, 4, 50, dtype=DOUBLE)
        found = density(operator(values), probes=400, steps=40)
        mean, error = found.on(grid, 0.3)
        exact = smooth(values, grid, 0.3)
        assert float(error.max()) < 0.02
        assert bool(((mean - exact).abs() <= 5 * error + 1e-12).all())

    def test_few_steps_resolve_a_wide_kernel(self) -> None:
        values, grid = ramp(1000), torch.linspace(-2, 4, 50, dtype=DOUBLE)
        found = density(operator(values), probes=16, steps=40)
        mean, error = found.on(grid, 0.3)
        assert bool(((mean - smooth(values, grid, 0.3)).abs() <= 5 * error + 1e-4).all())
        assert found.products == 16 * 40

    def test_integrates_to_one(self) -> None:
        found = density(operator(ramp()), steps=20)
        grid = torch.linspace(-2, 4, 4001, dtype=DOUBLE)
        assert float(torch.trapezoid(found.on(grid)[0], grid)) == pytest.approx(1, abs=1e-6)
        assert float(found.weights.sum()) == pytest.approx(1)
        assert bool((found.nodes.diff() >= 0).all())
        assert found.width == pytest.approx(0.04, rel=0.02)

    def test_isolated_eigenvalues_come_out(self) -> None:
        values = torch.cat([ramp(200), torch.tensor([9.0, -7.0], dtype=DOUBLE)])
        found = density(operator(values), steps=30)
        assert float(found.nodes[-1]) == pytest.approx(9, abs=1e-9)
        assert float(found.nodes[0]) == pytest.approx(-7, abs=1e-9)
        count = found.sum(lambda v: (v > 8).double())
        assert abs(count.value - 1) < 4 * count.standard_error

    def test_standard_errors_are_honest(self) -> None:
        values = ramp(100)
        A, exact = operator(values), float(values.exp().sum())
        inside = 0
        for seed in range(40):
            found = density(A, probes=12, steps=12, generator=torch.Generator().manual_seed(seed)).sum(torch.exp)
            inside += abs(found.value - exact) <= 2 * found.standard_error
        assert 33 <= inside <= 40

    def test_a_constant_has_no_error(self) -> None:
        found = density(DenseOperator(2.5 * torch.eye(7, dtype=DOUBLE)))
        total = found.sum(lambda v: v)
        assert total.value == pytest.approx(17.5)
        assert total.standard_error < 1e-12
        assert float(found.on(torch.tensor([2.5], dtype=DOUBLE))[0]) == pytest.approx(
            40 / (2 * torch.pi) ** 0.5, rel=1e-6
        )

    def test_of_a_network(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        H = Hessian(model, nn.CrossEntropyLoss(), (torch.randn(20, 5, dtype=DOUBLE), torch.randint(3, (20,))))
        values = torch.linalg.eigvalsh(H.to_dense())
        square = density(H, probes=64, steps=20).sum(torch.square)
        assert abs(square.value - float(values.square().sum())) < 4 * square.standard_error

    def test_probes_may_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        A = operator(ramp(50))
        whole = density(A, probes=5, steps=8)
        monkeypatch.setattr(import_module("curvlab.spectrum.density"), "BASIS_ELEMENTS", 2 * 8 * 50)
        assert_close(density(A, probes=5, steps=8).nodes, whole.nodes, 1e-9)


class TestLogdet:
    @pytest.mark.parametrize("damping", [0.0, 0.5, "rel:0.1"])
    def test_against_the_spectrum(self, damping: float | str) -> None:
        values = torch.linspace(0.5, 3, 120, dtype=DOUBLE)
        rho = 0.3 if damping == "rel:0.1" else float(damping)
        found = logdet(operator(values), damping, probes=32, steps=30)
        assert abs(found.value - float((values + rho).log().sum())) < 4 * found.standard_error + 1e-6
        assert 0 < found.standard_error < 5

    def test_a_multiple_of_one_is_exact(self) -> None:
        found = logdet(DenseOperator(2 * torch.eye(6, dtype=DOUBLE)), 1.0)
        assert found.value == pytest.approx(6 * log(3))

    @pytest.mark.parametrize(("lowest", "damping"), [(-1.0, 0.5), (0.0, 0.0)])
    def test_what_has_none(self, lowest: float, damping: float) -> None:
        A = operator(torch.tensor([lowest, 1.0, 2.0, 3.0], dtype=DOUBLE))
        with pytest.raises(
            NotPositiveDefinite, match=r"A \+ ρI has an eigenvalue at or below .*Use a damping well above"
        ):
            logdet(A, damping)


class TestErrors:
    def test_options(self) -> None:
        A = operator(ramp(10))
        with pytest.raises(ValueError, match="probes must be at least 2"):
            density(A, probes=1)
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            density(A, steps=0)
        with pytest.raises(ValueError, match="width must be positive, got 0"):
            density(A).on(ramp(3), 0.0)

    def test_products_that_are_not_finite(self) -> None:
        values = ramp(10)
        values[0] = torch.nan
        with pytest.raises(ValueError, match=r"product with .* is not finite"):
            density(operator(values))
