"""Newton's method on the logits against parameter steps with the Fisher of a softmax."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.special import softmax

from curvlab import theory


def case(seed, samples=4, classes=3, parameters=30, scale=1.0):
    """J with rows (output, sample), logits [N, C], labels."""
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(samples * classes, parameters))
    return J, scale * rng.normal(size=(samples, classes)), rng.integers(0, classes, samples)


def losses(logits, labels):
    """log(1 + Σ_{j≠k} exp(z_j − z_k)), which keeps its digits for fitted samples."""
    gaps = np.exp(logits - logits[np.arange(len(labels)), labels][:, None])
    return np.log1p(gaps.sum(axis=1, where=~np.eye(logits.shape[1], dtype=bool)[labels]))


def parameter_step(J, logits, labels, eta, damping):
    """Δz of Δθ = −η(JᵀHJ/N + ρI)⁻¹ Jᵀ(p − y)/N, with samples outermost inside and outputs outermost outside."""
    samples, classes = logits.shape
    p, y = softmax(logits, axis=1), np.eye(classes)[labels]
    by_sample = J.reshape(classes, samples, -1).transpose(1, 0, 2).reshape(samples * classes, -1)
    H = block_diag(*[np.diag(row) - np.outer(row, row) for row in p])
    fisher = by_sample.T @ H @ by_sample / samples
    gradient = by_sample.T @ (p - y).ravel() / samples
    move = -eta * np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)
    return (by_sample @ move).reshape(samples, classes)


@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 5),
    eta=st.floats(0.1, 2),
    scale=st.floats(0.1, 1.2),
)
@settings(max_examples=40)
def test_newton_step_is_the_pseudo_inverse_and_follows_the_recursion(seed, classes, eta, scale):
    _, logits, labels = case(seed, classes=classes, scale=scale)
    step = theory.newton_logit_step(logits, labels, eta)
    for z, label, found in zip(logits, labels, step, strict=True):
        p = softmax(z)
        gradient = p - np.eye(classes)[label]
        newton = -eta * np.linalg.pinv(np.diag(p) - np.outer(p, p), rcond=1e-10, hermitian=True) @ gradient
        np.testing.assert_allclose(found, newton, rtol=1e-6, atol=1e-8)
        variant = -eta * np.linalg.solve(np.diag(p) - np.outer(p, p) + 1e-9 * np.eye(classes), gradient)
        np.testing.assert_allclose(found, variant, rtol=1e-3, atol=1e-5)  # the variant with the MSE Fisher
    after = losses(logits + step, labels)
    before = losses(logits, labels)
    predicted = theory.newton_losses(before, eta, 1)
    np.testing.assert_allclose(predicted[0], before)
    np.testing.assert_allclose(predicted[1], after, rtol=1e-7, atol=1e-300)
    S = np.expm1(before)
    np.testing.assert_allclose(np.expm1(after), S * np.exp(-eta * (1 + S)), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.7])
def test_loss_ratio_tends_to_its_limit_from_below(classes, eta):
    """On logits stepped one by one, and on the recursion; never interpolating in one step."""
    _, logits, labels = case(3, classes=classes, scale=2.0)
    recursion = theory.newton_losses(losses(logits, labels), eta, 12)
    ratios = []
    for t in range(12):
        before = losses(logits, labels)
        np.testing.assert_allclose(recursion[t], before, rtol=1e-6)
        logits = logits + theory.newton_logit_step(logits, labels, eta)
        ratios.append(losses(logits, labels) / before)
    limit = theory.fitted_loss_ratio(eta)
    assert limit == pytest.approx(np.exp(-eta))
    assert (np.array(ratios) < limit * (1 + 1e-6)).all()
    gaps = limit - np.array(ratios)
    assert (gaps[0] > 10 * gaps[-1]).all()
    np.testing.assert_allclose(ratios[-1], limit, rtol=0.05)


def test_plain_jacobian_fisher_has_no_linear_rate():
    """Without H the step is −η(p − y): the ratio of the loss tends to one, not to exp(−η)."""
    _, logits, labels = case(3)
    y = np.eye(3)[labels]
    for _ in range(400):
        before = losses(logits, labels).mean()
        logits = logits - (softmax(logits, axis=1) - y)
    assert losses(logits, labels).mean() / before > 0.99


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_damped_step_against_the_step_in_parameters(classes, damping):
    J, logits, labels = case(5, classes=classes)
    kernel = J @ J.T / len(labels)
    found = theory.damped_logit_step(kernel, logits, labels, 0.7, damping)
    np.testing.assert_allclose(found, parameter_step(J, logits, labels, 0.7, damping), atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_zero_damping_limit_and_its_gauge(classes):
    """The damped step tends to Newton's in the minimum-norm gauge, which differs from the gauge of mean zero."""
    J, logits, labels = case(6, classes=classes)
    kernel = J @ J.T / len(labels)
    newton = theory.newton_logit_step(logits, labels, 0.7)
    np.testing.assert_allclose(newton.sum(axis=1), 0, atol=1e-12)
    limit = theory.minimum_norm_gauge(kernel, newton)
    errors = [np.abs(parameter_step(J, logits, labels, 0.7, rho) - limit).max() for rho in (1e-4, 1e-5, 1e-6)]
    assert errors[2] < 1e-4
    np.testing.assert_allclose(errors[1:], np.array(errors[:-1]) / 10, rtol=0.1)
    assert np.abs(limit - newton).max() > 0.01
    np.testing.assert_allclose(np.ptp(limit - newton, axis=1), 0, atol=1e-10)
    shifted = newton + np.arange(len(labels))[:, None]
    np.testing.assert_allclose(theory.minimum_norm_gauge(kernel, shifted), limit, atol=1e-9)
    np.testing.assert_allclose(losses(logits + limit, labels), losses(logits + newton, labels), atol=1e-12)


