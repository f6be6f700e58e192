"""Image classification as practitioners train it: all classes, ordinary networks, cross-entropy, PyTorch's initialisation."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from curvlab.problems.images import load_images
from curvlab.problems.problem import Problem


class Residual(nn.Module):
    """x + f(x), or s(x) + f(x) with a shortcut that changes the shape."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add branch and shortcut."""
        result: Tensor = self.shortcut(x) + self.branch(x)
        return result


def seeded(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    """Return a module whose initialisation depends on the seed alone, the same in every dtype up to rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(dtype)


def digits_mlp_problem(*, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Return the ten digits of scikit-learn with an MLP of two hidden layers, 64-M-M-10.

    Args:
        width: Units M of each hidden layer.
        seed: Of the network's initialisation.
        dtype: Of model and data.
    """

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 10),
        )  # fmt: skip

    return _classification("digits-mlp", "digits", build, seed, dtype)


def digits_residual_problem(*, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Return the ten digits with a residual network of five convolutions and batch normalisation.

    Args:
        width: Channels of the first stage; the second has twice as many at half the resolution.
        seed: Of the network's initialisation.
        dtype: Of model and data.

    Source: He, Zhang, Ren & Sun 2016, with blocks of two convolutions.
    """
    return _classification("digits-residual", "digits", lambda: _residual_network(1, width), seed, dtype)


def cifar_residual_problem(*, width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Return 5000 images of CIFAR-10 with a residual network of five convolutions and batch normalisation.

    Args:
        width: Channels of the first stage, whose first convolution halves the resolution; the second has twice as many.
        seed: Of the network's initialisation.
        dtype: Of model and data.

    Source: He, Zhang, Ren & Sun 2016, with blocks of two convolutions.
    """
    return _classification("cifar10-5k-residual", "cifar10-5k", lambda: _residual_network(3, width, 2), seed, dtype)


def _residual_network(channels: int, width: int, stride: int = 1) -> nn.Module:
    """Return a residual network of two stages for ten classes; its first convolution has the stride."""

    def normalised(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]

    first = nn.Sequential(*normalised(width, width), nn.ReLU(), *normalised(width, width))
    second = nn.Sequential(*normalised(width, 2 * width, 2), nn.ReLU(), *normalised(2 * width, 2 * width))
    shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
    return nn.Sequential(
        *normalised(channels, width, stride), nn.ReLU(),
        Residual(first), nn.ReLU(),
        Residual(second, shortcut), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 10),
    )  # fmt: skip


def fashion_mlp_problem(
    *, width: int = 256, samples: int = 10000, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Problem:
    """Return Fashion-MNIST with an MLP of one hidden layer, 784-M-10.

    Args:
        width: Units M of the hidden layer.
        samples: Training images, the first ones.
        seed: Of the network's initialisation.
        dtype: Of model and data.
    """

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))

    return _classification("fashion-mlp", "fashion-mnist", build, seed, dtype, samples, 2000)


def lenet_problem(*, samples: int = 10000, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Return Fashion-MNIST with LeNet-5, ReLU and maximum pooling in place of the original's.

    Args:
        samples: Training images, the first ones.
        seed: Of the network's initialisation.
        dtype: Of model and data.

    Source: LeCun, Bottou, Bengio & Haffner 1998.
    """

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, 10),
        )  # fmt: skip

    return _classification("fashion-lenet", "fashion-mnist", build, seed, dtype, samples, 2000)


def cifar_cnn_problem(*, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Return 5000 images of CIFAR-10 with a convolutional network of four layers.

    Args:
        width: Channels of the first convolution; the others have twice and four times as many.
        seed: Of the network's initialisation.
        dtype: Of model and data.
    """

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, 10),
        )  # fmt: skip

    return _classification("cifar10-5k-cnn", "cifar10-5k", build, seed, dtype)


def _classification(
    name: str,
    images: str,
    build: Callable[[], nn.Module],
    seed: int,
    dtype: torch.dtype,
    samples: int | None = None,
    test_samples: int | None = None,
) -> Problem:
    """Return the problem of an image set, its first images if fewer are wanted, with a network."""
    source = load_images(images)
    pixels = source.train_images[:samples]
    x, x_test = standardised(pixels, pixels), standardised(source.test_images[:test_samples], pixels)
    y, y_test = source.train_labels[:samples], source.test_labels[:test_samples]
    return Problem(
        name=name,
        model=seeded(build, seed, dtype),
        loss=nn.CrossEntropyLoss(),
        train=(torch.from_numpy(x).to(dtype), torch.from_numpy(y.copy())),
        test=(torch.from_numpy(x_test).to(dtype), torch.from_numpy(y_test.copy())),
    )


def standardised(
    images: UInt8[np.ndarray, "N *pixels"], like: UInt8[np.ndarray, "M *pixels"]
) -> Float[np.ndarray, "N c H W"]:
    """Return images, channel first, with the mean 0 and the variance 1 that each channel has over the pixels of others."""
    x, reference = (a.reshape(*a.shape[:3], -1).astype(np.float64) for a in (images, like))
    scaled: Float[np.ndarray, "N H W c"] = (x - reference.mean((0, 1, 2))) / reference.std((0, 1, 2))
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
