"""Infinite-width kernels against quadrature, the published recursion and wide random networks."""

from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ntk_network import ACTIVATIONS, Network, unit_sphere
from scipy import stats

from curvlab import theory


def gaussian_moments(activation, covariance, points=160):
    """E[φφ'] and E[φ'φ'] by quadrature in polar coordinates, whose radial part splits off for ReLU."""
    phi, slope = ACTIVATIONS[activation]
    root = np.linalg.cholesky(covariance)
    radii, weights = np.polynomial.laguerre.laggauss(points)  # ∫ e^{-s} f(√(2s)) ds
    keep = weights > 0
    radii, weights = np.sqrt(2 * radii[keep]), weights[keep]
    angles = (np.arange(20000) + 0.5) * 2 * np.pi / 20000
    directions = root @ np.stack([np.cos(angles), np.sin(angles)])
    value = derivative = 0.0
    for radius, weight in zip(radii, weights, strict=True):
        u, v = radius * directions
        value += weight * np.mean(phi(u) * phi(v))
        derivative += weight * np.mean(slope(u) * slope(v))
    return value, derivative


@pytest.mark.parametrize("activation", ["relu", "erf"])
@given(
    norms=st.tuples(st.floats(0.3, 2), st.floats(0.3, 2)),
    correlation=st.floats(-0.95, 0.95),
    weight_std=st.floats(0.5, 2),
    bias_std=st.floats(0, 1),
)
@settings(max_examples=12)
def test_two_layers_against_quadrature(activation, norms, correlation, weight_std, bias_std):
    x = np.array([[norms[0], 0.0], [norms[1] * correlation, norms[1] * np.sqrt(1 - correlation**2)]])
    kernels = theory.infinite_width_kernels(x, depth=2, activation=activation, weight_std=weight_std, bias_std=bias_std)
    first = weight_std**2 * x @ x.T / 2 + bias_std**2
    np.testing.assert_allclose(kernels.forward[0], first, atol=1e-12)
    value, derivative = gaussian_moments(activation, first)
    tolerance = 2e-4 if activation == "relu" else 1e-6
    assert kernels.forward[1][0, 1] == pytest.approx(weight_std**2 * value + bias_std**2, abs=tolerance)
    assert kernels.backward[0][0, 1] == pytest.approx(weight_std**2 * derivative, abs=tolerance * weight_std**2)
    np.testing.assert_array_equal(kernels.backward[1], np.ones((2, 2)))


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("weight_std", [1.0, np.sqrt(2)])
def test_published_recursion(depth, weight_std):
    """ReLU, no bias, unit norm: the recursion of the published code, and its constant diagonal."""
    rng = np.random.default_rng(depth)
    x = unit_sphere(rng, 5, 4)
    A, q, forward, slopes = x @ x.T / 4, weight_std**2 / 4, [], []
    for _ in range(depth):
        Q = weight_std**2 * A
        R = np.clip(Q / q, -1, 1)
        forward.append(Q)
        A = q / (2 * np.pi) * (np.sqrt(1 - R**2) + np.pi / 2 * R + R * np.arcsin(R))
        slopes.append((np.arcsin(R) + np.pi / 2) / (2 * np.pi))
        q *= weight_std**2 / 2
    B, backward = np.ones((5, 5)), []
    for slope in [*slopes[depth - 2 :: -1], None] if depth > 1 else [None]:
        backward.insert(0, B)
        B = B if slope is None else weight_std**2 * B * slope
    kernels = theory.infinite_width_kernels(x, depth=depth, weight_std=weight_std)
    np.testing.assert_allclose(kernels.forward, forward, atol=1e-7)
    np.testing.assert_allclose(kernels.backward, backward, atol=1e-7)
    np.testing.assert_allclose(kernels.layers, np.multiply(backward, forward), atol=1e-7)
    np.testing.assert_allclose(kernels.ntk, kernels.layers.sum(0), atol=1e-14)
    diagonal = weight_std**2 / 4 * (weight_std**2 / 2) ** (depth - 1)
    np.testing.assert_allclose(np.diagonal(kernels.layers, axis1=1, axis2=2), diagonal, rtol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("bias_std", [0.0, 0.5])
def test_wide_random_networks(activation, bias_std):
    """Means over independent networks within t-intervals (Bonferroni over entries) around the limit.

    A mean over networks has a bias of order 1/M, for which an allowance of 4/M times the kernel's scale is made.
    """
    depth, width, seeds = 4, 512, 30
    rng = np.random.default_rng(11)
    x, other = rng.normal(size=(3, 5)), rng.normal(size=(2, 5))
    options = {"depth": depth, "activation": activation, "bias_std": bias_std, "weight_std": 1.3}
    limit = theory.infinite_width_kernels(x, other, **options)
    found = {"forward": [], "backward": [], "layers": []}
    for seed in range(seeds):
        net = Network((5, *(width,) * (depth - 1), 1), activation, np.random.default_rng(seed), 1.3, bias_std)
        _, deltas, inputs = net.rows(x)
        _, deltas_other, inputs_other = net.rows(other)
        forward = np.array([a @ b.T for a, b in zip(inputs, inputs_other, strict=True)])
        backward = np.array([a @ b.T for a, b in zip(deltas, deltas_other, strict=True)])
        for name, value in (("forward", forward), ("backward", backward), ("layers", forward * backward)):
            found[name].append(value)
    for name, values in found.items():
        sample = np.array(values)
        entries = sample[0].size
        error = sample.std(axis=0, ddof=1) / np.sqrt(seeds)
        scale = np.abs(getattr(limit, name)).max()
        margin = stats.t.ppf(1 - 0.005 / entries, seeds - 1) * error + 4 / width * scale
        difference = np.abs(sample.mean(axis=0) - getattr(limit, name))
        assert (difference <= margin + 1e-12).all(), name
        assert margin.max() < 0.2 * scale, name  # the interval is narrow enough to refute


def test_cross_kernel_is_a_block_of_the_joint_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4))
    joint = theory.infinite_width_kernels(x, depth=3, activation="erf", bias_std=0.2)
    cross = theory.infinite_width_kernels(x[:2], x[2:], depth=3, activation="erf", bias_std=0.2)
    np.testing.assert_allclose(cross.layers, joint.layers[:, :2, 2:], atol=1e-13)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_positivity_and_duplicates(activation):
    """Distinct inputs on the sphere: every layer's kernel is positive definite; a duplicate makes it singular."""
    x = unit_sphere(np.random.default_rng(1), 20, 25)
    for layer in theory.infinite_width_kernels(x, depth=3, activation=activation).layers:
        assert np.linalg.eigvalsh(layer).min() > 1e-4 * np.linalg.eigvalsh(layer).max()
    x = np.concatenate([x, x[:1] * (1 + 1e-16)])
    for layer in theory.infinite_width_kernels(x, depth=3, activation=activation).layers:
        values = np.linalg.eigvalsh(layer)
        assert values.min() < 1e-12 * values.max()


