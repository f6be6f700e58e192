"""Every kind of training step against references, the count of operations and the command line, on tiny networks."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks.operations import layers_of
from benchmarks.runner import AGREEMENT
from benchmarks.step import report
from benchmarks.step.__main__ import main
from benchmarks.step.methods import METHODS, Batch
from benchmarks.step.operations import dual, gradient_descent, kfac
from benchmarks.step.plain import PlainKFAC, due
from benchmarks.step.runner import Entry, _comparable, compare
from benchmarks.step.worker import Measurement, Request, Training, check, measure
from benchmarks.tasks import Task

KFACS = [name for name, method in METHODS.items() if method.inverts]
DUALS = [name for name, method in METHODS.items() if method.solves]


def _dense():
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10))


def _convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


TINY = [Task("dense", _dense, (7,), 5), Task("convolutions", _convolutions, (1, 8, 8), 5)]


@pytest.mark.parametrize("interval", [1, 2, 10])
@pytest.mark.parametrize(
    ("method", "task"),
    [(name, task) for name in KFACS for task in TINY if name != "kfac" and (METHODS[name].expands or task is TINY[0])],
)
def test_factors_of_all_libraries_give_one_direction(method, interval, task):
    own, _ = check(task, METHODS["kfac"], interval, 5, "cpu")
    found, _ = check(task, METHODS[method], interval, 5, "cpu")
    assert float((found - own).norm() / own.norm()) <= AGREEMENT


@pytest.mark.parametrize("task", TINY, ids=lambda task: task.title)
@pytest.mark.parametrize("method", DUALS)
def test_dual_form_solves_its_system(method, task):
    direction, residual = check(task, METHODS[method], 1, 5, "cpu")
    assert residual <= AGREEMENT
    gradient, none = check(task, METHODS["sgd"], 1, 5, "cpu")
    assert none is None
    assert float((direction - gradient).norm()) > 0.1 * float(gradient.norm())


def test_plain_direction_by_hand():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    own = PlainKFAC(nn.Sequential(layer), interval=2, damping=0.1, decay=0.5)
    gradient = torch.randn(2, 4)
    found = []
    factors = [tuple(x.T @ x for x in (torch.randn(5, 2), torch.randn(5, 4))) for _ in range(3)]
    for outputs, inputs in factors:
        layer.weight.grad, layer.bias.grad = gradient[:, :3].clone(), gradient[:, 3].clone()
        own.precondition([(outputs, inputs)])
        found.append(torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1))

    def direction(weights):
        B, A = (sum(w * pair[k] for w, pair in zip(weights, factors, strict=True)) / sum(weights) for k in (0, 1))
        pi = ((A.trace() / 4) / (B.trace() / 2)).sqrt()
        root = 0.1**0.5
        return torch.linalg.solve(B + root / pi * torch.eye(2), gradient) @ (A + root * pi * torch.eye(4)).inverse()

    # The inverses are made in the first two steps and then in every second.
    torch.testing.assert_close(found[0], direction([1, 0, 0]))
    torch.testing.assert_close(found[1], direction([0.5, 1, 0]))
    torch.testing.assert_close(found[2], found[1])


def test_layers_take_turns_as_those_of_curvlab(monkeypatch):
    inverted = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg,
        "cholesky_ex",
        lambda m, **options: (inverted.append(math.prod(m.shape[:-2])), original(m, **options))[1],
    )
    task = TINY[0]
    network, inputs = task.build(5, "cpu")
    training = Training(METHODS["kfac"], Batch(network, inputs, torch.arange(5)), "mc", 4)
    counted = []
    for _ in range(9):
        inverted.clear()
        training.step()
        counted.append(sum(inverted))
    assert counted == [2 * sum(due(layer, 3, step, 4) for layer in range(3)) for step in range(9)]
    assert sum(counted[1:5]) == 6


def test_operations_by_hand():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, _ = layers_of(network, torch.randn(5, 4))
    # N = 5; layers 5 → 3 and 4 → 2, the bias' input included.
    plain = 2 * 5 * (15 + 8) + 5 * 8
    assert gradient_descent(layers, 5).every == plain
    factors = 5 * (15 + 6) + 5 * (10 + 3)
    by_matrix = 5 * 3 * (5 + 3) + 4 * 2 * (4 + 2)
    count = kfac(layers, 5, 1)
    assert count.every == plain + 5 * 8 + factors + by_matrix
    assert count.factorisations == ((125 + 27) // 6, (64 + 8) // 6)
    assert count.mean(4) == count.every + (25 + 12) / 4
    # One sample is cheaper through its factors.
    assert kfac(layers, 1, 1).every == 2 * 23 + 8 + 8 + 21 + 13 + (25 + 9 + 15) + (16 + 4 + 8)


def test_operations_of_the_dual_form_by_hand():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    layers, _ = layers_of(network, torch.randn(5, 4))
    plain = gradient_descent(layers, 5).every
    gram = 15 * (3 + 1) + 15 * 5 + 15 * (2 + 1) + 15 * 4
    combination = 5 * (15 + 3) + 5 * (8 + 2)
    solved = 125 // 6 + 25
    assert dual(layers, 5, 1, sweeps=0, projects=False).every == plain + gram + solved + combination
    projection = 25 * 3 + 5 * (8 + 2)
    assert dual(layers, 5, 1, sweeps=1, projects=True).every == plain + 40 + gram + solved + combination + projection
    rows = dual(layers, 5, 2, sweeps=2, projects=False).every
    assert rows == plain + 80 + 55 * 4 + 15 * 5 + 55 * 3 + 15 * 4 + 1000 // 6 + 100 + 23 * 5 + 10 * 5


def test_counts_of_three_wide_layers():
    network = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    layers, _ = layers_of(network, torch.randn(1, 784))
    assert kfac(layers, 256, 1).mean(10) / gradient_descent(layers, 256).every == pytest.approx(2.97, abs=0.01)


def request(method, **changes):
    asked = {"task": "lenet", "samples": 4, "interval": 2, "repeats": 3, "seconds": 60.0, "threads": 1, "device": "cpu"}
    return Request(method=method, **asked | changes)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("method", "steps"), [("kfac", 4), ("dual-exact", 3)])
def test_measurement_in_this_process(method, steps):
    found, direction = measure(request(method))
    assert found.outcome == "done"
    assert found.steps == steps  # whole periods, where there are any
    assert found.ratio == found.seconds / found.plain_seconds > 0
    assert found.counted > 1
    assert found.losses[1] < found.losses[0]
    assert direction.isfinite().all()
    assert (found.residual is None) == (method == "kfac")


@pytest.mark.usefixtures("threads")
def test_a_spent_budget_leaves_one_period():
    found, _ = measure(request("kfac", seconds=1e-9, repeats=50, interval=3))
    assert found.steps == 3


def done(method, seconds=2.0, losses=(2.0, 1.0), error=None, slower=None, **changes):
    found = Measurement("done", "", seconds, 1.0, 10, 3.0, 2.0, 3 * 2**30, losses)
    return Entry(request(method, **changes), found, error, slower)


def test_what_is_wrong():
    assert not done("kfac").wrong
    assert done("kfac", losses=(1.0, 2.0)).wrong
    assert done("kfac", losses=(1.0, math.nan)).wrong
    assert done("kfac", error=2 * AGREEMENT).wrong
    assert done("kfac", error=math.nan).wrong
    assert not Entry(request("kfac"), Measurement("out of memory", "why")).wrong
    assert Entry(request("kfac"), Measurement("failed", "why")).wrong


def test_other_approximations_of_convolutions_are_not_compared():
    assert not _comparable(request("kfac-backpack"))
    assert _comparable(request("kfac-backpack", task="mlp"))
    assert _comparable(request("kfac-curvlinops"))


def test_a_step_that_takes_too_long_is_reported():
    (entry,) = compare([request("sgd")], timeout=0.2)
    assert entry.measurement == Measurement("out of time", "stopped after 0.2 s")


def test_files_hold_the_comparison(tmp_path):
    killed = Entry(request("dual-exact"), Measurement("out of memory", "killed by the system"))
    report.save(tmp_path / "steps.md", [[done("kfac"), done("kfac-backpack", 3.0, error=1e-6, slower=1.5), killed]], {})
    lines = (tmp_path / "steps.md").read_text().splitlines()
    assert lines[0] == "## Training step of a LeNet on 28×28 images, N = 4, float32, cpu, 1 thread"
    cells = {c[0]: c[1:] for line in lines if len(c := [part.strip() for part in line.split("|")[1:-1]]) == 10}
    assert cells["K-FAC, curvlab"] == ["2", "2e+03", "2.00", "1.50", "1.33", "", "3.0 GiB", "", "2.000 → 1.000"]
    assert cells["K-FAC, BackPACK factors"][5:8] == ["1.50×", "3.0 GiB", "1.0e-06"]
    assert cells["natural gradient, dual, exact"][:2] == ["", "out of memory"]
    assert "natural gradient, dual, exact: out of memory (killed by the system)." in lines


def test_command_compares_processes_and_writes_the_table(tmp_path, capfd):
    output = tmp_path / "steps.json"
    options = ("--tasks", "mlp", "--methods", "kfac-backpack", "kfac", "--batches", "4", "--intervals", "2")
    assert main([*options, "--repeats", "1", "--threads", "1", "--output", str(output)]) == 0
    assert "Training step of a 784-1024-1024-10 ReLU MLP, N = 4, float32, cpu, 1 thread" in capfd.readouterr().out
    ((own, other),) = json.loads(output.read_text())["measurements"]
    assert [entry["request"]["method"] for entry in (own, other)] == ["kfac", "kfac-backpack"]
    assert own["error"] is None
    assert other["error"] <= AGREEMENT
    assert other["slower"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batches", "0"), "--batches must be at least 1 each, got (0,)"),
        (("--intervals", "10", "0"), "--intervals must be at least 1 each, got (10, 0)"),
        (("--repeats", "0"), "--repeats must be positive, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    assert main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
