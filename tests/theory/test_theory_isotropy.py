"""α, the layer-wise family and its limits, against dense Fisher matrices."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ntk_network import Network, dense_response, jacobian, unit_sphere
from scipy.linalg import block_diag

from curvlab import theory


def random_blocks(rng, depth, rows, extra=4, test_rows=3):
    """Well-conditioned random Jacobians of layers of different sizes, and those of test inputs."""
    sizes = rows + extra + rng.integers(0, 4, depth)
    return [rng.normal(size=(rows, p)) for p in sizes], [rng.normal(size=(test_rows, p)) for p in sizes]


def family_fisher(sigma, blocks, samples):
    stacked = block_diag(*blocks)
    return stacked.T @ np.kron(sigma, np.eye(len(blocks[0]))) @ stacked / samples


def layer_kernels(blocks, samples, test=None):
    return np.stack([t @ j.T / samples for j, t in zip(blocks, test or blocks, strict=True)])


def random_sigma(rng, depth, rank):
    """A symmetric, in general indefinite matrix of the given rank."""
    basis = np.linalg.qr(rng.normal(size=(depth, depth)))[0][:, :rank]
    return basis * (rng.uniform(0.5, 2, rank) * rng.choice([-1, 1], rank)) @ basis.T


def with_ones_in_range(rng, depth, rank):
    """A positive semi-definite matrix of the given rank whose range holds the vector of ones."""
    basis = np.linalg.qr(np.column_stack([np.ones(depth), rng.normal(size=(depth, rank - 1))]))[0]
    factor = rng.normal(size=(rank, rank)) + 2 * np.eye(rank)
    return basis @ factor @ factor.T @ basis.T


@pytest.mark.parametrize("depth", range(1, 15))
def test_tridiagonal_eigenvalues_and_covered_depths(depth):
    computed = np.linalg.eigvalsh(theory.tridiagonal_sigma(depth))[::-1]
    np.testing.assert_allclose(theory.tridiagonal_eigenvalues(depth), computed, atol=1e-12)
    assert theory.tridiagonal_covered(depth) == (np.abs(computed).min() > 1e-9) == (depth % 3 != 2)


@pytest.mark.parametrize(
    ("depth", "coefficients"),
    [
        (1, (1,)),
        (3, (0, 1, 0)),
        (4, (1, 0, 0, 1)),
        (6, (0, 1, 0, 0, 1, 0)),
        (7, (1, 0, 0, 1, 0, 0, 1)),
        (9, (0, 1, 0) * 3),
        (10, (1, 0, 0) * 3 + (1,)),
        (12, (0, 1, 0) * 4),
        (13, (1, 0, 0) * 4 + (1,)),
    ],
)
def test_tridiagonal_coefficients_at_covered_depths(depth, coefficients):
    found = theory.layer_coefficients(theory.tridiagonal_sigma(depth))
    np.testing.assert_allclose(found, coefficients, atol=1e-12)
    widths = (5,) * (depth + 1)
    assert theory.alpha("block-tridiagonal", widths, 3) == sum(coefficients)
    assert theory.published_alpha("block-tridiagonal", depth, 5, 3) == sum(coefficients)


@pytest.mark.parametrize("depth", range(1, 12))
@pytest.mark.parametrize("structure", ["full", "block-diagonal", "block-tridiagonal"])
def test_alpha_and_zero_damping_response_of_named_structures(structure, depth):
    rng = np.random.default_rng(depth)
    blocks, test = random_blocks(rng, depth, rows=3)
    sigma = {
        "full": np.ones((depth, depth)),
        "block-diagonal": np.eye(depth),
        "block-tridiagonal": theory.tridiagonal_sigma(depth),
    }[structure]
    fisher = family_fisher(sigma, blocks, 3)
    J, J_test = np.concatenate(blocks, axis=1), np.concatenate(test, axis=1)
    expected = theory.alpha(structure, (9,) * depth + (1,), 3)
    np.testing.assert_allclose(dense_response(J, fisher, 3), expected * np.eye(3), atol=1e-8)
    kernels, cross = layer_kernels(blocks, 3), layer_kernels(blocks, 3, test)
    np.testing.assert_allclose(theory.layer_wise_response(sigma, kernels), expected * np.eye(3), atol=1e-9)
    off = theory.layer_wise_response(sigma, kernels, test_kernels=cross)
    np.testing.assert_allclose(off, dense_response(J, fisher, 3, test=J_test), atol=1e-8)
    if structure == "full":
        np.testing.assert_allclose(theory.exact_response(kernels.sum(0), test_kernel=cross.sum(0)), off, atol=1e-10)
    if structure == "block-diagonal":
        np.testing.assert_allclose(theory.block_diagonal_response(kernels, test_kernels=cross), off, atol=1e-10)


@given(
    depth=st.integers(2, 6),
    rows=st.integers(1, 4),
    deficiency=st.integers(0, 2),
    damped=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_layer_wise_response_of_semidefinite_sigma(depth, rows, deficiency, damped, seed):
    rng = np.random.default_rng(seed)
    sigma = with_ones_in_range(rng, depth, max(1, depth - deficiency))
    blocks, test = random_blocks(rng, depth, rows)
    kernels, cross = layer_kernels(blocks, rows), layer_kernels(blocks, rows, test)
    fisher = family_fisher(sigma, blocks, rows)
    J, J_test = np.concatenate(blocks, axis=1), np.concatenate(test, axis=1)
    damping = float(rng.uniform(0.1, 10)) if damped else 0.0
    scale = np.abs(np.linalg.pinv(sigma, rcond=1e-10)).max() * 1e-7
    for predicted, reference in (
        (theory.layer_wise_response(sigma, kernels, damping), dense_response(J, fisher, rows, damping)),
        (
            theory.layer_wise_response(sigma, kernels, damping, cross),
            dense_response(J, fisher, rows, damping, J_test),
        ),
    ):
        np.testing.assert_allclose(predicted, reference, atol=max(scale, 1e-9), rtol=1e-7)
    if not damped:
        total = theory.alpha("layer-wise", (9,) * depth + (1,), rows, sigma=sigma)
        np.testing.assert_allclose(dense_response(J, fisher, rows), total * np.eye(rows), atol=max(scale, 1e-9))
        np.testing.assert_array_equal(theory.zero_damping_pole(sigma, kernels), np.zeros((rows, rows)))


@given(depth=st.integers(2, 5), rank=st.integers(1, 4), rows=st.integers(1, 4), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_pole_where_ones_are_not_in_the_range(depth, rank, rows, seed):
    rng = np.random.default_rng(seed)
    sigma = random_sigma(rng, depth, min(rank, depth - 1))
    blocks, _ = random_blocks(rng, depth, rows, extra=10)
    kernels = layer_kernels(blocks, rows)
    pole = theory.zero_damping_pole(sigma, kernels)
    errors = [np.abs(rho * theory.layer_wise_response(sigma, kernels, rho) - pole).max() for rho in (1e-4, 1e-5)]
    assert errors[0] < 0.1 * np.abs(pole).max() + 1e-2
    assert errors[1] < 0.2 * errors[0] + 1e-7
    with pytest.raises(ValueError, match="ones is not in its range"):
        theory.layer_coefficients(sigma)
    with pytest.raises(ValueError, match="diverges like 1/ρ"):
        theory.layer_wise_response(sigma, kernels)


@pytest.mark.parametrize("depth", [2, 3, 5, 8])
def test_damped_tridiagonal_response_tends_to_its_limit(depth):
    """At the excluded depths as well, for training and test rows: the error falls in proportion to ρ."""
    rng = np.random.default_rng(depth)
    blocks, test = random_blocks(rng, depth, rows=4, extra=10)
    kernels, cross = layer_kernels(blocks, 4), layer_kernels(blocks, 4, test)
    sigma = theory.tridiagonal_sigma(depth)
    for tested in (None, cross):
        limit = theory.layer_wise_response(sigma, kernels, 0.0, tested)
        errors = [
            np.abs(theory.layer_wise_response(sigma, kernels, rho, tested) - limit).max() for rho in (1e-4, 1e-5, 1e-6)
        ]
        assert errors[0] > 1e-7
        np.testing.assert_allclose(errors[1:], np.array(errors[:-1]) / 10, rtol=0.1)


def test_shares_of_the_layers_at_an_excluded_depth_depend_on_the_kernels():
    """At L = 2 the tridiagonal Fisher is the full one: Θ_l Θ⁻¹, which is no multiple of the identity."""
    rng = np.random.default_rng(0)
    blocks, _ = random_blocks(rng, 2, rows=3)
    kernels = layer_kernels(blocks, 3)
    only_first = np.stack([kernels[0], np.zeros((3, 3))])
    share = theory.layer_wise_response(theory.tridiagonal_sigma(2), kernels, test_kernels=only_first)
    np.testing.assert_allclose(share, kernels[0] @ np.linalg.inv(kernels.sum(0)), atol=1e-10)
    assert np.abs(share - np.diag(np.diag(share))).max() > 1e-2


def test_layers_without_weight_need_no_positive_kernel():
    rng = np.random.default_rng(1)
    blocks, test = random_blocks(rng, 3, rows=4)
    blocks[0], test[0] = blocks[0][:, :2], test[0][:, :2]  # Θ_1 has rank 2 of 4
    kernels, cross = layer_kernels(blocks, 4), layer_kernels(blocks, 4, test)
    sigma = theory.tridiagonal_sigma(3)
    np.testing.assert_allclose(theory.layer_wise_response(sigma, kernels), np.eye(4), atol=1e-9)
    moved = theory.layer_wise_response(sigma, kernels, test_kernels=cross)
    np.testing.assert_allclose(moved, cross[1] @ np.linalg.inv(kernels[1]), atol=1e-9)
    with pytest.raises(ValueError, match="kernel of layer 0 is not positive definite"):
        theory.block_diagonal_response(kernels)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_curvature_eigenvalues_are_those_of_the_fisher(depth):
    rng = np.random.default_rng(depth)
    blocks, _ = random_blocks(rng, depth, rows=3)
    sigma = theory.tridiagonal_sigma(depth)
    kernels = layer_kernels(blocks, 3)
    found = theory.curvature_eigenvalues(sigma, kernels)
    dense = np.linalg.eigvalsh(family_fisher(sigma, blocks, 3))
    largest = np.abs(dense).max()
    np.testing.assert_allclose(
        found[np.abs(found) > 1e-9 * largest], dense[np.abs(dense) > 1e-9 * largest], atol=1e-9 * largest
    )
    assert (found.min() < -1e-6) == (depth >= 3)
    if depth >= 3:  # just beside the pole the response explodes
        pole = -found[0]
        assert np.abs(theory.layer_wise_response(sigma, kernels, pole * (1 + 1e-7))).max() > 1e4


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_isotropy_of_a_real_network(activation, outputs):
    rng = np.random.default_rng(3)
    net = Network((6, 24, 20, 22, outputs), activation, rng, bias_std=0.3)
    _, deltas, inputs = net.rows(unit_sphere(rng, 4, 6))
    blocks = [jacobian(d, a) for d, a in zip(deltas, inputs, strict=True)]
    J, rows = np.concatenate(blocks, axis=1), 4 * outputs
    for name, sigma in (
        ("block-diagonal", np.eye(4)),
        ("block-tridiagonal", theory.tridiagonal_sigma(4)),
    ):
        lifted = [np.linalg.lstsq(j @ j.T / 4, np.eye(rows))[0] for j in blocks]
        coefficients = np.linalg.solve(sigma, np.ones(4))
        step = np.concatenate([c * j.T @ z for c, j, z in zip(coefficients, blocks, lifted, strict=True)])
        expected = theory.alpha(name, net.widths, 4, bias=True) * np.eye(rows)
        np.testing.assert_allclose(J @ step / 4, expected, atol=1e-7)


def test_published_values():
    assert theory.published_alpha("full", 3, 64, 10) == 1
    assert theory.published_alpha("block-diagonal", 3, 64, 10) == 3
    assert theory.published_alpha("kfac", 3, 64, 10) == 30
    assert theory.published_alpha("unit-wise", 3, 64, 10, active=0.5) == 64
    with pytest.raises(ValueError, match="excludes L = 5"):
        theory.published_alpha("block-tridiagonal", 5, 64, 10)
    with pytest.raises(ValueError, match="no scale α is known for 'layer-wise'"):
        theory.published_alpha("layer-wise", 5, 64, 10)


def test_learning_rates():
    assert theory.best_step(4.0) == 0.25
    assert theory.stability_limit(4.0) == 0.5
    with pytest.raises(ValueError, match="alpha: must be a finite number above 0"):
        theory.best_step(-1.0)
    with pytest.raises(ValueError, match="largest"):
        theory.stability_limit(0.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("kfak", (3, 4, 1), 2), {}, "Did you mean 'kfac'"),
        (("diagonal", (3, 4, 1), 2), {}, "no scale α is known for 'diagonal'"),
        (("full", (3,), 2), {}, "widths: expected"),
        (("full", (3, 0, 1), 2), {}, "widths: expected"),
        (("full", (3, 1), 0), {}, "samples: must be at least 1"),
        (("unit-wise", (3, 4, 1), 2), {"active": 0.0}, "active: a share"),
        (("layer-wise", (3, 4, 1), 2), {}, "sigma: give it"),
        (("full", (3, 4, 1), 2), {"sigma": np.eye(2)}, "sigma: give it"),
        (("layer-wise", (3, 4, 1), 2), {"sigma": np.eye(3)}, "sigma: has 3 rows"),
    ],
)
def test_alpha_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        theory.alpha(*arguments, **options)


def test_response_errors():
    kernels = np.stack([np.eye(3), 2 * np.eye(3)])
    respond = unwrap(theory.layer_wise_response)
    with pytest.raises(ValueError, match="sigma: axis 0 has 3 entries but must have 2"):
        respond(np.eye(3), kernels)
    with pytest.raises(ValueError, match="sigma: must be symmetric"):
        respond(np.array([[1.0, 2.0], [0.0, 1.0]]), kernels)
    with pytest.raises(ValueError, match="sigma: expected square"):
        respond(np.ones((2, 3)), kernels)
    with pytest.raises(ValueError, match="kernels: expected a non-empty array with 3 axes"):
        respond(np.eye(2), np.eye(3))
    broken = kernels.copy()
    broken[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"kernels: the entry at \(1, 0, 2\) is not finite"):
        respond(np.eye(2), broken)
    with pytest.raises(ValueError, match="damping: must be a finite number, 0 or above"):
        respond(np.eye(2), kernels, -1.0)
    with pytest.raises(ValueError, match="test_kernels: axis 0"):
        respond(np.eye(2), kernels, 0.0, np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="test_kernels: axis 2"):
        respond(np.eye(2), kernels, 0.0, np.ones((2, 2, 4)))
    with pytest.raises(ValueError, match="F \\+ ρI is singular"):
        respond(-np.eye(2), kernels, 1.0)
    with pytest.raises(ValueError, match="kernels: layer 1 has the eigenvalue -1"):
        theory.curvature_eigenvalues(np.eye(2), np.stack([np.eye(3), -np.eye(3)]))
    with pytest.raises(ValueError, match="depth: must be at least 1"):
        theory.tridiagonal_sigma(0)
