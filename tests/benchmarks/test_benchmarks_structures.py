"""Every library's structures are those of curvlab, in float64 on small networks; reports and the command line."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import runner
from benchmarks.process import Timed
from benchmarks.structures import networks, report, worker
from benchmarks.structures.__main__ import _wrong, main
from benchmarks.structures.methods import QUANTITIES
from benchmarks.structures.report import Line
from benchmarks.structures.tasks import TASKS, Batch
from benchmarks.structures.worker import Request

UNKNOWN_TO_NNGEOMETRY = ("sequence",)
"""Networks with `Linear` layers and a `LayerNorm` on sequences."""


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def batch(name):
    torch.manual_seed(0)
    build, shape = {
        "dense": (lambda: nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)), (5, 7)),
        "convolutions": (convolutions, (5, 1, 8, 8)),
        "sequence": (networks.transformer, (3, 5, 3)),
        "pointwise": (networks.pointwise_transformer, (3, 3, 5, 1)),
    }[name]
    network = build()
    return Batch(network, torch.randn(shape), torch.randint(3, shape[:1]))


@pytest.fixture
def small(monkeypatch):
    for name, value in {"FEATURES": 3, "WIDTH": 4, "HEADS": 2, "DEPTH": 1}.items():
        monkeypatch.setattr(networks, name, value)


CASES = [
    (quantity, network)
    for quantity, chosen in QUANTITIES.items()
    for network in ("dense", "convolutions", "sequence", "pointwise")
    if not chosen.drawn
]


@pytest.mark.usefixtures("double", "small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("quantity", "network"), CASES)
def test_libraries_compute_the_same(quantity, network):
    found = {}
    for method, prepare in QUANTITIES[quantity].methods.items():
        compute = prepare(batch(network))
        if network in UNKNOWN_TO_NNGEOMETRY and method.startswith("nngeometry"):
            with pytest.raises(RuntimeError):
                compute()
        else:
            found[method] = compute()
    assert len(found) > 1
    reference = found["curvlab"]
    assert bool(reference.any())
    for method, value in found.items():
        error = float((value - reference).norm() / reference.norm())
        assert error < 1e-9, (method, error)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantity", [name for name, chosen in QUANTITIES.items() if chosen.drawn])
def test_draws_give_a_finite_solution_of_the_same_size(quantity):
    found = [prepare(batch("dense"))() for prepare in QUANTITIES[quantity].methods.values()]
    norms = torch.stack([x.norm() for x in found])
    assert bool(norms.isfinite().all())
    assert float(norms.max() / norms.min()) < 2


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_ten_outputs(name):
    network, inputs = TASKS[name].build(2, "cpu")
    with torch.no_grad():
        assert network(inputs).shape == (2, 10)


def test_forms_of_the_transformer_are_one_function(monkeypatch):
    monkeypatch.setattr(networks, "FEATURES", 3)
    attention = networks._Attention(nn.Linear)
    pointwise = networks._Attention(partial(nn.Conv2d, kernel_size=1))
    state = {name: v[..., None, None] if v.ndim == 2 else v for name, v in attention.state_dict().items()}
    pointwise.load_state_dict(state)
    x = torch.randn(2, 5, networks.WIDTH)
    torch.testing.assert_close(pointwise(x.mT[..., None])[..., 0].mT, attention(x))


def request(method, **changes):
    asked = {"task": "lenet", "quantity": "kfac", "samples": 2, "repeats": 1, "seconds": 9.0, "threads": 1}
    return Request(method=method, device="cpu", **asked | changes)


def line(method, outcome="done", error=0.0):
    return Line(request(method), Timed(outcome, "why", (2.0 if method == "curvlab" else 3.0,), 2**20), error)


def test_what_is_wrong():
    assert not _wrong(line("nngeometry"))
    assert _wrong(line("nngeometry", error=1e-3))
    assert not _wrong(line("nngeometry", "failed", None))
    assert _wrong(line("curvlab", "failed", None))


def test_files_hold_the_comparison(tmp_path):
    lines = [line("curvlab"), line("curvlinops", error=1e-6), line("nngeometry", "failed", None)]
    report.save(tmp_path / "structures.md", [lines], {})
    text = (tmp_path / "structures.md").read_text().splitlines()
    assert text[0] == "## K-FAC, exact rows, fit and solve: LeNet on 28×28 images, N = 2, float32, cpu, 1 thread"
    cells = {c[0]: c[1:] for row in text if len(c := [part.strip() for part in row.split("|")[1:-1]]) == 5}
    assert cells["curvlinops"] == ["3", "1.5×", "1.0 MiB", "1.0e-06"]
    assert "nngeometry: failed (why)." in text


def test_command_compares_methods_and_writes_the_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        runner, "in_own_process", lambda _worker, asked, _timeout, folder, _made: worker.measure_and_save(asked, folder)
    )
    output = tmp_path / "structures.json"
    options = ("--tasks", "lenet", "--quantities", "kfac", "--methods", "curvlab", "nngeometry", "--samples", "2")
    assert main([*options, "--repeats", "1", "--threads", "1", "--output", str(output)]) == 0
    assert "K-FAC, exact rows, fit and solve: LeNet" in capfd.readouterr().out
    ((own, other),) = json.loads(output.read_text())["measurements"]
    assert own["error"] == 0
    assert other["error"] <= 1e-4


def test_wrong_options_are_refused(capsys):
    assert main(("--samples", "0")) == 2
    assert "--samples must be at least 1, got 0" in " ".join(capsys.readouterr().err.split())
