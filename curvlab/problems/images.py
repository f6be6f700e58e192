"""The image sets, each with its official split into training and test images."""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from curvlab.errors import unknown_name
from curvlab.problems.files import RemoteFile, data_folder, fetch, read_cifar10, read_idx
from curvlab.tools.errors import DataUnavailable


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, bytes with the channel last, in the published order; the arrays become read-only.

    Attributes:
        train_images: [N, H, W] or [N, H, W, 3].
        train_labels: Classes, counted from 0.
        test_images: As the training images.
        test_labels: As the training labels.
    """

    train_images: UInt8[np.ndarray, "N *pixels"]
    train_labels: Int64[np.ndarray, " N"]
    test_images: UInt8[np.ndarray, "M *pixels"]
    test_labels: Int64[np.ndarray, " M"]

    def __post_init__(self) -> None:
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            array.flags.writeable = False


IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MNIST = tuple(
    RemoteFile(
        path=f"MNIST/raw/{name}",
        urls=(
            f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}",
            f"https://storage.googleapis.com/cvdf-datasets/mnist/{name}",
        ),
        sha256=sha256,
    )
    for name, sha256 in zip(
        IDX_NAMES,
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        strict=True,
    )
)
FASHION_MNIST = tuple(
    RemoteFile(
        path=f"FashionMNIST/raw/{name}",
        urls=(f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{name}",),
        sha256=sha256,
    )
    for name, sha256 in zip(
        IDX_NAMES,
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        strict=True,
    )
)
CIFAR10 = RemoteFile(
    path="cifar-10-binary.tar.gz",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
DIGITS_TEST = 500


def _digits(_folder: Path) -> ImageSet:
    """scikit-learn's digits, 8 × 8 pixels of 0 to 16; the last 500 of 1797 are the test images."""
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")  # its import takes seconds
    table = np.loadtxt(str(file), delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]
    return ImageSet(images[:-DIGITS_TEST], labels[:-DIGITS_TEST], images[-DIGITS_TEST:], labels[-DIGITS_TEST:])


def _idx(files: Sequence[RemoteFile], folder: Path) -> ImageSet:
    train_images, train_labels, test_images, test_labels = (read_idx(fetch(file, folder)) for file in files)
    return ImageSet(train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64))


def _cifar10(folder: Path) -> ImageSet:
    archive = fetch(CIFAR10, folder)
    train = read_cifar10(archive, [f"data_batch_{number}" for number in range(1, 6)])
    return ImageSet(*train, *read_cifar10(archive, ["test_batch"]))


def _cifar10_5k(folder: Path) -> ImageSet:
    """The first 5000 training and 1000 test images, from a file of their own if it is there."""
    path = folder / "cifar10-5k.npz"
    if path.exists():
        return _npz(path)
    try:
        full = _load_images("cifar10", folder)
    except DataUnavailable as error:
        raise DataUnavailable(f"{path} does not exist, so the full set is needed. {error}") from error
    train, test = slice(5000), slice(1000)
    return ImageSet(full.train_images[train], full.train_labels[train], full.test_images[test], full.test_labels[test])


def _npz(path: Path) -> ImageSet:
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)) for part in ("train", "test")]
        for pixels, labels in parts:
            if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3) or labels.ndim != 1:
                raise ValueError(f"images {list(pixels.shape)} {pixels.dtype} with labels {list(labels.shape)}")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataUnavailable(
            f"{path} is damaged ({error}); it must hold x_train and x_test, uint8 [N, 32, 32, 3], and y_train and "
            "y_test, integers [N]. Without the file, the subset is cut from the full CIFAR-10."
        ) from error
    return ImageSet(*parts[0], *parts[1])


IMAGE_SETS: Mapping[str, Callable[[Path], ImageSet]] = {
    "digits": _digits,
    "mnist": partial(_idx, MNIST),
    "fashion-mnist": partial(_idx, FASHION_MNIST),
    "cifar10": _cifar10,
    "cifar10-5k": _cifar10_5k,
}
"""Readers of the image sets by name, each given the data folder."""


def load_images(name: str) -> ImageSet:
    """Return an image set; the files are read once per process and data folder.

    Args:
        name: A key of `IMAGE_SETS`.

    Raises:
        ValueError: The name is unknown.
        DataUnavailable: A file is absent and cannot be fetched, or is damaged.
    """
    if name not in IMAGE_SETS:
        raise unknown_name("image set", name, IMAGE_SETS)
    return _load_images(name, data_folder())


@lru_cache(maxsize=2)
def _load_images(name: str, folder: Path) -> ImageSet:
    return IMAGE_SETS[name](folder)
