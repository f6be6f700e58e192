"""Chebyshev regression and the networks of full-batch training."""

import numpy as np
import pytest
import torch
from torch import nn

from curvlab.problems.chebyshev import GAIN, chebyshev_problem
from curvlab.problems.full_batch import NETWORKS, full_batch_problem


@pytest.mark.parametrize("degree", [0, 3, 5])
def test_targets_are_the_polynomial(degree):
    problem = chebyshev_problem(degree=degree, width=7)
    x, y = problem.train
    assert x.shape == y.shape == (20, 1)
    assert y.numpy() == pytest.approx(np.cos(degree * np.arccos(x.numpy())), abs=1e-12)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert problem.test[0].shape == (19, 1)


def test_the_network_is_the_published_one():
    model = chebyshev_problem(width=10_000).model
    assert [tuple(p.shape) for p in model.parameters()] == [(10_000, 1), (10_000,), (1, 10_000)]
    expected = np.sqrt(2 / 10_001)
    assert float(model[0].weight.detach().std()) == pytest.approx(GAIN * expected, rel=0.05)
    assert float(model[2].weight.detach().std()) == pytest.approx(expected, rel=0.05)
    assert not model[0].bias.detach().any()


def test_seeds_differ_and_repeat():
    first, again, other = (chebyshev_problem(seed=seed).model[0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"degree": -1}, {"width": 0}, {"samples": 1}])
def test_arguments_are_checked(options):
    with pytest.raises(ValueError, match="must be at least"):
        chebyshev_problem(**options)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_takes_the_images(network):
    problem = full_batch_problem("digits", network=network, width=4, samples=12, test_samples=3)
    outputs = problem.model(problem.train[0])
    assert outputs.shape == problem.train[1].shape == (12, 10)
    assert (problem.train[1].sum(dim=1) == 1).all()
    assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in problem.model.modules()) == 3


def test_pixels_are_standardised_over_the_set():
    x = full_batch_problem("digits", samples=1297).train[0]
    changing = x.std(dim=0) > 0
    assert x[:, changing].mean(dim=0).abs().max() < 1e-12
    assert x[:, changing].std(dim=0, correction=0).numpy() == pytest.approx(1.0)
    assert not x[:, ~changing].any()


def test_unit_inputs_and_class_targets():
    problem = full_batch_problem("digits", scaling="unit", samples=9, loss="cross-entropy")
    assert problem.train[0].norm(dim=1).numpy() == pytest.approx(1.0)
    assert problem.train[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "fc-tan"}, "Did you mean 'fc-tanh'"),
        ({"loss": "cross-entropi"}, "Did you mean 'cross-entropy'"),
        ({"depth": 0}, "at least 1"),
        ({"samples": 10_000}, "were asked for"),
    ],
)
def test_names_and_numbers_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        full_batch_problem("digits", **options)