def test_independent_outputs_keep_the_mean_at_zero():
    _, logits, labels = case(7)
    root = np.random.default_rng(0).normal(size=(4, 6))
    kernel = theory.per_output(root @ root.T, 3)
    newton = theory.newton_logit_step(logits, labels, 1.0)
    np.testing.assert_allclose(theory.minimum_norm_gauge(kernel, newton), newton, atol=1e-10)


def test_damping_ends_the_linear_rate_where_the_curvature_falls_below_it():
    J, logits, labels = case(8, scale=0.1)
    kernel = J @ J.T / len(labels)
    ratios = []
    for _ in range(60):
        before = losses(logits, labels).mean()
        logits = logits + theory.damped_logit_step(kernel, logits, labels, 1.0, 1e-3)
        ratios.append(losses(logits, labels).mean() / before)
    assert min(ratios[:8]) < 0.42
    assert ratios[-1] > 0.9


def test_fitted_samples_underflow_to_zero():
    assert theory.newton_losses(np.array([1e-300, 5.0]), 2.0, 400)[-1, 0] == 0


def test_cross_entropy_errors():
    J, logits, labels = case(0)
    kernel = J @ J.T / 4
    with pytest.raises(ValueError, match="labels: expected one class index from 0 to 2"):
        theory.newton_logit_step(logits, labels + 1 - labels.min() + 2, 1.0)
    with pytest.raises(ValueError, match="labels: expected one class index"):
        unwrap(theory.newton_logit_step)(logits, labels[:2], 1.0)
    with pytest.raises(ValueError, match="eta"):
        theory.newton_logit_step(logits, labels, 0.0)
    with pytest.raises(ValueError, match="damping"):
        theory.damped_logit_step(kernel, logits, labels, 1.0, 0.0)
    with pytest.raises(ValueError, match="kernel: axis 0 has 3 entries but must have 12"):
        theory.damped_logit_step(np.eye(3), logits, labels, 1.0, 1.0)
    with pytest.raises(ValueError, match="kernel: is not positive definite"):
        theory.minimum_norm_gauge(np.zeros((12, 12)), logits)
    with pytest.raises(ValueError, match="losses: a cross-entropy is above 0"):
        theory.newton_losses(np.array([0.0]), 1.0, 1)
    with pytest.raises(ValueError, match="steps"):
        theory.newton_losses(np.array([1.0]), 1.0, -1)
    with pytest.raises(ValueError, match="eta"):
        theory.fitted_loss_ratio(-1.0)
