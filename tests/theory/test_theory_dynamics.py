"""Function-space predictions against steps taken in the parameters of a linear model."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ntk_network import dense_response
from scipy.linalg import expm

from curvlab import theory


def linear_model(seed, rows=5, parameters=9, test_rows=3):
    """J, J', f_0(X), f_0(x'), y of a linear model with one output."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, parameters), (test_rows, parameters), (rows,), (test_rows,), (rows,))
    return tuple(rng.normal(size=shape) for shape in shapes)


def train(model, step, eta, steps):
    """Outputs at the training and test inputs after each step θ ← θ − η · step · gradient."""
    J, J_test, f, f_test, y = model
    rows = [(f, f_test)]
    for _ in range(steps):
        move = -eta * step @ (J.T @ (f - y) / len(y))
        f, f_test = f + J @ move, f_test + J_test @ move
        rows.append((f, f_test))
    return np.array([f for f, _ in rows]), np.array([f for _, f in rows])


@given(seed=st.integers(0, 10**6), factor=st.sampled_from([0.3, 1.0, 1.5, 2.3]))
@settings(max_examples=25)
def test_isotropic_training(seed, factor):
    """Block-diagonal natural gradient with two blocks in parameter space: α = 2."""
    model = linear_model(seed, parameters=14)
    J, J_test, f, f_test, y = model
    fisher = J.T @ J / 5
    fisher[:7, 7:] = fisher[7:, :7] = 0
    eta = factor * theory.best_step(2.0)
    trained, tested = train(model, np.linalg.pinv(fisher, rcond=1e-12, hermitian=True), eta, 4)
    np.testing.assert_allclose(theory.predict_train(f, y, 2.0, eta, range(5)), trained, atol=1e-6)
    closed = f + (1 - (1 - 2 * eta) ** 3) * (y - f)
    np.testing.assert_allclose(theory.predict_train(f, y, 2.0, eta, [3])[0], closed, atol=1e-12)
    cross = dense_response(J, fisher, 5, test=J_test)
    predicted = theory.predict_test(f_test, f, y, 2.0, cross, eta, range(5))
    np.testing.assert_allclose(predicted, tested, atol=1e-5 * max(1, np.abs(tested).max()))


@pytest.mark.parametrize("parameters", [9, 3])
def test_gradient_descent_also_with_a_singular_kernel(parameters):
    model = linear_model(1, parameters=parameters)
    J, J_test, f, f_test, y = model
    kernel, cross = J @ J.T / 5, J_test @ J.T / 5
    eta = 0.9 * theory.stability_limit(np.linalg.eigvalsh(kernel).max())
    trained, tested = train(model, np.eye(parameters), eta, 50)
    np.testing.assert_allclose(theory.predict_train(f, y, kernel, eta, range(51)), trained, atol=1e-10)
    predicted = theory.predict_test(f_test, f, y, kernel, cross, eta, range(51))
    np.testing.assert_allclose(predicted, tested, atol=1e-10)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_damped_exact_natural_gradient(damping):
    model = linear_model(2)
    J, J_test, f, f_test, y = model
    kernel, cross = J @ J.T / 5, J_test @ J.T / 5
    step = np.linalg.inv(J.T @ J / 5 + damping * np.eye(9))
    trained, tested = train(model, step, 1.2, 6)
    response = theory.exact_response(kernel, damping)
    lifted = theory.exact_response(kernel, damping, cross)
    np.testing.assert_allclose(theory.predict_train(f, y, response, 1.2, range(7)), trained, atol=1e-10)
    predicted = theory.predict_test(f_test, f, y, response, lifted, 1.2, range(7))
    np.testing.assert_allclose(predicted, tested, atol=1e-10)
    ratio = np.sum((trained[1] - y) ** 2) / np.sum((f - y) ** 2)
    assert theory.damped_loss_ratio(kernel, f - y, damping, 1.2) == pytest.approx(ratio, rel=1e-10)


def test_flow():
    J, J_test, f, f_test, y = linear_model(3)
    kernel, cross = J @ J.T / 5, J_test @ J.T / 5
    decay = expm(-0.7 * kernel)
    covered = (np.eye(5) - decay) @ (y - f)
    np.testing.assert_allclose(theory.predict_train(f, y, kernel, 0.1, [7], flow=True)[0], f + covered)
    predicted = theory.predict_test(f_test, f, y, kernel, cross, 0.1, [7], flow=True)[0]
    np.testing.assert_allclose(predicted, f_test + cross @ np.linalg.solve(kernel, covered))
    discrete = theory.predict_train(f, y, kernel, 1e-5, [70_000])[0]
    np.testing.assert_allclose(discrete, f + covered, rtol=1e-4)


