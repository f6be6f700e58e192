"""Closed forms of block structure against dense matrices, sampled directions and iterations."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlab.theory import block_structure as theory

SIZES = (4, 6, 5)
CUTS = np.cumsum(SIZES)[:-1]
SEEDS = st.integers(0, 2**31)


def rows(seed, count=3):
    """Random S, cut into the blocks' columns."""
    return np.split(np.random.default_rng(seed).standard_normal((count, sum(SIZES))), CUTS, axis=1)


def kernels_of(parts):
    return np.stack([part @ part.T for part in parts])


def block_diagonal(matrix):
    return scipy.linalg.block_diag(*(np.split(rows_, CUTS, 1)[i] for i, rows_ in enumerate(np.split(matrix, CUTS))))


def dense_mass(matrix):
    return np.array([[np.square(b).sum() for b in np.split(part, CUTS, 1)] for part in np.split(matrix, CUTS)])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@given(SEEDS, st.integers(1, 20))
@settings(max_examples=20)
def test_the_row_side_gives_the_map_of_the_dense_matrix(seed, count):
    parts = rows(seed, count)
    S = np.hstack(parts)
    mass = theory.kernel_mass(kernels_of(parts))
    assert mass == pytest.approx(dense_mass(S.T @ S))
    C = S.T @ S
    share = 1 - np.square(block_diagonal(C)).sum() / np.square(C).sum()
    assert theory.off_block_share(mass) == pytest.approx(share, abs=1e-12)
    assert theory.off_block_share(mass) <= theory.aligned_share(np.sqrt(np.diag(mass))) + 1e-12


def test_equal_aligned_kernels_leave_one_in_b_blocks():
    kernel = np.cov(np.random.default_rng(0).standard_normal((4, 9)))
    for B in (2, 5):
        assert theory.off_block_share(theory.kernel_mass([kernel] * B)) == pytest.approx(1 - 1 / B)
        assert theory.aligned_share([3.0] * B) == pytest.approx(1 - 1 / B)
    assert theory.aligned_share([1.0, 0.0]) == 0


def test_random_directions_say_no_more_than_the_share():
    rng = np.random.default_rng(1)
    C = rng.standard_normal((15, 15))
    C += C.T
    D = block_diagonal(C)
    share = theory.off_block_share(dense_mass(C))
    V = rng.standard_normal((15, 200_000))
    error = np.square((C - D) @ V).sum() / np.square(C @ V).sum()
    assert np.sqrt(error) == pytest.approx(theory.random_product_error(share), rel=0.01)
    wide = np.kron(np.eye(300), C), np.kron(np.eye(300), D)
    v = rng.standard_normal(len(wide[0]))
    assert cosine(wide[0] @ v, wide[1] @ v) == pytest.approx(theory.random_alignment(share), abs=0.03)


@given(SEEDS)
@settings(max_examples=20)
def test_the_undamped_cosine_is_that_of_dense_steps(seed):
    parts = rows(seed)
    S, r = np.hstack(parts), np.random.default_rng(seed + 1).standard_normal(3)
    C, g = S.T @ S, S.T @ r
    full, block = np.linalg.pinv(C) @ g, np.linalg.pinv(block_diagonal(C)) @ g
    assert theory.undamped_cosine(kernels_of(parts), r) == pytest.approx(cosine(full, block), rel=1e-6)


def test_equal_kernels_have_the_full_step_whatever_is_left_out_and_multiples_have_not():
    kernel = np.cov(np.random.default_rng(2).standard_normal((4, 9)))
    residual = [1.0, -2.0, 0.3, 0.7]
    assert theory.off_block_share(theory.kernel_mass([kernel] * 3)) == pytest.approx(2 / 3)
    assert theory.undamped_cosine([kernel] * 3, residual) == pytest.approx(1.0)
    assert all(theory.undamped_cosine([kernel * factor] * 3, residual) <= 1 for factor in np.linspace(0.1, 2, 50))
    scales = np.array([1.0, 2.0, 0.5])
    multiples = 3 / np.sqrt(scales.sum() * (1 / scales).sum())
    assert theory.undamped_cosine(scales[:, None, None] * kernel, residual) == pytest.approx(multiples)


def test_canonical_correlations_are_those_of_the_dense_blocks():
    left, right, _ = rows(3, 9)
    C, D = left.T @ left, right.T @ right
    dense = scipy.linalg.inv(scipy.linalg.sqrtm(C)) @ left.T @ right @ scipy.linalg.inv(scipy.linalg.sqrtm(D))
    assert theory.canonical_correlations(left, right) == pytest.approx(np.linalg.svd(dense, compute_uv=False))
    short = rows(4, 3)
    assert theory.canonical_correlations(short[0], short[1]) == pytest.approx(np.ones(3))


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_softmax_regression_leaves_one_in_c(classes):
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % classes
    weight = torch.zeros(classes, 3, dtype=torch.float64)
    H = torch.func.hessian(lambda w: torch.nn.functional.cross_entropy(x @ w.T, y))(weight)
    mass = H.square().sum((1, 3)).numpy()
    assert theory.off_block_share(mass) == pytest.approx(theory.softmax_share(classes))


def test_conditions_of_the_published_quadratics():
    unlike = ([1, 2, 3], [99, 100, 101], [4998, 4999, 5000])
    alike = ([1, 99, 4998], [2, 100, 4999], [3, 101, 5000])
    assert theory.condition_numbers(unlike) == pytest.approx((5000, 3))
    assert theory.condition_numbers(alike) == pytest.approx((5000, 4998))


def test_descent_takes_as_many_steps_as_said():
    values = np.array([1.0, 7.0])
    x, eta = np.array([1.0, -1.0]), 2 / values.sum()
    for _ in range(round(theory.descent_steps(7.0, 1e-6))):
        x = x - eta * values * x
    assert np.abs(x).max() == pytest.approx(1e-6, rel=0.35)
    assert theory.descent_steps(1.0, 1e-6) == 1


def test_the_best_difference_balances_truncation_and_round_off():
    unit = 1e-12
    grid = np.logspace(-6, -1, 2001)
    assert grid[np.argmin(grid**2 + 2 * unit / grid)] == pytest.approx(theory.best_difference(unit), rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.off_block_share(np.zeros((2, 2))), "mass"),
        (lambda: theory.aligned_share([-1.0, 1.0]), "norms"),
        (lambda: theory.random_alignment(1.2), "share"),
        (lambda: theory.undamped_cosine(np.zeros((2, 3, 3)), np.ones(3)), "not positive definite"),
        (lambda: theory.undamped_cosine(np.stack([np.eye(3)] * 2), np.ones(2)), "residual"),
        (lambda: theory.canonical_correlations(np.ones((2, 3)), np.ones((3, 3))), "right"),
        (lambda: theory.softmax_share(1), "classes"),
        (lambda: theory.condition_numbers([[0.0, 1.0]]), "spectra"),
        (lambda: theory.descent_steps(0.5, 0.1), "condition"),
        (lambda: theory.descent_steps(2.0, 1.0), "reduction"),
        (lambda: theory.best_difference(0.0), "unit"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