def test_relu_kernels_are_homogeneous_in_the_inputs():
    x = np.random.default_rng(2).normal(size=(4, 3))
    one = theory.infinite_width_kernels(x, depth=4)
    scaled = theory.infinite_width_kernels(3 * x, depth=4)
    np.testing.assert_allclose(scaled.layers, 9 * one.layers, rtol=1e-12)
    np.testing.assert_allclose(scaled.backward, one.backward, rtol=1e-12)


def test_per_output_row_order():
    kernel = np.array([[1.0, 2.0]])
    np.testing.assert_array_equal(theory.per_output(kernel, 2), [[1, 2, 0, 0], [0, 0, 1, 2]])
    with pytest.raises(ValueError, match="outputs: must be at least 1"):
        theory.per_output(kernel, 0)


def test_zero_inputs_need_a_bias_with_relu():
    x = np.array([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="inputs: row 1 is zero"):
        theory.infinite_width_kernels(x, depth=2)
    with pytest.raises(ValueError, match="other: row 1 is zero"):
        theory.infinite_width_kernels(x[:1], x, depth=2)
    assert theory.infinite_width_kernels(x, depth=2, bias_std=0.1).ntk[1, 1] > 0
    assert theory.infinite_width_kernels(x, depth=2, activation="erf").ntk[1, 1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: must be at least 1"),
        ({"depth": 2, "activation": "relo"}, "no closed form for 'relo'. Did you mean 'relu'"),
        ({"depth": 2, "activation": "zzz"}, "Known: relu, erf"),
        ({"depth": 2, "weight_std": 0.0}, "weight_std: must be a finite number above 0"),
        ({"depth": 2, "bias_std": -1.0}, "bias_std: must be a finite number, 0 or above"),
    ],
)
def test_kernel_errors(options, message):
    with pytest.raises(ValueError, match=message):
        theory.infinite_width_kernels(np.ones((2, 3)), **options)


def test_kernel_shape_errors():
    with pytest.raises(ValueError, match="other: axis 1 has 2 entries but must have 3"):
        unwrap(theory.infinite_width_kernels)(np.ones((2, 3)), np.ones((2, 2)), depth=2)
    with pytest.raises(ValueError, match="inputs: expected a non-empty array with 2 axes"):
        unwrap(theory.infinite_width_kernels)(np.ones(3), depth=2)