def test_slow_modes_keep_their_digits():
    """A mode with ηλ = 1e-12 moves by tηλ, to relative precision."""
    response = np.diag([1.0, 1e-12])
    moved = theory.predict_train(np.zeros(2), np.ones(2), response, 1.0, [3])[0, 1]
    assert moved == pytest.approx(3e-12, rel=1e-9)
    tested = theory.predict_test(np.zeros(1), np.zeros(2), np.ones(2), response, np.ones((1, 2)), 1.0, [3])
    assert tested[0, 0] == pytest.approx(1 + 3, rel=1e-9)


def test_modes_contract_at_their_rates():
    J, _, f, _, y = linear_model(4)
    kernel = J @ J.T / 5
    values, vectors = theory.kernel_modes(kernel)
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(vectors * values @ vectors.T, kernel, atol=1e-12)
    eta = 1 / values[0]
    outputs = theory.predict_train(f, y, kernel, eta, [0, 1])
    before, after = (outputs - y) @ vectors
    np.testing.assert_allclose(after / before, theory.gd_contraction(values, eta), atol=1e-10)
    response = theory.exact_response(kernel, 0.3)
    before, after = (theory.predict_train(f, y, response, 1.0, [0, 1]) - y) @ vectors
    np.testing.assert_allclose(after / before, theory.damped_contraction(values, 0.3), atol=1e-10)
    tiny = theory.damped_contraction(values, 1e-20)
    np.testing.assert_allclose(tiny, 1e-20 / values, rtol=1e-12)


def test_gradient_descent_is_stable_up_to_its_limit():
    J, _, f, _, y = linear_model(5)
    kernel = J @ J.T / 5
    limit = theory.stability_limit(theory.kernel_modes(kernel)[0][0])
    for factor, grows in ((0.99, False), (1.01, True)):
        late = theory.predict_train(f, y, kernel, factor * limit, [4000])[0]
        assert (np.linalg.norm(late - y) > np.linalg.norm(f - y)) == grows


def test_steps_in_any_order():
    J, _, f, _, y = linear_model(6)
    kernel = J @ J.T / 5
    all_steps = theory.predict_train(f, y, kernel, 0.1, range(4))
    np.testing.assert_array_equal(theory.predict_train(f, y, kernel, 0.1, [3, 0, 2]), all_steps[[3, 0, 2]])
    np.testing.assert_allclose(all_steps[0], f)


def test_dynamics_errors():
    f, y, kernel = np.zeros(3), np.ones(3), np.eye(3)
    train_, test_ = unwrap(theory.predict_train), unwrap(theory.predict_test)
    with pytest.raises(ValueError, match="target: axis 0 has 2 entries"):
        train_(f, y[:2], kernel, 0.1, [1])
    with pytest.raises(ValueError, match="response: axis 0 has 2 entries"):
        train_(f, y, np.eye(2), 0.1, [1])
    with pytest.raises(ValueError, match="response: must be symmetric"):
        train_(f, y, np.triu(np.ones((3, 3))), 0.1, [1])
    with pytest.raises(ValueError, match="response: the entry"):
        train_(f, y, float("nan"), 0.1, [1])
    with pytest.raises(ValueError, match="eta: must be a finite number above 0"):
        train_(f, y, kernel, 0.0, [1])
    with pytest.raises(ValueError, match="steps: must be 0 or above, got -1"):
        train_(f, y, kernel, 0.1, [-1])
    with pytest.raises(ValueError, match="test_response: axis 0 has 1 entries"):
        test_(np.zeros(2), f, y, kernel, np.ones((1, 3)), 0.1, [1])
    with pytest.raises(ValueError, match="test_response: axis 1 has 2 entries"):
        test_(np.zeros(2), f, y, kernel, np.ones((2, 2)), 0.1, [1])
    with pytest.raises(ValueError, match="damping: must be a finite number above 0"):
        theory.damped_contraction(np.ones(2), 0.0)
    with pytest.raises(ValueError, match="is not above −ρ"):
        theory.damped_contraction(np.array([-2.0, 1.0]), 1.0)
    with pytest.raises(ValueError, match="residual: is zero"):
        theory.damped_loss_ratio(kernel, f, 1.0)
    with pytest.raises(ValueError, match="residual: axis 0 has 2 entries"):
        unwrap(theory.damped_loss_ratio)(kernel, y[:2], 1.0)
