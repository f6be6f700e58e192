"""Gram matrices, rates and conditions against sampling, wide networks, and steps taken in parameters."""

from inspect import unwrap
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ntk_network import ACTIVATIONS, unit_sphere

import curvlab
from curvlab import theory
from curvlab.nn import TwoLayer

SEEDS = st.integers(0, 10**6)


def linear_model(seed, rows=6, parameters=15):
    """J and r(0)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, parameters)), rng.normal(size=rows)


def pattern(rng, inputs, width, activation):
    """S of a two-layer network."""
    signs, weights = rng.choice([-1.0, 1.0], size=width), rng.normal(size=(width, inputs.shape[1]))
    return signs * ACTIVATIONS[activation][1](inputs @ weights.T) / np.sqrt(width)


def frozen_jacobian(S, X):
    return np.einsum("ni,nj->nij", S, X).reshape(len(S), -1)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_limit_grams_against_monte_carlo(activation):
    rng = np.random.default_rng(0)
    x, draws = rng.normal(size=(5, 4)), 100_000
    slopes = ACTIVATIONS[activation][1](0.7 * rng.normal(size=(draws, 4)) @ x.T)
    products = slopes[:, :, None] * slopes[:, None, :]
    mean, error = products.mean(axis=0), products.std(axis=0) / np.sqrt(draws)
    limit = theory.activation_limit_gram(x, activation, 0.7)
    assert (np.abs(limit - mean) <= 5 * error).all()
    assert error.max() < 0.01 * limit.max()
    np.testing.assert_allclose(theory.two_layer_limit_gram(x, activation, 0.7), limit * (x @ x.T), rtol=1e-13)


@pytest.mark.parametrize(("activation", "weight_std"), [("relu", 1.0), ("erf", 1.0), ("erf", 0.3)])
def test_limit_gram_against_a_wide_network(activation, weight_std):
    width = 65536
    x = unit_sphere(np.random.default_rng(1), 6, 8)
    limit = theory.two_layer_limit_gram(x, activation, weight_std)
    model = TwoLayer(8, width, activation, weight_std, torch.Generator().manual_seed(0), torch.float64)
    rows = curvlab.jacobian(model, torch.from_numpy(x))
    found = rows.gram().numpy()
    slope_bound = 4 / np.pi if activation == "erf" else 1
    np.testing.assert_allclose(found, limit, atol=5 * slope_bound / 2 / sqrt(width))
    assert np.linalg.eigvalsh(limit)[0] > 5 * slope_bound / sqrt(width)
    S = rows.layers[0].g[0, :, 0, 0].numpy()
    np.testing.assert_allclose(theory.two_layer_gram(S, x), found, atol=1e-13)


def test_relu_limit_is_the_published_formula_whatever_the_scale():
    x = unit_sphere(np.random.default_rng(2), 7, 3)
    cosines = np.clip(x @ x.T, -1, 1)
    published = cosines * (np.pi - np.arccos(cosines)) / (2 * np.pi)
    for weight_std in (0.01, 1.0, 7.0):
        np.testing.assert_allclose(theory.two_layer_limit_gram(x, "relu", weight_std), published, atol=1e-8)
    np.testing.assert_allclose(np.diag(theory.two_layer_limit_gram(x)), 0.5, rtol=1e-14)
    erf = [theory.two_layer_limit_gram(x, "erf", weight_std) for weight_std in (0.3, 1.0)]
    assert np.abs(erf[0] - erf[1]).max() > 0.1


@pytest.mark.parametrize(
    ("activation", "factor", "singular"), [("relu", 1, 1), ("erf", 1, 1), ("relu", 2, 1), ("erf", 2, 0)]
)
def test_duplicate_and_positively_parallel_inputs(activation, factor, singular):
    x = unit_sphere(np.random.default_rng(3), 5, 4)
    assert np.linalg.eigvalsh(theory.two_layer_limit_gram(x, activation))[0] > 1e-3
    values = np.linalg.eigvalsh(theory.two_layer_limit_gram(np.concatenate([x, factor * x[:1]]), activation))
    assert (values[0] < 1e-13 * values[-1]) == bool(singular)


@given(seed=SEEDS, eta=st.floats(0.05, 1.9))
@settings(max_examples=30, deadline=None)
def test_ngd_on_a_linear_model(seed, eta):
    """Residuals shrink coordinate by coordinate, and the parameters move as far as the closed form says."""
    J, initial = linear_model(seed)
    G = J @ J.T
    theta, residuals, distances = np.zeros(15), [initial], [0.0]
    for _ in range(5):
        theta = theta - eta * J.T @ np.linalg.solve(G, residuals[-1])
        residuals.append(initial + J @ theta)
        distances.append(np.linalg.norm(theta))
    steps = range(6)
    tolerance = 1e-15 * np.linalg.cond(G) * np.abs(initial).max() + 1e-12
    predicted = theory.predict_train(initial, np.zeros(6), 1.0, eta, steps)
    np.testing.assert_allclose(residuals, predicted, atol=tolerance)
    np.testing.assert_allclose(predicted, [(1 - eta) ** k * initial for k in steps], atol=1e-14)
    total = np.linalg.norm(np.linalg.lstsq(J, initial)[0])
    assert theory.total_movement(initial, G) == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(theory.movement(initial, G, eta, steps), distances, rtol=1e-9, atol=1e-12)
    squares = (np.array(residuals) ** 2).sum(axis=1)
    assert squares[1] == pytest.approx(theory.ngd_linear_ratio(eta) * squares[0], rel=1e-8, abs=tolerance)
    if eta <= 1:
        assert (squares[1:] <= theory.ngd_rate_bound(eta) * squares[:-1] + tolerance).all()


def test_ngd_with_a_full_step_converges_at_once():
    J, initial = linear_model(0)
    left = initial - J @ J.T @ np.linalg.solve(J @ J.T, initial)
    assert np.abs(left).max() < 1e-12
    assert theory.ngd_linear_ratio(1.0) == theory.ngd_rate_bound(1.0) == 0
    assert theory.movement(initial, J @ J.T, 1.0, [1])[0] == theory.total_movement(initial, J @ J.T)


def test_movement_at_a_small_step_keeps_its_digits():
    J, initial = linear_model(1)
    total = theory.total_movement(initial, J @ J.T)
    assert theory.movement(initial, J @ J.T, 1e-13, [2])[0] == pytest.approx(2e-13 * total, rel=1e-10)


def test_movement_bound_is_attained_along_the_least_eigenvector():
    J, initial = linear_model(2)
    values, vectors = theory.kernel_modes(J @ J.T)
    bound = theory.movement_bound(float(np.linalg.norm(initial)), values[-1])
    assert theory.total_movement(initial, J @ J.T) < 0.9 * bound
    least = np.linalg.norm(initial) * vectors[:, -1]
    assert theory.total_movement(least, J @ J.T) == pytest.approx(bound, rel=1e-10)
    assert theory.condition_radius(2.0, 0.25) == 3 * theory.movement_bound(2.0, 0.25) == 12


def test_movement_of_the_pseudo_inverse_step_with_fewer_parameters_than_samples():
    J, initial = linear_model(3, rows=6, parameters=4)
    expected = np.linalg.norm(np.linalg.pinv(J) @ initial)
    assert theory.total_movement(initial, J @ J.T) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_damped_modes(damping, eta):
    """μ beside G, and nμ for a Fisher that is a mean over samples."""
    J, initial = linear_model(4)
    values, vectors = theory.kernel_modes(J @ J.T)
    left = initial - eta * J @ J.T @ np.linalg.solve(J @ J.T + damping * np.eye(6), initial)
    expected = theory.damped_contraction(values, damping, eta) * (vectors.T @ initial)
    np.testing.assert_allclose(vectors.T @ left, expected, atol=1e-12)
    step = np.linalg.solve(J.T @ J / 6 + damping * np.eye(15), J.T @ initial / 6)
    expected = theory.damped_contraction(values, 6 * damping, eta) * (vectors.T @ initial)
    np.testing.assert_allclose(vectors.T @ (initial - eta * J @ step), expected, atol=1e-11)


@given(seed=SEEDS, activation=st.sampled_from(["relu", "erf"]), eta=st.floats(0.05, 1.0))
@settings(max_examples=25, deadline=None)
def test_kfac_decays_by_leverages_on_a_model_with_frozen_patterns(seed, activation, eta):
    rng = np.random.default_rng(seed)
    X = unit_sphere(rng, 8, 3)
    S, initial = pattern(rng, X, 200, activation), rng.normal(size=8)
    # The law is for SSᵀ invertible; two close inputs may share all of their ReLU patterns.
    assume(np.linalg.matrix_rank(S) == 8)
    weights, residuals = np.zeros((200, 3)), [initial]
    for _ in range(4):
        coefficients = np.linalg.solve(S @ S.T, residuals[-1][:, None] * X)
        weights = weights - eta * S.T @ coefficients @ np.linalg.inv(X.T @ X)
        residuals.append(initial + np.einsum("ni,ij,nj->n", S, weights, X))
    h = theory.leverages(X)
    tolerance = 1e-14 * np.linalg.cond(S @ S.T) * np.linalg.cond(X.T @ X) + 1e-12
    np.testing.assert_allclose(theory.kfac_residual(h, eta, range(5), initial), residuals, atol=tolerance)
    values = np.linalg.eigvalsh(X.T @ X)
    assert h.sum() == pytest.approx(3)
    assert (1 / values[-1] - 1e-12 <= h).all()
    assert (h <= min(1.0, 1 / values[0]) + 1e-12).all()
    squares = (np.array(residuals) ** 2).sum(axis=1)
    assert theory.kfac_worst_rate(X, eta) == pytest.approx(1 - eta / values[-1], rel=1e-12)
    assert (squares[1:] <= theory.kfac_worst_rate(X, eta) * squares[:-1] + tolerance).all()


@pytest.mark.parametrize("repeated", [False, True])
def test_kfac_in_parameters_also_with_repeated_patterns(repeated):
    """J F⁺ Jᵀ from the Kronecker product itself: the leverages, unless two samples have one pattern."""
    rng = np.random.default_rng(5)
    X = unit_sphere(rng, 5, 3)
    S = pattern(rng, X, 12, "erf")
    if repeated:
        S[1] = S[0]
    J = frozen_jacobian(S, X)
    response = J @ np.linalg.pinv(np.kron(S.T @ S, X.T @ X), rcond=1e-11, hermitian=True) @ J.T
    np.testing.assert_allclose(theory.kfac_layer_response(S, X) / 5, response, atol=1e-7)
    assert np.allclose(response, np.diag(theory.leverages(X)), atol=1e-7) != repeated
    np.testing.assert_allclose(theory.two_layer_gram(S, X), J @ J.T, atol=1e-14)


def test_kfac_bound_is_attained_by_orthonormal_groups():
    """n/d copies of an orthonormal basis: every leverage is d/n = 1/λ_max."""
    X = np.concatenate([np.eye(3)] * 4)
    np.testing.assert_allclose(theory.leverages(X), 0.25, rtol=1e-12)
    assert theory.kfac_worst_rate(X, 0.4) == pytest.approx(1 - 0.4 * 0.25)


CURVATURES = {"mu": st.floats(0.1, 3), "kappa": st.floats(1, 30)}


def worst_ratio(eta, C, mu, L):
    """Largest factor of ‖u − u⋆‖² in one step of a quadratic in the plane with the worst error E, ‖E‖ = C."""
    angles = np.linspace(0, np.pi / 2, 4001)
    e = np.stack([np.cos(angles), np.sin(angles)])
    g = np.array([[mu], [L]]) * e
    return float((np.linalg.norm(e - eta * g, axis=0) + eta * C * np.linalg.norm(g, axis=0)).max() ** 2)


@given(share=st.floats(0, 0.99), fraction=st.floats(0.01, 1), **CURVATURES)
@settings(max_examples=60, deadline=None)
def test_rates_hold_against_the_worst_quadratic(share, fraction, mu, kappa):
    L = kappa * mu
    C = share * theory.general_constant_limit(mu, L)
    eta = fraction * theory.general_largest_step(C, mu, L)
    assert worst_ratio(eta, C, mu, L) <= theory.general_rate(eta, mu, L) + 1e-12


@given(**CURVATURES)
@settings(max_examples=30, deadline=None)
def test_rate_is_attained_without_error_and_no_larger_constant_will_do(mu, kappa):
    L = kappa * mu
    best = theory.general_largest_step(0.0, mu, L)
    assert worst_ratio(best, 0.0, mu, L) == pytest.approx(theory.general_rate(best, mu, L), abs=1e-12)
    assert theory.general_rate(best, mu, L) == pytest.approx(((L - mu) / (L + mu)) ** 2, abs=1e-12)
    limit = theory.general_constant_limit(mu, L)
    assert theory.general_largest_step(limit * (1 + 1e-12), mu, L) == 0
    for eta in np.geomspace(1e-6, 1, 30) * best:
        assert worst_ratio(eta, 1.02 * limit, mu, L) > theory.general_rate(eta, mu, L) - 1e-13


@given(C=st.floats(0, 0.49))
def test_squared_error_is_the_case_of_unit_curvature(C):
    assert theory.largest_step(C) == pytest.approx((1 - 2 * C) / (1 + C) ** 2, abs=1e-15)
    assert theory.general_constant_limit(1.0, 1.0) == 0.5
    assert theory.general_rate(0.3, 1.0, 1.0) == theory.ngd_rate_bound(0.3) == 0.7
    assert theory.condition_radius(1.0, 4.0, 2.0, 2.0) == theory.condition_radius(1.0, 4.0) == 1.5
    sharper = (1 - 2 * C) / (1 - C) ** 2
    assert worst_ratio(sharper, C, 1.0, 1.0) == pytest.approx(1 - sharper, abs=1e-12)
    assert theory.largest_step(C) <= sharper + 1e-15
    assert theory.largest_step(0.5) == theory.largest_step(3.0) == 0


@given(C=st.floats(0.01, 0.49), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_stability_of_the_jacobian_bounds_the_error_of_a_step(C, seed):
    """‖(J̄ − J)J⁺‖ ≤ 2c/(1 − c) with equality at the worst: at most C for c = C/3 and C/2.5, not for C/2."""
    rng = np.random.default_rng(seed)
    origin = rng.normal(size=(3, 7))
    least = np.linalg.svd(origin)[1][-1]
    left, _, right = np.linalg.svd(origin, full_matrices=False)
    for divisor in (3.0, 2.5, 2.0):
        c = C / divisor
        worst_change = c * least * np.outer(left[:, -1], right[-1])
        changes = rng.normal(size=(2, 3, 7))
        changes *= c * least / np.linalg.norm(changes, 2, axis=(1, 2), keepdims=True)
        assert theory.stability_constant(np.linalg.norm(changes[0], 2), least**2) == pytest.approx(3 * c)
        mean, present = origin + changes
        error = np.linalg.norm((mean - present) @ np.linalg.pinv(present), 2)
        present = origin - worst_change
        worst = np.linalg.norm(2 * worst_change @ np.linalg.pinv(present), 2)
        assert worst == pytest.approx(2 * c / (1 - c))
        assert error <= worst + 1e-12
        assert (worst <= C) == (divisor > 2)


@given(eta=st.floats(1e-4, 1), **CURVATURES)
def test_radius_holds_the_sum_of_all_moves(eta, mu, kappa):
    L = kappa * mu
    eta *= theory.general_largest_step(0.0, mu, L)
    moves = 1.5 * eta * L / (1 - sqrt(theory.general_rate(eta, mu, L)))
    radius = theory.condition_radius(1.0, 1.0, mu, L)
    assert moves <= radius * (1 + 1e-9)
    if eta * mu < 1e-4:
        assert moves > 0.99 * radius


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 1.5, 2.0)])
@pytest.mark.parametrize("C", [0.1, 0.3])
def test_theorem_on_a_curved_model(weights, C):
    """Outputs J₀θ + ½εb‖θ‖², so ‖ΔJ‖ = ε‖b‖‖θ‖, under ½ Σ w (u − y)², with ε such that condition 2 holds with C."""
    rng = np.random.default_rng(7)
    curvature = np.array(weights)
    mu, L = curvature.min(), curvature.max()
    C = min(C, 0.9 * theory.general_constant_limit(mu, L))
    origin, target, b = rng.normal(size=(3, 8)), rng.normal(size=3), rng.normal(size=3)
    lambda_min = np.linalg.eigvalsh(origin @ origin.T)[0]
    radius = theory.condition_radius(float(np.linalg.norm(target)), lambda_min, mu, L)
    epsilon = C * sqrt(lambda_min) / (3 * radius * np.linalg.norm(b))
    assert theory.stability_constant(epsilon * np.linalg.norm(b) * radius, lambda_min) == pytest.approx(C)
    eta = theory.general_largest_step(C, mu, L)
    rate = theory.general_rate(eta, mu, L)
    theta, before = np.zeros(8), np.linalg.norm(target) ** 2
    for _ in range(15):
        J = origin + epsilon * np.outer(b, theta)
        gradient = curvature * (origin @ theta + epsilon / 2 * (theta @ theta) * b - target)
        theta = theta - eta * J.T @ np.linalg.solve(J @ J.T, gradient)
        after = np.linalg.norm(origin @ theta + epsilon / 2 * (theta @ theta) * b - target) ** 2
        assert after <= rate * before * (1 + 1e-9) + 1e-26
        assert np.linalg.norm(theta) <= radius
        before = after


def test_complexity_term_is_twice_the_rademacher_complexity_of_the_ball_that_ngd_stays_in():
    x = unit_sphere(np.random.default_rng(8), 9, 5)
    y = np.random.default_rng(9).normal(size=9)
    G = theory.two_layer_limit_gram(x)
    expected = 2 * np.sqrt(np.trace(G)) / 9 * np.sqrt(y @ np.linalg.solve(G, y))
    assert theory.complexity_term(y, G) == pytest.approx(expected, rel=1e-10)
    assert theory.complexity_term(y, G) == pytest.approx(np.sqrt(2 / 9) * theory.total_movement(y, G), rel=1e-12)


def test_path_straightness():
    times = np.linspace(0, 1, 200)
    scalar = np.stack([times**3, np.sin(1.5 * np.pi * times), np.sin(2 * np.pi * times), np.ones(200)], axis=1)
    scalar[-1, 2] = 0.0
    np.testing.assert_allclose(theory.path_straightness(scalar), [1, 3, np.inf, 1], rtol=1e-3)
    circle = np.stack([np.cos(times * np.pi / 2), np.sin(times * np.pi / 2)], axis=1)
    curves = np.stack([circle, np.outer(times, [3.0, 4.0])], axis=1)
    np.testing.assert_allclose(theory.path_straightness(curves), [np.pi / 2 / np.sqrt(2), 1], rtol=1e-4)


def test_ngd_goes_straight_and_gradient_descent_does_not():
    J, initial = linear_model(10)
    target = np.zeros(6)
    ngd = theory.predict_train(initial, target, 1.0, 0.2, range(60))
    np.testing.assert_allclose(theory.path_straightness(ngd), 1, atol=1e-12)
    G = J @ J.T
    gd = theory.predict_train(initial, target, G, 1 / np.linalg.eigvalsh(G)[-1], range(600))
    assert theory.path_straightness(gd).max() > 1.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.two_layer_limit_gram(np.ones((2, 2)), "relo"), "Did you mean 'relu'"),
        (lambda: theory.two_layer_limit_gram(np.eye(2), "erf", 0.0), "weight_std: must be a finite number above 0"),
        (lambda: theory.two_layer_limit_gram(np.array([[1.0], [0.0]])), "inputs: row 1 is zero"),
        (lambda: theory.activation_limit_gram(np.array([[np.nan]])), r"inputs: the entry at \(0, 0\) is not finite"),
        (lambda: unwrap(theory.two_layer_gram)(np.eye(3), np.eye(2)), "inputs: axis 0 has 2 entries but must have 3"),
        (lambda: theory.stability_constant(-1.0, 1.0), "change_norm: must be a finite number, 0 or above"),
        (lambda: theory.stability_constant(1.0, 0.0), "lambda_min: must be a finite number above 0"),
        (lambda: theory.condition_radius(1.0, -1.0), "lambda_min: must be a finite number above 0"),
        (lambda: theory.condition_radius(float("inf"), 1.0), "residual_norm: must be a finite number"),
        (lambda: theory.largest_step(-0.1), "C: must be a finite number, 0 or above"),
        (lambda: theory.ngd_rate_bound(1.1), r"eta: must be at most 2/\(μ \+ L\) = 1, got 1.1"),
        (lambda: theory.ngd_linear_ratio(0.0), "eta: must be a finite number above 0"),
        (lambda: theory.general_rate(0.1, 2.0, 1.0), "mu, L: the Lipschitz constant L = 1.0 cannot lie below"),
        (lambda: theory.general_constant_limit(0.0, 1.0), "mu: must be a finite number above 0"),
        (lambda: theory.total_movement(np.ones(2), -np.eye(2)), "gram: has eigenvalues from -1 to -1"),
        (lambda: theory.total_movement(np.ones(2), np.zeros((2, 2))), "gram: has eigenvalues from 0 to 0"),
        (lambda: theory.complexity_term(np.ones(2), np.ones((2, 2))), "gram: is singular to round-off"),
        (lambda: theory.movement(np.ones(2), np.eye(2), 0.1, [-1]), "steps: must be 0 or above, got -1"),
        (lambda: unwrap(theory.total_movement)(np.ones(3), np.eye(2)), "residual: axis 0 has 3 entries"),
        (lambda: theory.kfac_residual(np.full(2, 3.0), 0.1, [1], np.ones(2)), r"leverage: must lie in \[0, 1\]"),
        (lambda: theory.kfac_residual(np.ones(2), 0.1, [-2], np.ones(2)), "steps: must be 0 or above, got -2"),
        (lambda: unwrap(theory.kfac_residual)(np.ones(2), 0.1, [1], np.ones(3)), "initial: axis 0 has 3 entries"),
        (lambda: theory.kfac_worst_rate(np.array([[1.0, 0.0], [0.0, 2.0]]), 0.1), "inputs: row 1 has norm 2"),
        (lambda: theory.kfac_worst_rate(np.eye(2), 1.5), r"eta: must be at most λ_max\(XᵀX\) = 1, got 1.5"),
        (lambda: theory.path_straightness(np.ones((1, 2))), "path: needs the outputs at two times or more"),
        (lambda: unwrap(theory.path_straightness)(np.ones(3)), "path: expected a non-empty array with 2 axes"),
    ],
)
def test_fast_convergence_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
