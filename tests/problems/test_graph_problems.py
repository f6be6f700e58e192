"""Node classification: karate, which ships with torch-geometric, and the published graphs where their files are."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from curvlab import jacobian, sqrt_fisher
from curvlab.fisher import KFAC, Full, natural_gradient_step
from curvlab.nn import GraphNetwork, HalfSquaredError, linearize
from curvlab.problems import DataUnavailable, graph_problem, load_graph, resolve
from curvlab.problems.graphs import PLANETOID


def test_karate_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    problem = resolve("karate-gcn", width=5, depth=3, seed=1, samples=3, test_samples=7)
    assert problem.name == "karate-gcn"
    assert isinstance(problem.model, GraphNetwork)
    (x, y), (x_, y_) = problem.train, problem.test
    assert (len(x), len(y), len(x_), len(y_)) == (3, 3, 7, 7)
    assert problem.model(x).shape == (3, 4)
    rows = sqrt_fisher(problem.model, problem.loss, x, y)
    assert rows.shape == (12, 1)
    assert rows.count == 3
    assert list(tmp_path.iterdir()) == []


def test_the_nodes_of_karate():
    data = load_graph("karate")
    parts = torch.cat([data.train, data.validation, data.test])
    assert sorted(parts.tolist()) == list(range(34))
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 10, 20)
    assert data.labels[data.train].sort().values.tolist() == [0, 1, 2, 3]
    assert data.classes == 4


def test_problems_depend_on_the_seed_alone():
    one, same, other = (graph_problem("karate", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.model(one.train[0]), same.model(one.train[0]))
    assert not torch.equal(one.model(one.train[0]), other.model(one.train[0]))


def test_half_squared_error_linearisation_and_dtype():
    problem = graph_problem("karate", loss="half-squared", dtype=torch.float32)
    assert isinstance(problem.loss, HalfSquaredError)
    assert problem.train[1].tolist() == torch.eye(4)[load_graph("karate").labels[problem.train[0]]].tolist()
    double = problem.to(dtype=torch.float64)
    J = jacobian(double.model, double.train[0])
    linear = double.linearized()
    assert torch.allclose(jacobian(linear.model, double.train[0]).dense(), J.dense(), rtol=1e-12)
    with torch.no_grad():
        assert torch.allclose(linearize(double.model)(double.test[0]), double.model(double.test[0]))
    rows = sqrt_fisher(double.model, double.loss, *double.train)
    assert torch.allclose(rows.gram(), J.gram() / 4, rtol=1e-12)


def loss_of(problem):
    with torch.no_grad():
        return float(problem.loss(problem.model(problem.train[0]), problem.train[1]))


def take(problem, structure, damping, lr=1.0):
    step = natural_gradient_step(structure, problem.model, problem.loss, *problem.train, damping=damping)
    with torch.no_grad():
        for name, parameter in problem.model.named_parameters():
            parameter -= lr * step[name]


def test_a_natural_gradient_step_fits_the_labels():
    problem = graph_problem("karate", loss="half-squared", activation="tanh")
    linear = problem.linearized()
    before = loss_of(linear)
    take(linear, Full(), "rel:1e-10")
    assert loss_of(linear) < 1e-6 * before


def test_arguments_out_of_range():
    for arguments, message in (
        ({"samples": 5}, "karate has 4 training nodes in the split 'public'; 5 were asked for"),
        ({"test_samples": 0}, "20 test nodes"),
        ({"depth": 0}, "at least 1"),
        ({"loss": "hinge"}, "'half-squared' or 'cross-entropy'"),
        ({"split": "full"}, "'public' only"),
        ({"activation": "rele"}, "Did you mean 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            graph_problem("karate", **arguments)
    with pytest.raises(ValueError, match="Did you mean 'cora'"):
        load_graph("core")


def test_missing_files_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    monkeypatch.setattr("pooch.retrieve", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(DataUnavailable, match=r"ind\.pubmed\.x does not exist .*no network.*CURVLAB_DATA"):
        resolve("pubmed-gcn")


@pytest.fixture
def planetoid(monkeypatch, tmp_path) -> Path:
    """A copy of Cora under `$CURVLAB_DATA`."""
    published = Path(os.environ.get("CURVLAB_DATA", "")) / "planetoid/Cora"
    if not os.environ.get("CURVLAB_DATA") or not published.exists():
        pytest.skip("CURVLAB_DATA names no folder with planetoid/Cora")
    shutil.copytree(published, tmp_path / "planetoid/Cora")
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path))
    return tmp_path / "planetoid/Cora/raw"


def test_cora(planetoid):
    sizes = {"public": (140, 500, 1000), "full": (1208, 500, 1000), "complete": (1708, 500, 500)}
    for split, expected in sizes.items():
        data = load_graph("cora", split)
        assert (len(data.train), len(data.validation), len(data.test)) == expected
    assert data.features.shape == (2708, 1433)
    assert data.edge_index.shape == (2, 10556)
    assert torch.allclose(data.features.sum(1), torch.ones(2708))
    assert sorted(path.name for path in planetoid.parent.iterdir()) == ["raw"]
    problem = resolve("cora-gcn", samples=20, test_samples=10, width=4)
    assert len(problem.test[0]) == 10
    before = loss_of(problem)
    for _ in range(5):
        take(problem, KFAC(sharing="gradient", factored_damping="equal"), 0.01)
    assert loss_of(problem) < 0.7 * before


def test_a_truncated_file_is_named(planetoid):
    file = planetoid / "ind.cora.graph"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataUnavailable, match=rf"{file} is damaged"):
        load_graph("cora")


def test_published_files_are_named_as_torch_geometric_does():
    paths = [file.path for file in PLANETOID["citeseer"]]
    assert paths[0] == "planetoid/CiteSeer/raw/ind.citeseer.x"
    assert paths[-1] == "planetoid/CiteSeer/raw/ind.citeseer.test.index"
