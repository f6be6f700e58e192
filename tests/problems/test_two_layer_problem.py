"""The two problems with the two-layer network: data, similarity and conditioning, seeds, refusals."""

import numpy as np
import pytest
import torch

from curvlab import theory
from curvlab.nn import Erf, HalfSquaredError, TwoLayer
from curvlab.problems import resolve, synthetic_two_layer_problem, two_layer_problem

PROBLEMS = ["two-layer", "synthetic-two-layer"]


def inputs(**arguments: object) -> np.ndarray:
    return synthetic_two_layer_problem(**arguments, width=2).train[0].numpy()


@pytest.mark.parametrize("name", PROBLEMS)
def test_network_loss_and_unit_inputs(name):
    problem = resolve(name, width=6, activation="erf", samples=11, test_samples=7, depth=5)
    assert problem.name == name
    assert isinstance(problem.model, TwoLayer)
    assert isinstance(problem.model.activation, Erf)
    assert list(problem.model.hidden.weight.shape) == [6, problem.train[0].shape[1]]
    assert isinstance(problem.loss, HalfSquaredError)
    assert problem.loss.reduction == "mean"
    for (x, y), count in ((problem.train, 11), (problem.test, 7)):
        assert list(y.shape) == [count, 1]
        torch.testing.assert_close(x.norm(dim=1), torch.ones(count, dtype=torch.float64))
    assert problem.loss(problem.model(problem.train[0]), problem.train[1]).isfinite()


def test_digits_are_those_of_the_image_problem():
    ours, digits = resolve("two-layer", width=3), resolve("digits", width=3)
    for a, b in zip((*ours.train, *ours.test), (*digits.train, *digits.test), strict=True):
        assert torch.equal(a, b)
    other = two_layer_problem("digits", classes=(4, 9), width=3, samples=20)
    assert other.train[1].unique().tolist() == [-0.5, 0.5]
    assert not torch.equal(other.train[0], ours.train[0][:20])
    assert np.linalg.eigvalsh(theory.two_layer_limit_gram(ours.train[0].numpy()))[0] > 0.01


@pytest.mark.parametrize("name", PROBLEMS)
def test_seed_and_scale_of_the_network(name):
    first, again, other = (resolve(name, width=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.model.hidden.weight, again.model.hidden.weight)
    assert not torch.equal(first.model.hidden.weight, other.model.hidden.weight)
    wide = resolve(name, width=5, seed=0, weight_std=3.0)
    torch.testing.assert_close(wide.model.hidden.weight, 3 * first.model.hidden.weight)
    assert torch.equal(wide.train[0], first.train[0])
    single = resolve(name, width=5, dtype=torch.float32)
    assert torch.equal(single.train[0], first.train[0].float())
    assert torch.equal(single.model.hidden.weight, first.model.hidden.weight.float())


def test_synthetic_data_depend_on_the_seed_and_neither_on_the_network_nor_the_targets_on_similarity():
    first = synthetic_two_layer_problem(width=5, seed=1)
    for change in ({"width": 9}, {"activation": "erf"}):
        same = synthetic_two_layer_problem(**{"width": 5, "seed": 1, **change})
        assert torch.equal(same.train[0], first.train[0])
        assert torch.equal(same.test[0], first.test[0])
    near = synthetic_two_layer_problem(width=5, seed=1, similarity=0.99)
    assert torch.equal(near.train[1], first.train[1])
    assert torch.equal(near.model.hidden.weight, first.model.hidden.weight)
    assert not torch.equal(synthetic_two_layer_problem(width=5, seed=2).train[0], first.train[0])


@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.9])
def test_similarity_is_the_mean_inner_product_of_different_inputs(similarity):
    x = inputs(similarity=similarity, samples=2000, dimension=6)
    n = len(x)
    mean = (np.linalg.norm(x.sum(axis=0)) ** 2 - n) / (n * (n - 1))
    assert mean == pytest.approx(similarity, abs=0.005)
    assert np.linalg.matrix_rank(x) == (6 if similarity else 5)


def test_targets_are_sides_of_a_plane_that_test_data_share():
    problem = synthetic_two_layer_problem(width=2, samples=500, test_samples=500, dimension=4)
    x, y = (part.numpy() for part in problem.train)
    assert set(y.ravel()) == {-1.0, 1.0}
    normal = np.linalg.lstsq(x[:, 1:], y.ravel())[0]
    x_test, y_test = (part.numpy() for part in problem.test)
    assert np.mean(np.sign(x_test[:, 1:] @ normal) == y_test.ravel()) > 0.95
    assert 0.3 < np.mean(y > 0) < 0.7


@pytest.mark.parametrize(("activation", "exponent"), [("relu", 0.5), ("erf", 2.0)])
def test_least_eigenvalue_falls_by_decades_with_similarity(activation, exponent):
    distances = np.array([1e-2, 1e-3, 1e-4])
    grams = [theory.two_layer_limit_gram(inputs(similarity=1 - distance), activation) for distance in distances]
    least = [np.linalg.eigvalsh(gram)[0] for gram in grams]
    slopes = np.diff(np.log(least)) / np.diff(np.log(distances))
    np.testing.assert_allclose(slopes, exponent, atol=0.05)
    np.testing.assert_allclose([np.trace(gram) for gram in grams], np.trace(grams[0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": 1.0}, r"similarity must lie in \[0, 1\), not 1.0: at 1 all inputs are equal"),
        ({"similarity": -0.1}, r"similarity must lie in \[0, 1\)"),
        ({"similarity": float("nan")}, r"similarity must lie in \[0, 1\)"),
        ({"dimension": 2}, "dimension must be at least 3"),
        ({"samples": 0}, "got 16, 0 and 50"),
        ({"width": 0}, "sizes must be at least 1"),
        ({"activation": "tahn"}, "Did you mean 'tanh'"),
    ],
)
def test_synthetic_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_two_layer_problem(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": (0, 1, 2)}, "one output takes two distinct classes"),
        ({"samples": 5000}, "5000 were asked for"),
        ({"test_samples": 0}, "samples and test_samples must be at least 1"),
        ({"weight_std": -1.0}, "weight_std must be a finite number above 0"),
    ],
)
def test_digit_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        two_layer_problem("digits", **arguments)
