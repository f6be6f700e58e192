"""Problems in the setting of Zhang, Martens & Grosse: unit inputs, and a two-layer network with fixed output signs."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from curvlab.nn import HalfSquaredError, TwoLayer
from curvlab.problems.classification import Examples, image_data
from curvlab.problems.problem import Problem


def two_layer_problem(
    images: str,
    *,
    name: str = "two-layer",
    width: int = 1024,
    activation: str = "relu",
    weight_std: float = 1.0,
    classes: Sequence[int] = (0, 1),
    samples: int = 40,
    test_samples: int = 50,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return two classes of an image set with a two-layer network.

    Data are those of `image_problem` with one output: inputs of norm 1, targets +½ for the first class and −½
    for the second, ½ (f − y)² averaged over samples. The network's initialisation is all that depends on the
    seed.

    Args:
        images: A key of `curvlab.problems.IMAGE_SETS`.
        name: Of the problem.
        width: Hidden units m.
        activation: A name in `curvlab.nn.ACTIVATIONS`.
        weight_std: ν, the standard deviation of the initial weights.
        classes: Labels of the two classes.
        samples: Training samples n, both classes together.
        test_samples: Test samples, both classes together.
        seed: Of the network's initialisation.
        dtype: Of model and data.

    Raises:
        ValueError: The images do not have enough samples of two distinct classes, or an argument is out of
            its range.
        DataUnavailable: The image set is absent and cannot be fetched, or is damaged.

    Source: Zhang, Martens & Grosse 2019, section 4.
    """
    train, test = image_data(images, classes=classes, samples=samples, test_samples=test_samples, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    model = TwoLayer(train[0].shape[1], width, activation, weight_std, generator, dtype)
    return Problem(name=name, model=model, loss=HalfSquaredError(), train=train, test=test)


def synthetic_two_layer_problem(
    *,
    width: int = 1024,
    activation: str = "relu",
    weight_std: float = 1.0,
    similarity: float = 0.5,
    dimension: int = 16,
    samples: int = 32,
    test_samples: int = 50,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return random unit inputs of a chosen similarity with a two-layer network.

    Inputs are x = (√s, √(1−s) z) with z uniform on the unit sphere of the other d − 1 coordinates, so ‖x‖ = 1
    and xᵀx' = s + (1−s) zᵀz', with mean s over independent pairs. As s approaches 1 the inputs become nearly
    parallel: at fixed n the least eigenvalue λ₀ of the limit Gram matrix falls by decades, about as √(1−s) for
    ReLU and for erf, if n is above d, as (1−s)². Targets are ±1, the side of a random plane on which z lies.
    Data and network depend on the seed, but neither z, plane and network on s, nor the data on the network.

    Args:
        width: Hidden units m.
        activation: A name in `curvlab.nn.ACTIVATIONS`.
        weight_std: ν, the standard deviation of the initial weights.
        similarity: s, 0 or above and below 1; at 0 the inputs span only d − 1 dimensions.
        dimension: d, at least 3.
        samples: Training samples n.
        test_samples: Test samples.
        seed: Of data and initialisation.
        dtype: Of model and data.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0.0 <= similarity < 1.0:
        raise ValueError(f"similarity must lie in [0, 1), not {similarity}: at 1 all inputs are equal.")
    if dimension < 3 or min(samples, test_samples) < 1:
        raise ValueError(
            "dimension must be at least 3, samples and test_samples at least 1; got "
            f"{dimension}, {samples} and {test_samples}."
        )
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(dimension - 1, generator=generator, dtype=torch.float64, device="cpu")

    def drawn(count: int) -> Examples:
        z = torch.randn(count, dimension - 1, generator=generator, dtype=torch.float64, device="cpu")
        z /= z.norm(dim=1, keepdim=True)
        shared = torch.full((count, 1), sqrt(similarity), dtype=torch.float64, device="cpu")
        inputs = torch.cat([shared, sqrt(1.0 - similarity) * z], dim=1)
        targets: Tensor = torch.where(z @ plane > 0.0, 1.0, -1.0)[:, None]
        return inputs.to(dtype), targets.to(dtype)

    train, test = drawn(samples), drawn(test_samples)
    model = TwoLayer(dimension, width, activation, weight_std, generator, dtype)
    return Problem(name="synthetic-two-layer", model=model, loss=HalfSquaredError(), train=train, test=test)
