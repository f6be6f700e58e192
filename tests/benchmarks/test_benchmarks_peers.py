"""Every peer's matrix, the count of operations and the command line, on tiny networks."""

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from benchmarks import report
from benchmarks.__main__ import OWN, main
from benchmarks.operations import matrix_products, operations
from benchmarks.peers import METHODS
from benchmarks.runner import AGREEMENT, Entry, compare
from benchmarks.tasks import TASKS
from benchmarks.worker import Measurement, Request, measure


def chain():
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "shape"), [(chain, (5, 7)), (convolutions, (5, 1, 8, 8))])
def test_matrix_of_every_method_is_the_jacobians(method, build, shape):
    torch.manual_seed(0)
    network, inputs = build(), torch.randn(shape)
    parameters = dict(network.named_parameters())
    jacobians = jacrev(lambda values: functional_call(network, values, (inputs,)).T)(parameters)
    J = torch.cat([j.detach().flatten(2).flatten(0, 1) for j in jacobians.values()], dim=1)
    gram = METHODS[method].prepare(network, inputs)()
    torch.testing.assert_close(gram.detach(), METHODS[method].scale * J @ J.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_ten_outputs_and_are_the_same_every_time(name):
    (network, inputs), (again, same) = (TASKS[name].build(3, "cpu") for _ in range(2))
    assert network(inputs).shape == (3, 10)
    assert torch.equal(inputs, same)
    assert torch.equal(network(inputs), again(same))


def test_operations_of_a_dense_chain_by_hand():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    count = operations(network, torch.randn(5, 4))
    # N = 5, V = 2, R = 10: 55 pairs of rows, 15 of samples; inputs 4 + 1 and 3 + 1.
    assert count.sweep == 5 * (5 * 3 + 4 * 2) + 10 * 4 * 2
    assert count.product == 55 * (3 + 1) + 15 * 5 + 55 * (2 + 1) + 15 * 4
    in_full = operations(network, torch.randn(5, 4), once=False)
    assert in_full.sweep == count.sweep
    assert in_full.product == 100 * (3 + 1) + 25 * 5 + 100 * (2 + 1) + 25 * 4
    assert matrix_products(network, torch.randn(5, 4)) == [(10, 2, 3), (10, 3, 10), (10, 2, 10)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        # T = 4, I = 2, O = 6, V = 24 rows a sample: one sample is cheaper formed, two by pairs of positions are not.
        (1, 24 * 4 * 2 * 6 + 24 * 25 // 2 * 2 * 6),
        (2, 48 * 4 * 2 * 6 + 48 * 49 // 2 * 2 * 6),
    ],
)
def test_operations_of_a_convolution_that_is_cheaper_formed(samples, expected):
    network = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Flatten())
    assert operations(network, torch.randn(samples, 1, 2, 2)).product == expected


def test_operations_of_a_convolution_that_is_cheaper_by_pairs():
    network = nn.Sequential(nn.Conv2d(9, 2, 3), nn.Flatten())
    # T = 2, I = 82, O = 2, V = 4, N = 3: 6 pairs of samples.
    assert operations(network, torch.randn(3, 9, 3, 4)).product == 6 * 2 * (2 * 82 + 2 * 4 * 2 + 4 * 4 * 2)


def request(method, **changes):
    asked = {"task": "lenet", "samples": 2, "repeats": 2, "seconds": 60.0, "threads": 1, "device": "cpu"}
    return Request(method=method, **asked | changes)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_measurement_in_this_process():
    measurement, gram = measure(request("curvlab"))
    assert measurement.outcome == "done"
    assert len(measurement.seconds) == 2
    assert gram.shape == (20, 20)
    assert measurement.peak_bytes >= 0
    in_full, once = measurement.rates
    time_at_full_rate = measurement.multiply_adds / measurement.matmul_rate
    assert once == pytest.approx(time_at_full_rate / measurement.median, rel=1e-12)
    assert in_full / once == pytest.approx(measurement.full_multiply_adds / measurement.multiply_adds, rel=1e-12)
    assert measurement.full_multiply_adds > measurement.multiply_adds


@pytest.mark.usefixtures("threads")
def test_a_spent_budget_leaves_one_timed_call():
    measurement, _ = measure(request("torch-func", repeats=50, seconds=1e-9))
    assert len(measurement.seconds) == 1
    assert measurement.rates == ()


@pytest.mark.usefixtures("threads")
def test_peak_memory_is_that_of_the_formed_jacobian():
    measurement, _ = measure(request("torch-func", task="mlp", samples=8, repeats=1))
    formed = 80 * sum(parameter.numel() * 4 for parameter in TASKS["mlp"].network().parameters())
    assert 0.7 * formed < measurement.peak_bytes < 1.5 * formed


def test_a_method_that_takes_too_long_is_reported():
    (entry,) = compare([request("curvlab")], timeout=0.2)
    assert entry.measurement == Measurement("out of time", "stopped after 0.2 s")
    assert not entry.wrong


def test_a_method_that_wants_too_much_memory_is_reported():
    (entry,) = compare([request("torch-func", task="mlp", samples=64, memory=1500 * 2**20)], timeout=120.0)
    assert entry.measurement.outcome == "out of memory"
    assert "allocate" in entry.measurement.note
    assert not entry.wrong


def done(method, *seconds, error=0.0, **changes):
    return Entry(request(method, **changes), Measurement("done", "", seconds, peak_bytes=3 * 2**30), error)


def test_failures_and_disagreements_are_wrong_and_shortages_are_not():
    assert not done("backpack", 1.0, error=AGREEMENT).wrong
    assert done("backpack", 1.0, error=2 * AGREEMENT).wrong
    assert done("backpack", 1.0, error=float("nan")).wrong
    assert Entry(request("backpack"), Measurement("failed", "why"), None).wrong
    assert not Entry(request("backpack"), Measurement("out of memory", "why"), None).wrong


def test_files_hold_the_comparison(tmp_path):
    killed = Entry(request("torch-func"), Measurement("out of memory", "killed by the system"), None)
    comparison = [done("curvlab", 0.5, 0.25, 0.3), done("backpack", 60.0, error=1.5e-7), killed]
    report.save(tmp_path / "comparison.md", [comparison], {})
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0] == "## Gram matrix of a LeNet on 28×28 images, N = 2, float32, cpu, 1 thread"
    cells = {cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.split("|")[1:-1]]) == 7}
    assert cells["curvlab, BackPACK"] == ["0.3", "1×", "3.0 GiB", "0.0e+00", "", ""]
    assert cells["BackPACK SqrtGGNExact"] == ["60", "200×", "3.0 GiB", "1.5e-07", "", ""]
    assert cells["torch.func jacrev"] == ["out of memory", "", "", "", "", ""]
    assert "torch.func jacrev: out of memory (killed by the system)." in lines
    report.save(tmp_path / "comparison.json", [comparison], {"python": "3.11"})
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["environment"] == {"python": "3.11"}
    assert stored["measurements"][0][0]["measurement"]["seconds"] == [0.5, 0.25, 0.3]


def test_command_compares_processes_and_writes_the_table(tmp_path, capfd):
    output = tmp_path / "comparison.json"
    options = ("--tasks", "lenet", "--peers", "backpack", "--samples", "2", "--repeats", "1", "--threads", "1")
    assert main([*options, "--output", str(output)]) == 0
    printed = capfd.readouterr().out
    assert "Gram matrix of a LeNet on 28×28 images, N = 2, float32, cpu, 1 thread" in printed
    (comparison,) = json.loads(output.read_text())["measurements"]
    assert [entry["request"]["method"] for entry in comparison] == [*OWN, "backpack"]
    assert comparison[0]["error"] == 0
    for entry in comparison[1:]:
        assert entry["error"] <= AGREEMENT
    for entry in comparison:
        assert f"{METHODS[entry['request']['method']].title} " in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repeats", "0"), "--repeats must be positive, got 0"),
        (("--samples", "0"), "--samples must be at least 1, got 0"),
        (("--output", "table.csv"), "--output table.csv must end in one of: .md, .json"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    assert main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
