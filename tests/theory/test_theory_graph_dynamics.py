"""Terms of the speed, bounds and conserved matrices of linear graph networks, against autodiff and integration."""

from inspect import unwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from curvlab.theory import graph_dynamics as theory

SEEDS = st.integers(0, 10**6)


def drawn(seed, depth=2, widths=(3, 4, 2), scales=None, outputs=2, n=5):
    """Heads, layers, features and targets."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(after, before)) for before, after in pairwise(widths[: depth + 1])]
    scales = range(depth + 1) if scales is None else scales
    heads = {scale: rng.normal(size=(outputs, widths[scale])) for scale in scales}
    features = [rng.normal(size=(widths[0], n)) for _ in range(depth + 1)]
    return heads, layers, features, rng.normal(size=(outputs, n))


def torch_outputs(heads, layers, features):
    """The same model, layer by layer in torch."""
    result = 0
    for scale, head in heads.items():
        h = features[scale]
        for layer in layers[:scale]:
            h = layer @ h
        result = result + head @ h
    return result


def autodiff(heads, layers, features, loss):
    """V, and squares of the gradients of heads and layers."""
    heads = {scale: torch.tensor(head, requires_grad=True) for scale, head in heads.items()}
    layers = [torch.tensor(layer, requires_grad=True) for layer in layers]
    z = torch_outputs(heads, layers, [torch.from_numpy(G) for G in features])
    gradients = torch.autograd.grad(loss(z), [z, *heads.values(), *layers], allow_unused=True)
    squares = [0.0 if g is None else float(g.square().sum()) for g in gradients[1:]]
    return gradients[0].numpy(), squares[: len(heads)], squares[len(heads) :]


@given(seed=SEEDS, scales=st.sampled_from([(2,), (0, 1, 2), (0, 2), (1,)]), smooth=st.booleans())
@example(seed=29363, scales=(2,), smooth=False)  # an output of 9e-5 is a sum of terms of size 11
@settings(max_examples=30, deadline=None)
def test_terms_of_the_speed_are_squares_of_gradients(seed, scales, smooth):
    heads, layers, features, Y = drawn(seed, scales=scales)
    target = torch.from_numpy(Y)
    loss = (lambda z: (z - target).cosh().log().sum()) if smooth else (lambda z: (z - target).square().sum())
    V, of_heads, of_layers = autodiff(heads, layers, features, loss)
    found_heads, found_layers = theory.speed_terms(heads, layers, features, V)
    np.testing.assert_allclose(list(found_heads.values()), of_heads, rtol=1e-9)
    np.testing.assert_allclose(found_layers, of_layers, rtol=1e-9, atol=1e-12)
    error = np.abs(theory.linear_outputs(heads, layers, features) - torch_outputs(heads, layers, features))
    sizes = {scale: np.abs(head) for scale, head in heads.items()}
    terms = torch_outputs(sizes, [np.abs(layer) for layer in layers], [np.abs(G) for G in features])
    assert (error <= 1e-14 * terms).all()


@given(seed=SEEDS, reference=st.sampled_from([(2,), (0, 1)]))
@settings(max_examples=30, deadline=None)
def test_the_gain_is_a_difference_of_speeds_at_the_same_outputs(seed, reference):
    heads, layers, features, V = drawn(seed)
    old = {scale: heads[scale] for scale in reference}
    speeds = [
        sum(of_heads.values()) + sum(of_layers)
        for of_heads, of_layers in (theory.speed_terms(part, layers, features, V) for part in (heads, old))
    ]
    of_heads, of_layers = theory.speed_gain(heads, layers, features, V, reference)
    assert of_heads >= 0
    assert of_heads + of_layers == pytest.approx(speeds[0] - speeds[1], rel=1e-9, abs=1e-9 * speeds[0])


def test_zero_heads_add_no_term_of_a_layer():
    heads, layers, features, V = drawn(0)
    heads = {scale: head * (scale == 2) for scale, head in heads.items()}
    of_heads, of_layers = theory.speed_gain(heads, layers, features, V, [2])
    assert of_layers == 0
    assert of_heads > 0


def flow(heads, layers, features, Y, times):
    """Gradient flow by autodiff and LSODA: models at the times, and their losses."""
    parts = [*layers, *heads.values()]
    cuts = np.cumsum([part.size for part in parts])[:-1]

    def unpack(state):
        found = [piece.reshape(part.shape) for piece, part in zip(np.split(state, cuts), parts, strict=True)]
        return dict(zip(heads, found[len(layers) :], strict=True)), found[: len(layers)]

    def loss(state):
        now_heads, now_layers = unpack(state)
        z = torch_outputs(now_heads, now_layers, [torch.from_numpy(G) for G in features])
        return (z - torch.from_numpy(Y)).square().sum()

    def slope(_, state):
        tensor = torch.tensor(state, requires_grad=True)
        found = torch.split(tensor, [part.size for part in parts])
        shaped = [piece.view(part.shape) for piece, part in zip(found, parts, strict=True)]
        z = torch_outputs(
            dict(zip(heads, shaped[len(layers) :], strict=True)),
            shaped[: len(layers)],
            [torch.from_numpy(G) for G in features],
        )
        (gradient,) = torch.autograd.grad((z - torch.from_numpy(Y)).square().sum(), tensor)
        return -gradient.numpy()

    start = np.concatenate([part.ravel() for part in parts])
    solved = solve_ivp(slope, (0, times[-1]), start, "LSODA", times, rtol=1e-10, atol=1e-12)
    models = [unpack(state) for state in solved.y.T]
    losses = np.array(
        [float(np.square(torch_outputs(now_heads, now_layers, features) - Y).sum()) for now_heads, now_layers in models]
    )
    return models, losses


@pytest.mark.parametrize("scales", [(2,), (0, 1, 2)])
def test_bound_floor_and_conservation_along_a_flow(scales):
    rng = np.random.default_rng(1)
    layers = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2)]
    heads = {scale: 0.2 * rng.normal(size=(2, 3)) for scale in scales}
    features, Y = [0.4 * rng.normal(size=(3, 5)) for _ in range(3)], rng.normal(size=(2, 5))
    times = np.linspace(0, 1.0, 30)
    models, losses = flow(heads, layers, features, Y, times)
    stack = np.concatenate([features[scale] for scale in scales])
    optimum = theory.optimal_loss(stack, Y)
    products = [theory.layer_products(now, 3) for _, now in models]
    floors = np.array([min(np.linalg.eigvalsh(p[s].T @ p[s])[0] for s in scales) for p in products])
    bound = theory.loss_bound(losses[0] - optimum, floors, theory.least_singular_value(stack), times)
    assert (losses - optimum <= bound * (1 + 1e-8)).all()
    assert bound[-1] < 0.9 * bound[0]
    for before, after in zip(theory.conserved(heads, layers), theory.conserved(*models[-1]), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-7)
    guaranteed = theory.floor_of_products(heads, layers)
    assert guaranteed[-1] > 0
    assert all(np.linalg.eigvalsh(p[s].T @ p[s])[0] >= guaranteed[s] - 1e-8 for p in products for s in range(3))


def test_the_floor_of_orthogonal_layers_is_that_of_their_heads():
    layers = [np.linalg.qr(np.random.default_rng(i).normal(size=(3, 3)))[0] for i in range(3)]
    head = np.array([[0.5, 0.0, 0.0], [0.0, 0.3, 0.0]])
    assert theory.floor_of_products({3: head}, layers) == pytest.approx([1, 0.75, 0.75**2, 0.75**3])
    assert theory.floor_of_products({3: 4 * head}, layers)[1:] == [0, 0, 0]


def test_a_single_scale_needs_full_column_rank():
    """Outputs outside the row space of G_0, which slow heads keep there: the loss stays above the bound of scale 0."""
    features = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    heads, layers = {0: np.array([[1.0]]), 1: np.array([[0.1]])}, [np.array([[0.1]])]
    Y = np.array([[1.0, -0.05]])
    times = np.linspace(0, 1, 20)
    _, losses = flow(heads, layers, features, Y, times)
    optimum = theory.optimal_loss(features[0], Y)
    assert losses[0] > optimum == pytest.approx(0.05**2)
    bound = theory.loss_bound(losses[0] - optimum, np.ones(20), theory.least_singular_value(features[0]), times)
    assert (losses - optimum - bound).max() > 0.3 * (losses[0] - optimum)


def test_rank_nodes_and_optimal_loss():
    rng = np.random.default_rng(0)
    G, Y = rng.normal(size=(6, 4)), rng.normal(size=(2, 4))
    assert theory.dependent_nodes(G).size == 0
    assert theory.least_singular_value(G) == pytest.approx(np.linalg.svd(G, compute_uv=False)[-1])
    assert theory.optimal_loss(G, Y) == pytest.approx(0, abs=1e-20)
    G[:, 2] = 2 * G[:, 0]
    assert theory.dependent_nodes(G).tolist() == [0, 2]
    assert theory.least_singular_value(G) == 0
    residual = Y.T - G.T @ np.linalg.lstsq(G.T, Y.T)[0]
    assert theory.optimal_loss(G, Y) == pytest.approx(np.square(residual).sum())
    G[:, 2] = 0
    assert theory.dependent_nodes(G).tolist() == [2]


def test_the_bound_takes_the_least_floor_so_far():
    bound = theory.loss_bound(2.0, np.array([1.0, 0.5, 4.0]), 0.5, np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(bound, [2, 2 * np.exp(-0.5), 2 * np.exp(-1)])


def test_initial_speed_of_scaled_orthogonal_layers():
    rng = np.random.default_rng(2)
    layers = [0.8 * np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2)]
    heads = {scale: np.zeros((2, 3)) for scale in range(3)}
    features, Y = [rng.normal(size=(3, 5)) for _ in range(3)], rng.normal(size=(2, 5))
    of_heads, of_layers = theory.speed_terms(heads, layers, features, -2 * Y)
    assert theory.initial_speed(range(3), 0.64, features, Y) == pytest.approx(of_heads)
    assert of_layers == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.layer_products([np.ones((2, 3))], 4), "the width before it"),
        (lambda: theory.layer_jacobian(np.ones((1, 2)), [np.eye(2)], 2, 1, 2), "below scale 1"),
        (lambda: theory.speed_terms({3: np.ones((1, 2))}, [np.eye(2)], [np.eye(2)] * 2, np.ones((1, 2))), "scales"),
        (lambda: theory.floor_of_products({1: np.ones((1, 2))}, [np.ones((2, 3))]), "square layers"),
        (lambda: theory.loss_bound(1.0, np.ones(2), 1.0, np.array([1.0, 0.0])), "must ascend"),
        (lambda: theory.loss_bound(-1.0, np.ones(2), 1.0, np.array([0.0, 1.0])), "excess"),
        (lambda: unwrap(theory.optimal_loss)(np.eye(2), np.ones((1, 3))), "one column per training node"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
