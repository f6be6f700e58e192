"""Image sets and the classification problems made of them; real files where CURVLAB_DATA is set."""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from curvlab.nn import HalfSquaredError
from curvlab.problems import DataUnavailable, ImageSet, files, image_problem, images, load_images, resolve

SOURCE = os.environ.get("CURVLAB_DATA", "")
REAL_FILES = {
    "mnist": [file.path for file in images.MNIST],
    "fashion-mnist": [file.path for file in images.FASHION_MNIST],
    "cifar10": [images.CIFAR10.path],
    "cifar10-5k": ["cifar10-5k.npz"],
}


def no_network(url: str, **arguments: object) -> None:
    raise ConnectionError(f"no network for {url}")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty data folder without a network."""
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setattr(files.pooch, "retrieve", no_network)
    return tmp_path


@pytest.fixture
def copy_real(folder) -> Callable[[str], Path]:
    """A function that copies the real files of a set into the data folder, or skips the test."""

    def copy(name: str) -> Path:
        for path in REAL_FILES[name]:
            if not SOURCE or not (Path(SOURCE) / path).exists():
                pytest.skip(f"CURVLAB_DATA does not name a folder with {path}")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(SOURCE) / path, folder / path)
        return folder

    return copy


def tiny_part(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 3), np.uint8), rng.integers(0, 4, count)


@pytest.fixture
def tiny(folder, monkeypatch) -> ImageSet:
    """Random images of four classes, registered as `tiny`."""
    image_set = ImageSet(*tiny_part(60, 0), *tiny_part(40, 1))
    monkeypatch.setitem(images.IMAGE_SETS, "tiny", lambda _: image_set)
    return image_set


def published(pixels: np.ndarray) -> np.ndarray:
    """The preprocessing of the paper's code, sample by sample."""
    rows = [image.flatten().astype(float) for image in pixels]
    mean, std = np.mean(rows), np.std(rows)
    rows = [(row - mean) / std for row in rows]
    return np.array([row / np.sqrt(sum(row**2)) for row in rows])


def test_inputs_are_the_first_samples_of_the_classes_as_published(tiny):
    problem = image_problem("tiny", classes=(2, 0), samples=11, test_samples=7, width=5)
    for (inputs, targets), pixels, labels, count in (
        (problem.train, tiny.train_images, tiny.train_labels, 11),
        (problem.test, tiny.test_images, tiny.test_labels, 7),
    ):
        chosen = [n for n, label in enumerate(labels) if label in (2, 0)][:count]
        np.testing.assert_allclose(inputs.numpy(), published(pixels[chosen]), rtol=1e-12, atol=1e-14)
        assert targets.tolist() == [[0.5] if labels[n] == 2 else [-0.5] for n in chosen]
    assert isinstance(problem.loss, HalfSquaredError)
    assert problem.loss.reduction == "mean"


def test_more_outputs_take_one_hot_targets(tiny):
    problem = image_problem("tiny", outputs=3, samples=12, test_samples=5, width=5)
    labels = tiny.train_labels[tiny.train_labels < 3][:12]
    assert problem.train[1].tolist() == [[float(label == c) for c in range(3)] for label in labels]
    assert problem.model(problem.train[0]).shape == (12, 3)


def test_cross_entropy_takes_positions_in_the_classes(tiny):
    problem = image_problem(
        "tiny", outputs=2, classes=(3, 1), loss="cross-entropy", samples=12, test_samples=5, width=5
    )
    labels = [label for label in tiny.train_labels if label in (3, 1)][:12]
    assert problem.train[1].tolist() == [(3, 1).index(label) for label in labels]
    assert isinstance(problem.loss, nn.CrossEntropyLoss)
    assert problem.loss(problem.model(problem.train[0]), problem.train[1]).isfinite()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_network_has_the_depth_and_width_asked_for(tiny, depth):
    problem = image_problem("tiny", depth=depth, width=6, activation="tanh", samples=10, test_samples=5)
    sizes = [12, *[6] * (depth - 1), 1]
    shapes = [list(parameter.shape) for parameter in problem.model.parameters()]
    assert shapes == [[fan_out, fan_in] for fan_in, fan_out in pairwise(sizes)]
    assert sum(isinstance(module, nn.Tanh) for module in problem.model) == depth - 1


