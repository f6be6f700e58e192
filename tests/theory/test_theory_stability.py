"""Thresholds and characteristic roots against companion matrices and against the iterations themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlab.theory import stability

METHODS = st.sampled_from(stability.STEPPERS)
ETAS = st.floats(1e-3, 10.0)
BETAS = st.floats(0.0, 0.99)


def momentum(method, beta):
    return 0.0 if method == "gd" else beta


def transition(method, a, eta, beta):
    """The map (x, v) → (x, v) of one step, from the definitions."""
    v = np.array([a, beta])
    g = np.array([a, 0.0])
    step = {"gd": g, "heavy-ball": v, "nesterov": g + beta * v}[method]
    return np.array([np.array([1.0, 0.0]) - eta * step, v])


@given(METHODS, st.floats(-2.0, 6.0), ETAS, BETAS)
def test_roots_are_the_eigenvalues_of_a_step(method, scaled, eta, beta):
    beta, a = momentum(method, beta), scaled / eta
    found = stability.characteristic_roots(method, [a], eta, beta)[0]
    expected = np.linalg.eigvals(transition(method, a, eta, beta))
    assert np.sort(np.abs(found)) == pytest.approx(np.sort(np.abs(expected)), abs=1e-6)
    assert np.poly(found) == pytest.approx(np.poly(expected), abs=1e-9)
    assert abs(found[0]) >= abs(found[1]) - 1e-12


@given(METHODS, ETAS, BETAS, st.floats(1e-6, 0.9))
def test_the_threshold_parts_stable_from_unstable(method, eta, beta, margin):
    beta = momentum(method, beta)
    edge = stability.sharpness_threshold(method, eta, beta)
    below, at, above = stability.growth(method, [(1 - margin) * edge, edge, (1 + margin) * edge], eta, beta)
    assert below < 1 < above
    assert at == pytest.approx(1.0, abs=1e-12)


def test_the_published_thresholds():
    assert stability.sharpness_threshold("gd", 0.01) == pytest.approx(200)
    assert stability.sharpness_threshold("heavy-ball", 1.0, 0.9) == pytest.approx(3.8)
    assert stability.sharpness_threshold("nesterov", 1.0, 0.9) == pytest.approx(3.8 / 2.8)


@pytest.mark.parametrize(("method", "beta"), [("gd", 0.0), ("heavy-ball", 0.9), ("nesterov", 0.9), ("nesterov", 0.0)])
@pytest.mark.parametrize("side", [0.98, 1.02])
def test_torch_diverges_above_it_only(method, beta, side):
    eta = 0.3
    a = side * stability.sharpness_threshold(method, eta, beta)
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=eta, momentum=beta, nesterov=method == "nesterov" and beta > 0)
    for _ in range(2000):
        optimizer.zero_grad()
        (0.5 * a * x.square()).sum().backward()
        optimizer.step()
    assert (abs(float(x.detach())) > 1) == (side > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gd-", 0.1), "Did you mean 'gd'"),
        (("gd", 0.0), "eta"),
        (("heavy-ball", 0.1, 1.0), "beta"),
        (("gd", 0.1, 0.5), "no momentum"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        stability.sharpness_threshold(*arguments)
