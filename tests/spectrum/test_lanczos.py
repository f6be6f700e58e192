"""Gauss quadrature by Lanczos steps, against the measures that it stands for."""

import pytest
import torch
from torch import Tensor

from curvlab.spectrum.lanczos import Quadrature, quadrature

DOUBLE = torch.float64


def problem(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix with given eigenvalues, a vector, and the weights with which it sees them."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
    start = torch.randn(n, dtype=DOUBLE, generator=generator)
    seen = (vectors.T @ start / start.norm()).square()
    return (vectors * torch.tensor(values, dtype=DOUBLE)) @ vectors.T, start, seen


def steps(values: list[float], m: int, seed: int = 0) -> tuple[Quadrature, Tensor]:
    A, start, seen = problem(values, seed)
    return quadrature(lambda v: A @ v, start, m), seen


VALUES = [-1.0, -0.4, 0.0, 0.1, 0.15, 0.7, 1.3, 2.0]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_polynomials_are_exact_up_to_degree_2m_minus_1(m: int) -> None:
    gauss, seen = steps(VALUES, m)
    exact = torch.tensor(VALUES, dtype=DOUBLE)
    for degree in range(2 * m):
        assert float(gauss.weights @ gauss.nodes**degree) == pytest.approx(float(seen @ exact**degree), abs=1e-12)
    assert abs(float(gauss.weights @ gauss.nodes ** (2 * m)) - float(seen @ exact ** (2 * m))) > 1e-9


def test_all_steps_give_the_measure_itself() -> None:
    gauss, seen = steps(VALUES, 20)
    assert gauss.nodes.tolist() == pytest.approx(VALUES, abs=1e-12)
    assert gauss.weights.tolist() == pytest.approx(seen.tolist(), abs=1e-12)
    assert float(gauss.residuals.max()) < 1e-12


def test_an_exhausted_krylov_space_ends_early() -> None:
    calls = []
    A, start, seen = problem([0.0] * 5 + [1.0] * 3 + [4.0] * 2)

    def counting(v: Tensor) -> Tensor:
        calls.append(v)
        return A @ v

    gauss = quadrature(counting, start, 10)
    assert len(calls) == 3
    assert gauss.nodes.tolist() == pytest.approx([0, 1, 4], abs=1e-12)
    assert gauss.weights.tolist() == pytest.approx([float(part.sum()) for part in seen.split([5, 3, 2])], abs=1e-12)


def test_an_ill_conditioned_operator_has_no_ghosts() -> None:
    values = [10.0 ** (-k / 4) for k in range(40)]
    gauss, seen = steps(values, 40)
    assert len(gauss.nodes) == 40
    assert gauss.nodes.flip(0).tolist() == pytest.approx(values, abs=1e-13)
    assert gauss.weights.flip(0)[:10].tolist() == pytest.approx(seen[:10].tolist(), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("m", [2, 4, 6])
def test_an_eigenvalue_lies_within_the_residual_of_every_node(m: int, seed: int) -> None:
    gauss, _ = steps(VALUES, m, seed)
    distance = (gauss.nodes[:, None] - torch.tensor(VALUES, dtype=DOUBLE)).abs().amin(1)
    assert bool((distance <= gauss.residuals + 1e-12).all())
    assert float(gauss.residuals.min()) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("m", [2, 4, 6, 12])
def test_weight_on_either_side_is_not_overstated(m: int, seed: int) -> None:
    values = [k**2 / 100 for k in range(40)]
    gauss, seen = steps(values, m, seed)
    exact = torch.tensor(values, dtype=DOUBLE)
    for number in (0.3, 1.0, 5.0):
        above, below = gauss.surely_above(number), gauss.mirrored().surely_above(-number)
        assert above <= float(seen[exact > number].sum()) + 1e-9
        assert below <= float(seen[exact < number].sum()) + 1e-9
        assert above >= float(gauss.weights[gauss.nodes > number][1:].sum()) - 1e-12
    assert gauss.surely_above(100.0) == 0.0


def test_a_node_that_has_converged_counts_in_full() -> None:
    gauss, seen = steps(VALUES, 8)
    assert gauss.surely_above(0.5) == pytest.approx(float(seen[5:].sum()), abs=1e-12)
    assert gauss.mirrored().surely_above(-0.5) == pytest.approx(float(seen[:5].sum()), abs=1e-12)


def test_one_step_gives_the_mean_and_the_spread() -> None:
    A, start, seen = problem(VALUES)
    gauss = quadrature(lambda v: A @ v, 3 * start, 1)
    exact = torch.tensor(VALUES, dtype=DOUBLE)
    mean = float(seen @ exact)
    assert gauss.nodes.tolist() == pytest.approx([mean])
    assert gauss.weights.tolist() == [1.0]
    assert float(gauss.residuals[0]) == pytest.approx(float(seen @ (exact - mean) ** 2) ** 0.5)
