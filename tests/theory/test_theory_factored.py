"""K-FAC and unit-wise responses against pseudo-inverses of the blocks themselves, on networks with real δ and h."""

from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ntk_network import Network, dense_response, jacobian, unit_sphere

from curvlab import theory


def kfac_block(delta, inputs):
    samples = len(inputs)
    return np.kron(delta.T @ delta / samples, inputs.T @ inputs / samples)


def dense_unit_wise(delta, inputs, test_delta, test_inputs):
    """Sum over units of J_i' (J_iᵀJ_i/N)⁺ J_iᵀ/N."""
    total = 0
    for unit in range(delta.shape[1]):
        j = jacobian(delta[:, unit : unit + 1], inputs)
        t = jacobian(test_delta[:, unit : unit + 1], test_inputs)
        total = total + t @ np.linalg.pinv(j, rcond=1e-10)
    return total


def network_rows(widths, activation, samples, seed, bias_std=0.0):
    """Training and test (δ, a) of every layer."""
    rng = np.random.default_rng(seed)
    net = Network(widths, activation, rng, bias_std=bias_std)
    _, deltas, inputs = net.rows(unit_sphere(rng, samples, widths[0]))
    _, test_deltas, test_inputs = net.rows(unit_sphere(rng, 3, widths[0]))
    return list(zip(deltas, inputs, test_deltas, test_inputs, strict=True))


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("bias_std", [0.0, 0.4])
def test_rows_of_the_network_are_those_of_autodiff(activation, bias_std):
    rng = np.random.default_rng(0)
    net = Network((3, 5, 4, 2), activation, rng, bias_std=bias_std)
    x = rng.normal(size=(4, 3))
    z, deltas, inputs = net.rows(x)
    act = {"relu": torch.relu, "erf": torch.erf}[activation]
    weights = [
        torch.tensor(np.column_stack([w, b]) if bias_std else w) for w, b in zip(net.weights, net.biases, strict=True)
    ]

    def forward(*parameters):
        h = torch.tensor(x)
        for layer, w in enumerate(parameters):
            fan_in = w.shape[1] - bool(bias_std)
            u = h @ w[:, :fan_in].T * np.sqrt(2 / fan_in)
            if bias_std:
                u = u + bias_std * w[:, fan_in]
            h = act(u) if layer < len(parameters) - 1 else u
        return h.T.reshape(-1)

    np.testing.assert_allclose(forward(*weights), z.T.ravel(), atol=1e-12)
    reference = torch.func.jacrev(forward, argnums=(0, 1, 2))(*weights)
    for delta, a, expected in zip(deltas, inputs, reference, strict=True):
        np.testing.assert_allclose(jacobian(delta, a), expected.flatten(1), atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize(
    ("widths", "samples"),
    [((7, 12, 10, 1), 4), ((7, 14, 13, 3), 4), ((3, 12, 10, 1), 6), ((5, 6, 4, 2), 7), ((4, 9, 2), 3)],
)
def test_kfac_layers_against_the_pseudo_inverse_of_the_kronecker_product(widths, samples, activation):
    for delta, a, test_delta, test_a in network_rows(widths, activation, samples, seed=len(widths)):
        J, J_test, F = jacobian(delta, a), jacobian(test_delta, test_a), kfac_block(delta, a)
        scale = max(1, np.abs(dense_response(J, F, samples, test=J_test)).max())
        np.testing.assert_allclose(
            theory.kfac_layer_response(delta, a), dense_response(J, F, samples), atol=1e-5 * scale
        )
        predicted = theory.kfac_layer_response(delta, a, test_delta, test_a)
        np.testing.assert_allclose(predicted, dense_response(J, F, samples, test=J_test), atol=1e-5 * scale)
        if np.linalg.matrix_rank(a) == samples:
            kernels = (delta @ delta.T, a @ a.T, test_delta @ delta.T, test_a @ a.T)
            np.testing.assert_allclose(theory.kfac_kernel_response(*kernels), predicted, atol=1e-5 * scale)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_kfac_alpha_with_samples_below_the_widths(outputs, activation):
    """N·I from every hidden layer, I from the last: N(L − 1) + 1 instead of the published N·L."""
    samples = 5
    widths = (8, 60, 50, outputs)
    layers = [theory.kfac_layer_response(d, a) for d, a, _, _ in network_rows(widths, activation, samples, 1)]
    identity = np.eye(samples * outputs)
    np.testing.assert_allclose(layers[0], samples * identity, atol=1e-9)
    np.testing.assert_allclose(layers[1], samples * identity, atol=1e-9)
    np.testing.assert_allclose(layers[2], identity, atol=1e-9)
    assert theory.alpha("kfac", widths, samples) == samples * 2 + 1
    assert theory.published_alpha("kfac", 3, 60, samples) == samples * 3


@pytest.mark.parametrize("outputs", [1, 2])
def test_kfac_first_layer_with_low_dimensional_inputs_is_the_leverages(outputs):
    samples, widths = 9, (4, 60, 50, outputs)
    rows = network_rows(widths, "erf", samples, 2)
    delta, a, _, _ = rows[0]
    leverage = theory.leverages(a)
    hat = a @ np.linalg.inv(a.T @ a) @ a.T
    np.testing.assert_allclose(leverage, np.diag(hat), atol=1e-12)
    assert leverage.sum() == pytest.approx(4)
    expected = np.diag(np.tile(samples * leverage, outputs))
    np.testing.assert_allclose(theory.kfac_layer_response(delta, a), expected, atol=1e-8)
    total = sum(theory.kfac_layer_response(d, h) for d, h, _, _ in rows)
    assert np.diag(total).mean() == pytest.approx(theory.alpha("kfac", widths, samples))
    assert theory.alpha("kfac", widths, samples) == pytest.approx(4 + samples + 1)


def test_kfac_first_layer_is_isotropic_after_the_forster_transform():
    rng = np.random.default_rng(4)
    raw = rng.normal(size=(12, 4))
    points = theory.forster_transform(raw, tolerance=1e-11).apply(raw)
    _, deltas, inputs = Network((4, 60, 50, 1), "relu", rng).rows(points)
    np.testing.assert_allclose(theory.kfac_layer_response(deltas[0], inputs[0]), 4 * np.eye(12), atol=1e-8)


def test_kfac_with_more_rows_than_units_is_not_isotropic_and_alpha_is_its_mean():
    samples, widths = 6, (8, 60, 10, 3)  # NC = 18 > 10
    layers = [theory.kfac_layer_response(d, a) for d, a, _, _ in network_rows(widths, "erf", samples, 3)]
    assert np.linalg.eigvalsh(layers[1]).min() < 0.9 * samples
    total = sum(layers)
    assert np.diag(total).mean() == pytest.approx(theory.alpha("kfac", widths, samples))


def test_kfac_last_layer_with_more_samples_than_inputs_is_a_projector():
    samples, widths = 9, (12, 6, 2)
    delta, a, _, _ = network_rows(widths, "erf", samples, 3)[-1]
    values = np.linalg.eigvalsh(theory.kfac_layer_response(delta, a))
    np.testing.assert_allclose(np.sort(values), [0] * 6 + [1] * 12, atol=1e-9)


def test_infinite_width_kfac_is_the_limit_of_its_layers():
    """Layer responses at test points approach those of the limit kernels, at a rate that falls with the width."""
    rng = np.random.default_rng(5)
    x, x_test = unit_sphere(rng, 6, 8), unit_sphere(rng, 4, 8)
    limit = theory.infinite_width_kernels(x, depth=3)
    cross = theory.infinite_width_kernels(x_test, x, depth=3)
    expected = [
        theory.kfac_kernel_response(*kernels)
        for kernels in zip(limit.backward, limit.forward, cross.backward, cross.forward, strict=True)
    ]
    errors = []
    for width in (128, 2048):
        per_seed = []
        for seed in range(4):
            net = Network((8, width, width, 1), "relu", np.random.default_rng(seed))
            _, deltas, inputs = net.rows(x)
            _, test_deltas, test_inputs = net.rows(x_test)
            found = [
                theory.kfac_layer_response(*arrays)
                for arrays in zip(deltas, inputs, test_deltas, test_inputs, strict=True)
            ]
            per_seed.append([np.sqrt(np.mean((f - e) ** 2)) for f, e in zip(found, expected, strict=True)])
        errors.append(np.mean(per_seed, axis=0))
    assert (errors[1] < 0.5 * errors[0]).all()  # O(M^-½) would be a quarter
    assert (errors[1] < [1.0, 1.0, 0.1]).all()


@given(
    outputs=st.integers(1, 3),
    samples=st.integers(1, 6),
    fan_in=st.integers(1, 8),
    width=st.integers(1, 5),
    share=st.sampled_from([0.3, 0.7, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_unit_wise_layer_against_pseudo_inverses_of_units(outputs, samples, fan_in, width, share, seed):
    """Random δ with inactive (unit, sample) pairs, for all outputs at once as in a network."""
    rng = np.random.default_rng(seed)
    active = rng.random((samples, width)) < share
    active_test = rng.random((2, width)) < share
    a, test_a = rng.normal(size=(samples, fan_in)), rng.normal(size=(2, fan_in))
    delta = (rng.normal(size=(outputs, samples, width)) * active).reshape(-1, width)
    test_delta = (rng.normal(size=(outputs, 2, width)) * active_test).reshape(-1, width)
    train = dense_unit_wise(delta, a, delta, a)
    np.testing.assert_allclose(theory.unit_wise_layer_response(delta, a), train, atol=1e-6 * width)
    reference = dense_unit_wise(delta, a, test_delta, test_a)
    found = theory.unit_wise_layer_response(delta, a, test_delta, test_a)
    np.testing.assert_allclose(found, reference, atol=1e-5 * max(1, np.abs(reference).max()))


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize(("outputs", "samples", "inputs"), [(1, 4, 7), (3, 4, 7), (1, 9, 4), (2, 9, 4)])
def test_unit_wise_layers_of_a_network(activation, outputs, samples, inputs):
    for arrays in network_rows((inputs, 12, 11, outputs), activation, samples, 6, bias_std=0.2):
        reference = dense_unit_wise(*arrays)
        found = theory.unit_wise_layer_response(*arrays)
        np.testing.assert_allclose(found, reference, atol=1e-6 * max(1, np.abs(reference).max()))


def test_unit_wise_counts_the_active_units_of_one_output():
    delta, a, _, _ = network_rows((9, 40, 30, 1), "relu", 5, 7)[1]
    counts = np.diag((delta != 0).sum(axis=1))
    np.testing.assert_allclose(theory.unit_wise_layer_response(delta, a), counts, atol=1e-8)


@pytest.mark.parametrize(("activation", "active"), [("relu", 0.5), ("erf", 1.0)])
@pytest.mark.parametrize("outputs", [1, 3])
def test_unit_wise_alpha_is_approached_with_width(activation, active, outputs):
    """γM(L − 1)/C + 1: divided by C, unlike the published γM(L − 1), and with the last layer's 1."""
    samples, deviations = 4, []
    for width in (64, 1024):
        widths = (10, width, width, outputs)
        expected = theory.alpha("unit-wise", widths, samples, active=active)
        assert expected == pytest.approx(active * width * 2 / outputs + 1)
        rows = network_rows(widths, activation, samples, 8)
        total = sum(theory.unit_wise_layer_response(d, a) for d, a, _, _ in rows)
        deviations.append(np.abs(total / expected - np.eye(len(total))).max())
    if activation == "erf" and outputs == 1:  # every unit is active for every sample: exact at any width
        assert max(deviations) < 1e-8
    else:
        assert deviations[1] < 0.5 * deviations[0]
        assert deviations[1] < 0.15


def test_unit_wise_alpha_with_low_dimensional_inputs_is_the_mean_of_the_diagonal():
    widths, samples = (3, 40, 30, 2), 8
    total = sum(theory.unit_wise_layer_response(d, a) for d, a, _, _ in network_rows(widths, "erf", samples, 9))
    assert np.diag(total).mean() == pytest.approx(theory.alpha("unit-wise", widths, samples))
    assert np.abs(total - np.diag(np.diag(total))).max() > 0.1


def test_chunks_of_units_add_up(monkeypatch):
    arrays = network_rows((9, 40, 30, 2), "relu", 5, 7)[1]
    whole = theory.unit_wise_layer_response(*arrays)
    monkeypatch.setattr("curvlab.theory.factored._CHUNK", 100)
    np.testing.assert_allclose(theory.unit_wise_layer_response(*arrays), whole, atol=1e-10)


@pytest.mark.parametrize("name", ["kfac_layer_response", "unit_wise_layer_response"])
def test_factor_errors(name):
    respond = unwrap(getattr(theory, name))
    delta, a = np.ones((6, 4)), np.ones((3, 5))
    with pytest.raises(ValueError, match="delta: has 5 rows, which is not a multiple of the 3 samples"):
        respond(delta[:5], a)
    with pytest.raises(ValueError, match="give both"):
        respond(delta, a, delta)
    with pytest.raises(ValueError, match="test_delta: axis 1 has 3 entries but must have 4"):
        respond(delta, a, delta[:, :3], a)
    with pytest.raises(ValueError, match="test_inputs: axis 1 has 4 entries"):
        respond(delta, a, delta, a[:, :4])
    with pytest.raises(ValueError, match="test_delta: axis 0 has 5 entries but must have 6"):
        respond(delta, a, delta[:5], a)
    with pytest.raises(ValueError, match=r"delta: the entry at \(0, 0\) is not finite"):
        respond(delta * np.inf, a)
    with pytest.raises(ValueError, match="forward: must be symmetric"):
        theory.kfac_kernel_response(np.eye(2), np.array([[1.0, 2.0], [0.0, 1.0]]))
