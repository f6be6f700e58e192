"""The benchmark of growth: networks, counts, exponents and the command line."""

import json
from itertools import pairwise

import numpy as np
import pytest
from torch import nn

from benchmarks import fits
from benchmarks.growth import __main__ as command
from benchmarks.growth.__main__ import main
from benchmarks.growth.methods import QUANTITIES, DecoderSize, Size
from benchmarks.growth.worker import Request, measure


def test_exponents_have_standard_errors():
    sizes = np.array([1.0, 2.0, 4.0, 8.0])
    exact = fits.exponent(list(sizes), list(3 * sizes**1.5))
    assert exact.slope == pytest.approx(1.5)
    assert exact.error == pytest.approx(0, abs=1e-7)
    # Residuals of the upper three points are (δ, −2δ, δ)/3 of log 2, so that the error is δ/√3 of the spacing.
    bent = fits.exponent([1, 2, 4], [1, 2, 8])
    assert bent.slope == pytest.approx(1.5)
    assert bent.error == pytest.approx(1 / np.sqrt(12))
    assert fits.exponent([1, 2], [1, 2]) is None


def test_networks_grow_along_one_axis_by_doubling():
    for quantity in QUANTITIES.values():
        for axis, values in quantity.axes.items():
            assert all(b == 2 * a for a, b in pairwise(values))
            assert getattr(quantity.size.grown(axis, values[1]), axis) == values[1]
    batch = Size(samples=5, outputs=3, width=7, depth=2).build("cpu")
    assert [tuple(m.weight.shape) for m in batch.network if isinstance(m, nn.Linear)] == [(7, 64), (7, 7), (3, 7)]
    assert len(batch.inputs) == len(batch.targets) == 5


def test_operations_of_a_fit_by_hand():
    batch = Size(samples=5, outputs=3, width=7, depth=1).build("cpu")
    # N = 5, C = 3; layers 65 → 7 and 8 → 3, the bias' input included.
    sweep = 5 * (65 * 7 + 8 * 3) + 15 * 8 * 3
    moments = 5 * (65 * 66 + 3 * 7 * 8) // 2 + 5 * (8 * 9 + 3 * 3 * 4) // 2
    assert QUANTITIES["kfac"].operations(batch) == sweep + moments


def test_operations_of_a_fit_of_a_decoder_by_hand():
    batch = DecoderSize(samples=2, tokens=3, width=64, depth=1, vocabulary=8).build("cpu")
    # Layers 65 → 192, 65 → 64, 65 → 256 and 257 → 64 with a bias, and 64 → 8 without; scores and averages of 3 tokens.
    shapes = [(65, 192), (65, 64), (65, 256), (257, 64), (64, 8)]
    layers = sum(2 * i * o + (i * (i + 1) + o * (o + 1)) // 2 for i, o in shapes)
    assert QUANTITIES["decoder"].operations(batch) == 6 * (layers + 3 * 2 * 3 * 64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("quantity", "method"), [(q, m) for q, chosen in QUANTITIES.items() for m in chosen.methods])
def test_a_measurement_covers_the_values(quantity, method, tmp_path):
    asked = {"repeats": 1, "seconds": 60.0, "threads": 1, "device": "cpu"}
    values = (64, 128) if quantity == "decoder" else (4, 8)
    found = measure(Request(quantity=quantity, method=method, axis="width", values=values, **asked), tmp_path)
    assert len(found.seconds) == len(found.peak_bytes) == len(found.counted) == 2
    assert min(found.seconds) > 0


def test_the_command_writes_exponents(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        command, "in_own_process", lambda _worker, asked, _timeout, folder, _made: measure(asked, folder)
    )
    output = tmp_path / "growth.json"
    options = ("--quantities", "gram", "--methods", "curvlab", "--axes", "samples", "--values", "3")
    assert main([*options, "--repeats", "1", "--threads", "1", "--output", str(output)]) == 0
    assert "Gram matrix of a ReLU network" in capsys.readouterr().out
    ((line,),) = json.loads(output.read_text())["measurements"]
    assert len(line["measurement"]["seconds"]) == 3
    assert main(("--values", "99")) == 2
