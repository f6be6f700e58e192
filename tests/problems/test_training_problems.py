"""Problems as practitioners train them: images with ordinary networks, and text with a transformer."""

import os
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvlab
from curvlab.problems import DataUnavailable, resolve
from curvlab.problems.short_text import SHORT_TEXT, short_text_problem
from curvlab.problems.text import ALPHABET, CharacterTransformer, character_problem, encoded, manual
from curvlab.problems.vision import standardised

HAS_FILES = bool(os.environ.get("CURVLAB_DATA"))


def test_digits_are_standardised_by_the_training_images():
    problem = resolve("digits-mlp")
    images = load_digits().images
    mean, std = images[:-500].mean(), images[:-500].std()
    np.testing.assert_allclose(problem.train[0][:, 0].numpy(), (images[:-500] - mean) / std, atol=1e-12)
    np.testing.assert_allclose(problem.test[0][:, 0].numpy(), (images[-500:] - mean) / std, atol=1e-12)
    assert problem.train[1].tolist() == load_digits().target[:-500].tolist()


def test_colours_are_standardised_one_by_one():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 4, 5, 3), np.uint8)
    found = standardised(images, images)
    assert found.shape == (7, 3, 4, 5)
    np.testing.assert_allclose(found.mean((0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(found.std((0, 2, 3)), 1, rtol=1e-12)
    one = (images[2, :, :, 1] - images[..., 1].mean()) / images[..., 1].std()
    np.testing.assert_allclose(found[2, 1], one, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits-mlp", (1, 8, 8)),
        ("digits-residual", (1, 8, 8)),
        ("fashion-mlp", (1, 28, 28)),
        ("fashion-lenet", (1, 28, 28)),
        ("cifar10-5k-cnn", (3, 32, 32)),
        ("cifar10-5k-residual", (3, 32, 32)),
    ],
)
def test_image_problems(name, shape):
    if "digits" not in name and not HAS_FILES:
        pytest.skip("CURVLAB_DATA does not name a folder with the images")
    problem = resolve(name, seed=1)
    assert problem.train[0].shape[1:] == shape
    assert isinstance(problem.loss, nn.CrossEntropyLoss)
    z = problem.model(problem.train[0][:4])
    assert z.shape == (4, 10)
    again, other = resolve(name, seed=1), resolve(name, seed=2)
    weights = [next(p.model.parameters()) for p in (problem, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(problem.train[0], other.train[0])


def test_seed_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    resolve("digits-mlp", seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_the_residual_network_has_rows_in_evaluation_mode():
    problem = resolve("digits-residual", width=2)
    x, y = problem.train
    rows = curvlab.sqrt_fisher(problem.model.eval(), problem.loss, x[:3], y[:3])
    assert sum(p.numel() for p in problem.model.parameters()) == rows.P


def test_text_targets_are_the_characters_that_follow():
    problem = character_problem(samples=5, test_samples=3, length=16, width=8, heads=2)
    text = manual()[: 8 * 16 + 1]
    codes = [ALPHABET.find(c) if c in ALPHABET else ALPHABET.find(" ") for c in text]
    inputs = torch.cat([problem.train[0], problem.test[0]]).flatten().tolist()
    targets = torch.cat([problem.train[1], problem.test[1]]).flatten().tolist()
    assert inputs == codes[:-1]
    assert targets == codes[1:]


def test_characters_outside_the_alphabet_are_blanks():
    assert encoded("a\t√b\n").tolist() == encoded("a  b\n").tolist()
    assert len(set(encoded(ALPHABET).tolist())) == len(ALPHABET) == 96


def test_the_transformer_is_causal_and_has_one_logit_a_character_and_position():
    torch.manual_seed(0)
    model = CharacterTransformer(len(ALPHABET), 12, width=8, depth=2, heads=2).double()
    x = torch.randint(len(ALPHABET), (2, 12))
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % len(ALPHABET)
    before, after = model(x), model(changed)
    assert before.shape == (2, len(ALPHABET), 12)
    torch.testing.assert_close(before[..., :7], after[..., :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[..., 7:], after[..., 7:])


def test_the_transformer_has_rows():
    problem = character_problem(samples=3, test_samples=1, length=6, width=8, heads=2, depth=1)
    x, y = problem.train
    generator = torch.Generator().manual_seed(0)
    rows = curvlab.sqrt_fisher(problem.model, problem.loss, x, y, "mc", generator=generator)
    assert sum(p.numel() for p in problem.model.parameters()) == rows.P


def test_text_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataUnavailable, match="pydoc_data"):
        character_problem()


@pytest.mark.parametrize(
    ("options", "message"), [({"width": 9, "heads": 2}, "multiple"), ({"samples": 10**6}, "text has")]
)
def test_text_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        character_problem(**options)


@pytest.mark.parametrize("name", SHORT_TEXT)
def test_short_text_networks_are_of_like_size_and_have_rows(name):
    problem = resolve(name, samples=3)
    x, y = problem.train
    rows = curvlab.sqrt_fisher(problem.model, problem.loss, x, y)
    assert 1500 < rows.P < 2100
    assert y.shape == ((3, 8) if name in ("short-text", "short-text-cnn") else (3,))
    assert problem.model(x).shape == (3, 28, *y.shape[1:])


@pytest.mark.parametrize("name", ["short-text", "short-text-cnn"])
def test_short_text_networks_that_predict_everywhere_see_no_later_character(name):
    problem = resolve(name, samples=2)
    x = problem.train[0]
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 28
    before, after = problem.model(x), problem.model(changed)
    torch.testing.assert_close(before[..., :5], after[..., :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[..., 5:], after[..., 5:])


def test_all_short_text_networks_have_the_same_text_and_frequent_characters_first():
    first, *others = (resolve(name, samples=4) for name in SHORT_TEXT)
    for other in others:
        assert torch.equal(other.train[0], first.train[0])
    few = short_text_problem(characters=3, samples=4)
    text = manual().lower()[:32]
    assert few.train[0].flatten().tolist() == [max(0, " et".find(character)) for character in text]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"characters": 29}, "28"),
        ({"width": 7}, "heads"),
        ({"depth": 0}, "depth"),
        ({"network": "transformr"}, "Did you mean 'transformer'"),
        ({"length": 10**6}, "fewer or shorter samples"),
    ],
)
def test_short_text_options_are_checked(options, named):
    with pytest.raises(ValueError, match=named):
        short_text_problem(**options)
