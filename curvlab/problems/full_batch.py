"""Image classification as the literature on full-batch training poses it: networks in PyTorch's own initialisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from curvlab.errors import unknown_name
from curvlab.nn import HalfSquaredError
from curvlab.problems.classification import unit_rows
from curvlab.problems.images import load_images
from curvlab.problems.problem import Problem

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "hardtanh": nn.Hardtanh,
    "softplus": nn.Softplus,
}
"""Activations by name."""

BODIES = ("fc", "cnn", "cnn-avgpool")
NETWORKS = tuple(f"{body}-{activation}" for body in BODIES for activation in ACTIVATIONS)
"""Networks by name: fully connected, and two blocks of convolution, activation and 2 × 2 pooling below a linear layer."""

LOSSES: Mapping[str, Callable[[], nn.Module]] = {
    "half-squared": HalfSquaredError,
    "cross-entropy": nn.CrossEntropyLoss,
}
CLASSES = 10


def full_batch_problem(
    images: str,
    *,
    network: str = "fc-tanh",
    width: int = 200,
    depth: int = 3,
    samples: int = 5000,
    test_samples: int = 500,
    scaling: Literal["standardised", "unit"] = "standardised",
    loss: str = "half-squared",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return all ten classes of an image set with a network that has biases and PyTorch's default initialisation.

    Args:
        images: a key of `curvlab.problems.IMAGE_SETS` with ten classes.
        network: one of `NETWORKS`. The convolutional ones are the published ones but for the number of channels.
        width: units of each hidden layer, or channels of each convolution.
        depth: weight layers of a fully connected network.
        samples: training samples N, the first ones in file order.
        test_samples: test samples, the first ones.
        scaling: "standardised" takes every pixel less its mean over its standard deviation, both over all training images
            of the set; pixels that never change are left at 0. "unit" centres by one scalar and scales ‖x‖₂ to 1.
        loss: "half-squared", ½ Σ_c (z − y)² with 0/1 targets, or "cross-entropy"; both are means over samples.
        seed: of the network's initialisation.
        dtype: of model and data.

    Raises:
        ValueError: an unknown name or a number out of its range.
        DataUnavailable: the image set is absent and cannot be fetched, or is damaged.

    Source: Cohen et al. 2021, appendix and published code (3072-200-200-10, CIFAR-10's first 5000 images, standardised;
    with `cifar10-5k` the statistics are those of the set's own 5000 images).
    """
    body, _, activation = network.rpartition("-")
    if network not in NETWORKS:
        raise unknown_name("network", network, NETWORKS)
    if loss not in LOSSES:
        raise unknown_name("loss", loss, LOSSES)
    if min(width, depth, samples, test_samples) < 1:
        raise ValueError(
            f"width, depth, samples and test_samples must be at least 1; got {width}, {depth}, {samples}, {test_samples}."
        )
    source = load_images(images)
    parts = (
        (source.train_images, source.train_labels, samples),
        (source.test_images, source.test_labels, test_samples),
    )
    pixels = source.train_images.reshape(len(source.train_images), -1).astype(np.float64)
    mean, spread = pixels.mean(axis=0), pixels.std(axis=0)

    def scaled(chosen: np.ndarray) -> Float64[np.ndarray, "N M_0"]:
        if scaling == "unit":
            return unit_rows(chosen)
        flat = chosen.reshape(len(chosen), -1)
        return np.asarray((flat - mean) / np.where(spread > 0, spread, 1.0))

    def prepared(chosen: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = torch.from_numpy(scaled(chosen)).to(dtype)
        if body != "fc":
            inputs = inputs.reshape(*chosen.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        classes = torch.tensor(labels, device="cpu")
        return inputs, classes if loss == "cross-entropy" else torch.eye(CLASSES, dtype=dtype, device="cpu")[classes]

    for what, (chosen, _, count) in zip(("training", "test"), parts, strict=True):
        if len(chosen) < count:
            raise ValueError(f"{images} has {len(chosen)} {what} images; {count} were asked for.")
    train, test = (prepared(chosen[:count], labels[:count]) for chosen, labels, count in parts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(body, ACTIVATIONS[activation], train[0].shape[1:], width, depth)
    return Problem(f"{images} {network}", model.to(dtype), LOSSES[loss](), train, test)


def _model(body: str, activation: Callable[[], nn.Module], shape: torch.Size, width: int, depth: int) -> nn.Sequential:
    if body == "fc":
        sizes = [shape.numel(), *[width] * (depth - 1), CLASSES]
        layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
        for inputs, outputs in pairwise(sizes[1:]):
            layers += [activation(), nn.Linear(inputs, outputs)]
        return nn.Sequential(*layers)
    pool = nn.MaxPool2d if body == "cnn" else nn.AvgPool2d
    channels, height, breadth = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), activation(), pool(2),
        nn.Conv2d(width, width, 3, padding=1), activation(), pool(2),
        nn.Flatten(), nn.Linear(width * (height // 4) * (breadth // 4), CLASSES),
    )  # fmt: skip