def test_seed_changes_the_network_and_not_the_data(tiny):
    first, again, other = (image_problem("tiny", seed=s, width=5, samples=9, test_samples=5) for s in (0, 0, 1))
    assert torch.equal(first.model[0].weight, again.model[0].weight)
    assert not torch.equal(first.model[0].weight, other.model[0].weight)
    assert torch.equal(first.train[0], other.train[0])


def test_single_precision_is_the_rounded_double_one(tiny):
    double = image_problem("tiny", width=5, samples=9, test_samples=5)
    single = image_problem("tiny", width=5, samples=9, test_samples=5, dtype=torch.float32)
    assert torch.equal(double.train[0].float(), single.train[0])
    assert torch.equal(double.model[2].weight.float(), single.model[2].weight)
    assert single.train[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": 0}, "do not fit"),
        ({"classes": (0, 1, 2)}, "C outputs take C of them"),
        ({"outputs": 3, "classes": (0, 1)}, "do not fit"),
        ({"classes": (1, 1)}, "two distinct classes"),
        ({"classes": (0, 7), "samples": 30}, r"tiny has \d+ training images of the classes \(0, 7\); 30 were"),
        ({"test_samples": 41}, "test images of the classes"),
        ({"loss": "hinge"}, "'half-squared' or 'cross-entropy', not 'hinge'"),
        ({"loss": "cross-entropy"}, "one output per class"),
        ({"width": 0}, "at least 1"),
        ({"samples": 0}, "at least 1"),
        ({"activation": "reul"}, "Did you mean 'relu'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        image_problem("tiny", **{"samples": 8, "test_samples": 4, "width": 5, **arguments})


def test_unknown_image_set_suggests_the_nearest(folder):
    with pytest.raises(ValueError, match=r"Unknown image set 'minst'\. Did you mean 'mnist'"):
        load_images("minst")


def test_images_are_read_once_and_cannot_be_changed(tiny):
    assert load_images("digits") is load_images("digits")
    with pytest.raises(ValueError, match="read-only"):
        load_images("digits").train_images[0] = 0


def test_digits_need_no_file_and_stay_below_the_rank_of_the_pixels(folder):
    problem = resolve("digits", width=8)
    assert list(folder.iterdir()) == []
    inputs, targets = problem.train
    assert inputs.shape == (40, 64)
    assert targets.shape == (40, 1)
    assert problem.test[0].shape == (50, 64)
    assert torch.linalg.matrix_rank(inputs) == 40
    wider = resolve("digits", width=8, samples=100)
    assert torch.linalg.matrix_rank(wider.train[0]) < 50
    bunch = load_digits()
    first = [n for n, label in enumerate(bunch.target) if label in (0, 1)][:40]
    np.testing.assert_allclose(inputs.numpy(), published(bunch.images[first]), rtol=1e-12, atol=1e-14)


def test_digits_hold_out_the_last_images(folder):
    bunch, digits = load_digits(), load_images("digits")
    np.testing.assert_array_equal(np.concatenate([digits.train_images, digits.test_images]), bunch.images)
    np.testing.assert_array_equal(np.concatenate([digits.train_labels, digits.test_labels]), bunch.target)
    assert len(digits.test_labels) == 500


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar10-5k", "karakida-osawa"])
def test_absent_files_are_named_with_their_source(folder, name):
    with pytest.raises(DataUnavailable, match="does not exist and could not be fetched from http") as caught:
        resolve(name, width=8)
    assert str(folder) in str(caught.value)
    assert ("cifar10-5k.npz does not exist, so the full set" in str(caught.value)) == (name == "cifar10-5k")


def cifar_archive(path: Path, records: int) -> str:
    """Write a CIFAR-10 archive whose first pixel states its record's number; return its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for start, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            numbers = np.arange(start * records, (start + 1) * records)
            content = np.tile(np.arange(3073, dtype=np.uint8), (records, 1))
            content[:, 0], content[:, 1] = numbers % 10, numbers // 100
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = content.nbytes
            tar.addfile(member, io.BytesIO(content.tobytes()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_cifar10_is_read_from_its_archive_and_cut_for_the_subset(folder, monkeypatch):
    sha256 = cifar_archive(folder / images.CIFAR10.path, records=1200)
    monkeypatch.setattr(images, "CIFAR10", replace(images.CIFAR10, sha256=sha256))
    full, subset = load_images("cifar10"), load_images("cifar10-5k")
    assert full.train_images.shape == (6000, 32, 32, 3)
    np.testing.assert_array_equal(full.train_labels, np.arange(6000) % 10)
    np.testing.assert_array_equal(full.train_images[:, 0, 0, 0], np.arange(6000) // 100)
    np.testing.assert_array_equal(full.test_images[:, 0, 0, 0], np.arange(6000, 7200) // 100)
    for part, count in (("train", 5000), ("test", 1000)):
        for field in (f"{part}_images", f"{part}_labels"):
            np.testing.assert_array_equal(getattr(subset, field), getattr(full, field)[:count])
    assert resolve("cifar10", width=4).train[0].shape == (100, 3072)


def test_cifar10_subset_is_read_from_its_own_file(folder):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (5, 32, 32, 3), np.uint8),
        "y_train": np.array([3, 1, 4, 1, 5], np.int32),
        "x_test": rng.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "y_test": np.array([9, 2]),
    }
    np.savez(folder / "cifar10-5k.npz", **arrays)
    subset = load_images("cifar10-5k")
    np.testing.assert_array_equal(subset.train_images, arrays["x_train"])
    np.testing.assert_array_equal(subset.test_labels, arrays["y_test"])
    assert subset.train_labels.dtype == np.int64


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_damaged_subset_file_is_named(folder, content):
    (folder / "cifar10-5k.npz").write_bytes(content)
    with pytest.raises(DataUnavailable, match=r"cifar10-5k\.npz is damaged .* it must hold x_train and x_test"):
        load_images("cifar10-5k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((2, 3072), np.uint8)}, r"images \[2, 3072\] uint8 with labels \[2\]"),
        ({"x_test": np.zeros((2, 32, 32, 3))}, r"images \[2, 32, 32, 3\] float64"),
        ({"y_test": np.zeros(3, np.int64)}, r"with labels \[3\]"),
        ({"y_train": None}, "y_train"),
    ],
)
def test_subset_file_with_other_arrays_is_named(folder, change, message):
    x, y = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, **change}
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / "cifar10-5k.npz", **kept)
    with pytest.raises(DataUnavailable, match=rf"cifar10-5k\.npz is damaged \(.*{message}"):
        load_images("cifar10-5k")


@pytest.mark.parametrize(
    ("name", "first_train", "first_test"),
    [("mnist", [5, 0, 4, 1], [7, 2, 1, 0]), ("fashion-mnist", [9, 0, 0, 3], [9, 2, 1, 1])],
)
def test_real_idx_sets(copy_real, name, first_train, first_test):
    copy_real(name)
    image_set = load_images(name)
    assert image_set.train_images.shape == (60000, 28, 28)
    assert image_set.test_images.shape == (10000, 28, 28)
    assert image_set.train_labels[:4].tolist() == first_train
    assert image_set.test_labels[:4].tolist() == first_test
    assert set(image_set.train_labels) == set(range(10))


def test_real_cifar10_subset(copy_real):
    copy_real("cifar10-5k")
    subset = load_images("cifar10-5k")
    assert subset.train_images.shape == (5000, 32, 32, 3)
    assert subset.test_images.shape == (1000, 32, 32, 3)
    assert subset.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert resolve("cifar10-5k", width=4, outputs=10, samples=200).train[1].shape == (200, 10)


def test_real_cifar10(copy_real):
    copy_real("cifar10")
    full = load_images("cifar10")
    assert full.train_images.shape == (50000, 32, 32, 3)
    assert full.train_labels[:5].tolist() == [6, 9, 9, 4, 1]


def test_damaged_real_file_is_named(copy_real):
    path = copy_real("mnist") / images.MNIST[1].path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataUnavailable, match=f"{path} is damaged"):
        load_images("mnist")


def test_paper_setting(copy_real):
    copy_real("mnist")
    problem = resolve("karakida-osawa", seed=1)
    assert problem.name == "karakida-osawa"
    assert [list(p.shape) for p in problem.model.parameters()] == [[4096, 784], [4096, 4096], [1, 4096]]
    assert problem.train[0].shape == (100, 784)
    assert problem.test[0].shape == (50, 784)
    with torch.no_grad():
        initial = problem.loss(problem.model(problem.train[0]), problem.train[1])
    # The published code starts at 0.134 and 0.124: ½·¼ plus half the variance of the initial outputs.
    assert initial.item() == pytest.approx(0.13, abs=0.02)
