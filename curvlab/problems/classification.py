"""Image classification as the NTK literature poses it: few classes, unit inputs, an NTK-parameterised MLP."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from torch import Tensor, nn

from curvlab.nn import HalfSquaredError, ntk_mlp
from curvlab.problems.images import load_images
from curvlab.problems.problem import Problem

Examples = tuple[Float[Tensor, "_ M_0"], Shaped[Tensor, "_ ..."]]
"""Inputs and targets, as many of one as of the other."""


def image_problem(
    images: str,
    *,
    name: str | None = None,
    width: int = 512,
    depth: int = 3,
    activation: str = "relu",
    outputs: int = 1,
    classes: Sequence[int] | None = None,
    samples: int = 100,
    test_samples: int = 50,
    loss: str = "half-squared",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Return a classification problem on some classes of an image set, in the setting of Karakida & Osawa.

    The samples are the first ones of the chosen classes, images scaled to ‖x‖₂ = 1, see `image_data`.

    The network has s_w² = 2 and no bias. Its initialisation is all that depends on the seed, and is the same
    in every dtype up to rounding.

    Args:
        images: A key of `curvlab.problems.IMAGE_SETS`.
        name: Of the problem; the image set's if None.
        width: Units of each hidden layer.
        depth: Weight layers L, so L − 1 hidden ones.
        activation: A name in `curvlab.nn.ACTIVATIONS`.
        outputs: Network outputs C. With 1, targets are +½ for the first of two classes and −½ for the second;
            with C ≥ 2, one output per class and targets are 0/1 one-hot, not centred.
        classes: Labels of the classes, max(C, 2) of them; the first ones if None.
        samples: Training samples N, all classes together.
        test_samples: Test samples, all classes together.
        loss: "half-squared", ½ Σ_c (z − y)², or "cross-entropy" on C ≥ 2 outputs (targets are then
            positions in `classes`); both are means over samples.
        seed: Of the network's initialisation.
        dtype: Of model and data.

    Raises:
        ValueError: The number of classes does not fit the outputs, the images do not have enough samples of
            them, or an argument is out of its range.
        DataUnavailable: The image set is absent and cannot be fetched, or is damaged.

    Source: Karakida & Osawa 2020, experiments and published code.
    """
    if min(width, depth) < 1:
        raise ValueError(f"width and depth must be at least 1; got {width} and {depth}.")
    train, test = image_data(
        images,
        outputs=outputs,
        classes=classes,
        samples=samples,
        test_samples=test_samples,
        loss=loss,
        dtype=dtype,
    )
    criterion: nn.Module = nn.CrossEntropyLoss() if loss == "cross-entropy" else HalfSquaredError()
    model = ntk_mlp(
        (train[0].shape[1], *[width] * (depth - 1), outputs),
        activation,
        generator=torch.Generator().manual_seed(seed),
        dtype=dtype,
    )
    return Problem(name=name or images, model=model, loss=criterion, train=train, test=test)


def image_data(
    images: str,
    *,
    outputs: int = 1,
    classes: Sequence[int] | None = None,
    samples: int,
    test_samples: int,
    loss: str = "half-squared",
    dtype: torch.dtype = torch.float64,
) -> tuple[Examples, Examples]:
    """Return training and test data of `image_problem`, whose arguments and errors these are.

    The samples are the first ones of the chosen classes in the published order. Images are flattened,
    centred by the mean over all pixels of all selected images, and every row is scaled to ‖x‖₂ = 1 (which
    cancels the published division by a standard deviation). Training and test images are centred by the mean
    of their own subset, as published, so a test image's preprocessing depends on the other test images.
    """
    classes = tuple(range(max(outputs, 2))) if classes is None else tuple(classes)
    if outputs < 1 or len(set(classes)) != len(classes) or len(classes) != max(outputs, 2):
        raise ValueError(
            f"outputs={outputs} and classes={classes} do not fit: one output takes two distinct classes, "
            "C outputs take C of them."
        )
    if loss not in ("half-squared", "cross-entropy"):
        raise ValueError(f"loss must be 'half-squared' or 'cross-entropy', not {loss!r}.")
    if loss == "cross-entropy" and outputs == 1:
        raise ValueError("cross-entropy needs one output per class: set outputs to the number of classes.")
    if min(samples, test_samples) < 1:
        raise ValueError(f"samples and test_samples must be at least 1; got {samples} and {test_samples}.")
    source = load_images(images)

    def prepared(
        part: str, pixels: UInt8[np.ndarray, "M *pixels"], labels: Int64[np.ndarray, " M"], count: int
    ) -> tuple[Tensor, Tensor]:
        chosen = np.flatnonzero(np.isin(labels, classes))
        if len(chosen) < count:
            raise ValueError(
                f"{images} has {len(chosen)} {part} images of the classes {classes}; {count} were asked for."
            )
        chosen = chosen[:count]
        positions = np.array([classes.index(label) for label in labels[chosen]])
        targets: Tensor
        if loss == "cross-entropy":
            targets = torch.from_numpy(positions)
        elif outputs == 1:
            targets = torch.from_numpy(0.5 - positions[:, None]).to(dtype)
        else:
            targets = torch.from_numpy(np.eye(outputs)[positions]).to(dtype)
        return torch.from_numpy(unit_rows(pixels[chosen])).to(dtype), targets

    return (
        prepared("training", source.train_images, source.train_labels, samples),
        prepared("test", source.test_images, source.test_labels, test_samples),
    )


def unit_rows(images: UInt8[np.ndarray, "N *pixels"]) -> Float64[np.ndarray, "N M_0"]:
    """Return flattened images, centred by one scalar for all and scaled to ‖x‖₂ = 1 each."""
    rows = images.reshape(len(images), -1).astype(np.float64)
    rows -= rows.mean()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
