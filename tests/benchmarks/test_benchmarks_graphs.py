"""The graphs' benchmark: what it times against references, the fit, and its command line on tiny graphs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.graphs import report
from benchmarks.graphs.__main__ import main
from benchmarks.graphs.methods import DAMPING, METHODS, random_graph
from benchmarks.graphs.worker import Request, measure
from curvlab import sqrt_fisher
from curvlab.fisher import KFAC

TINY = (9, 20, 3)


def test_what_is_timed_is_what_is_named():
    graph = random_graph(*TINY, "cpu")
    graph.network.double()
    rows = sqrt_fisher(graph.network, nn.CrossEntropyLoss(), graph.nodes, graph.labels)
    S = rows.dense()
    torch.testing.assert_close(METHODS["gram"].prepare(graph)(), S @ S.T)
    ones = torch.ones(rows.P, dtype=rows.dtype)
    torch.testing.assert_close(
        METHODS["kfac"].prepare(graph)(), KFAC(factored_damping=True).update(rows).solve(ones, DAMPING)
    )
    empirical = sqrt_fisher(graph.network, nn.CrossEntropyLoss(), graph.nodes, graph.labels, "empirical")
    loss = nn.functional.cross_entropy(graph.network(graph.nodes), graph.labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(graph.network.parameters()))])
    structure = KFAC(sharing="gradient", factored_damping="equal").update(empirical)
    torch.testing.assert_close(METHODS["kfac-step"].prepare(graph)(), structure.solve(gradient, DAMPING))


def test_the_exponent_is_that_of_the_larger_sizes():
    sizes = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    costs = np.where(sizes < 4, 16.0, sizes**2)
    assert report.exponent(list(sizes), list(costs)) == pytest.approx(2.0)
    assert report.exponent([1.0, 2.0], [1.0, 2.0]) is None


def test_a_measurement_has_sizes_times_and_memory(tmp_path):
    request = Request(
        method="gram", nodes=9, edges=20, labelled=3, repeats=2, seconds=5.0, threads=1, device="cpu"
    )  # fmt: skip
    found = measure(request, tmp_path)
    assert found.sizes == TINY
    assert len(found.seconds) == 2
    assert min(found.seconds) > 0


def test_the_command_writes_exponents(tmp_path, capsys):
    output = tmp_path / "costs.json"
    sizes = ["--nodes", "8", "16", "--edges", "16", "--labelled", "4"]
    options = ["--methods", "gram", "--graphs", "random", "--repeats", "1", "--threads", "1", "--output", str(output)]
    assert main([*sizes, *options]) == 0
    printed = capsys.readouterr().out
    assert "Nodes: graph convolutional network 64-16-4" in printed
    assert "exponent" in printed
    stored = json.loads(output.read_text())["measurements"]
    assert [len(sweep["entries"]) for sweep in stored] == [2, 1, 1]
    assert main(["--nodes", "8", "--labelled", "9"]) == 2
    assert "--labelled 9 exceeds the fewest --nodes" in capsys.readouterr().err
