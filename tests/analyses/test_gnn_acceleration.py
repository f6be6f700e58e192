"""The acceleration analysis: its command line on a small instance, its measurements, and its power to refute."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses.descent import Descent
from analyses.gnn_acceleration import ANALYSIS
from analyses.gnn_acceleration import flow as flows
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.experiments import conditioning, search
from analyses.gnn_acceleration.networks import MultiscaleNetwork, descent, gradients, loss_of
from analyses.gnn_acceleration.setting import named, principal, setting_of
from curvlab.nn import Propagation
from curvlab.study import Cell, Verdict, follow, judge
from curvlab.study.cells import matches
from curvlab.study.execution import Plan
from curvlab.study.measurements import tabulate
from curvlab.theory import graph_dynamics as theory
from paper_figures.xu_2021 import floors

SMALL = (
    "--depths", "1", "2", "--first-seed", "0", "--seeds", "2", "--nodes", "8", "--draws", "5", "--aggregation", "gcn",
)  # fmt: skip
IDENTITIES = (
    "speed-heads", "speed-layers", "speed-total", "bound-single", "bound-multi", "bound-scale", "bound-descent",
    "floor-guaranteed", "flow-energy", "flow-conserved", "skip-zero", "skip-one", "depth-zero", "depth-one",
    "conditioning-stack", "labels-initial", "relu-zero",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "analyses.gnn_acceleration", *SMALL, "--workers", "1", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, results / "gnn_acceleration" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(ANALYSIS.figures)
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments}
    rows = floors(table)
    assert set(rows["start"]) == {"zero", "orthogonal", "glorot", "uniform"}


def test_what_holds_exactly_is_supported(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = run
    outcomes = {v["claim"]: v["outcome"] for v in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert {claim: outcomes[claim] for claim in IDENTITIES} == dict.fromkeys(IDENTITIES, "supported")
    assert outcomes["scale-anywhere"] == "refuted"


TINY = Config(depths=(0, 1, 2), first_seed=0, seeds=1, nodes=8, aggregation=("gcn",), draws=5)


def verdict_of(claim: str, config: Config = TINY, **only: object) -> Verdict:
    """Measure those cells that a claim needs with some coordinates, and judge it alone."""
    plan = Plan.of(ANALYSIS, config)
    task, (judged,) = plan.task(), [one for one in plan.claims if one.id == claim]
    measured = {cell: task.observe(cell) for cell in plan.cells if judged.needs(cell) and matches(cell, only)}
    return judge([judged], tabulate(measured))[0]


def test_a_faster_bound_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were σ_max in the place of σ_min, the flow would be too slow."""
    monkeypatch.setattr(theory, "least_singular_value", lambda G: float(np.linalg.norm(G, 2)))
    assert verdict_of("bound-single", depth=1, features="all").outcome == "refuted"


def test_a_wrong_layer_gradient_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = flows.Model.gradient

    def wrong(self: flows.Model, only: object = None) -> object:
        heads, layers = gradient(self, only)
        return heads, [1.001 * layer for layer in layers]

    monkeypatch.setattr(flows.Model, "gradient", wrong)
    for claim in ("flow-energy", "flow-conserved"):
        assert verdict_of(claim, depth=2, start="orthogonal").outcome == "refuted"


def test_a_missing_rank_is_said_with_its_nodes(caplog: pytest.LogCaptureFixture) -> None:
    """Two training nodes with equal features at depth 0."""
    cell = Cell({"split": "public", "aggregation": "gcn", "form": "normalised"})
    features = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]])
    values = np.linalg.svd(features, compute_uv=False)
    with caplog.at_level("WARNING", logger="curvlab"):
        row = conditioning._rank(cell, TINY, features, values, np.array([4, 7, 31]), 0, "single")
    assert row["value"] == 1
    assert row["nodes"] == "4 31"
    assert "1 of 3 ranks are missing" in caplog.text


def test_bounds_without_rank_are_outside_the_assumptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(features: list[np.ndarray], *rest: object, **more: object) -> flows.Model:
        for G in features:
            G[:, 1] = G[:, 0]
        return initial(features, *rest, **more)

    initial = flows.initial
    monkeypatch.setattr("analyses.gnn_acceleration.experiments.flows.initial", doubled)
    verdict = verdict_of("bound-single", depth=1, features="all")
    assert verdict.outcome == "outside the assumptions"
    nodes = setting_of(Cell({"aggregation": "gcn", "seed": 0}), TINY).nodes.numpy()
    assert f"by the nodes {nodes[0]}, {nodes[1]}" in verdict.note
    verdict = verdict_of("bound-scale", depth=1, features="all")
    assert verdict.outcome == "outside the assumptions"
    assert "the scale lacks full column rank" in verdict.note
    assert verdict_of("bound-scale-deficient", depth=1).seeds == 1


def test_of_many_nodes_the_first_are_named() -> None:
    assert named(np.arange(3)) == "0, 1, 2"
    assert named(np.arange(100)).endswith("11 and 88 more")


@pytest.fixture
def model() -> flows.Model:
    cell = Cell({"aggregation": "gin", "seed": 0})
    setting = setting_of(cell, Config(nodes=6))
    return flows.initial(setting.propagated(3), setting.targets, range(4), np.random.default_rng(0), "glorot", 0.7)


def test_gradients_of_the_flow_are_those_of_autodiff(model: flows.Model) -> None:
    """On the whole graph, through the propagation and not the propagated features."""
    setting = setting_of(Cell({"aggregation": "gin", "seed": 0}), Config(nodes=6))
    network = MultiscaleNetwork(setting.propagation, [34] * 4, 4, range(4), nn.Identity(), torch.Generator())
    with torch.no_grad():
        for mine, theirs in zip((*network.heads, *network.layers), (*model.heads.values(), *model.layers), strict=True):
            mine.copy_(torch.from_numpy(theirs))
    Y = torch.from_numpy(setting.targets.T)
    loss, heads, layers = gradients(network, setting.features, setting.nodes, lambda z: (z - Y).square().sum())
    assert model.loss == pytest.approx(loss, rel=1e-12)
    for found, expected in zip((*model.gradient()[0].values(), *model.gradient()[1]), (*heads, *layers), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-11 * float(expected.abs().max()))


def test_gains_are_those_of_the_kronecker_forms(model: flows.Model) -> None:
    rng = np.random.default_rng(0)
    small = replace(
        model,
        features=[rng.normal(size=(3, 5)) for _ in range(3)],
        targets=rng.normal(size=(2, 5)),
        heads={scale: rng.normal(size=(2, 3)) for scale in range(3)},
        layers=[rng.normal(size=(3, 3)) for _ in range(2)],
    )
    V = 2 * small.residual
    for reference in ([2], [0, 1]):
        speed, of_heads, of_layers = small.gain(reference)
        expected = theory.speed_gain(small.heads, small.layers, small.features, V, reference)
        assert (of_heads, of_layers) == pytest.approx(expected, rel=1e-9)
        old = theory.speed_terms({s: small.heads[s] for s in reference}, small.layers, small.features, V)
        assert speed == pytest.approx(sum(old[0].values()) + sum(old[1]), rel=1e-9)


def test_sharpness_is_that_of_the_autodiff_kernel(model: flows.Model) -> None:
    def outputs(weights: torch.Tensor) -> torch.Tensor:
        parts = [*model.layers, *model.heads.values()]
        found = [p.view(q.shape) for p, q in zip(weights.split([q.size for q in parts]), parts, strict=True)]
        h, result = [torch.from_numpy(G) for G in model.features], 0
        for scale, head in zip(model.heads, found[3:], strict=True):
            reached = h[scale]
            for layer in found[:scale]:
                reached = layer @ reached
            result = result + head @ reached
        return result.flatten()

    J = torch.autograd.functional.jacobian(outputs, torch.from_numpy(model.weights), vectorize=True)
    assert model.sharpness() == pytest.approx(float(torch.linalg.matrix_norm(J, 2)) ** 2, rel=1e-9)


def test_descent_approaches_the_flow(model: flows.Model) -> None:
    times = np.linspace(0, 0.2 / model.sharpness(), 5)
    exact = flows.flow(model, times)
    assert exact.energy < 1e-8
    one = model.at(model.weights + times[1] * model.slope(model.weights))
    np.testing.assert_allclose(flows.descend(model, times, 1).models[1].weights, one.weights)
    far, near = (abs(flows.descend(model, times, steps).losses - exact.losses).max() for steps in (4, 8))
    assert far / near == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("reference", [[2], [0, 1]])
@pytest.mark.parametrize("deficient", [False, True])
def test_models_are_compared_at_equal_outputs(reference: list[int], deficient: bool) -> None:
    for seed in range(8):
        drawn = search._drawn(np.random.default_rng(seed), 2, "gcn", 1.0, deficient=deficient)
        model = search.equal_outputs(drawn, reference)
        old = theory.linear_outputs({s: drawn.heads[s] for s in reference}, drawn.layers, drawn.features)
        np.testing.assert_allclose(model.residual + model.targets, old, atol=1e-9 * np.abs(old).max())


def test_new_heads_are_searched_where_they_reach_the_layers() -> None:
    """Heads that add nothing to the outputs are not zero where features and scales are more than training nodes."""
    models = [search._drawn(np.random.default_rng(seed), 2, "gcn", 1.0) for seed in range(20)]
    silent = [search.equal_outputs(model, [2]).heads[1] for model in models]
    assert np.mean([np.abs(head).max() > 1e-6 for head in silent]) > 0.5


def test_networks_propagate_before_every_layer() -> None:
    S = Propagation(torch.tensor([[0, 1], [1, 2]]), 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    network = MultiscaleNetwork(S, (2, 4), 1, (0, 1), nn.ReLU(), generator)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for head in network.heads:
            head.fill_(1.0)
        expected = x.sum(1) + (S(x) @ network.layers[0].T).relu().sum(1)
        assert torch.allclose(network(x)[:, 0], expected)


def test_descent_on_a_graph_follows_the_gradient_and_can_be_taken_up() -> None:
    setting = setting_of(Cell({"aggregation": "gcn", "seed": 0}), Config(nodes=6))
    labels, eta = setting.graph.labels[setting.nodes], 0.01

    loss = loss_of("squared", labels, 4)

    def start() -> Descent:
        network = MultiscaleNetwork(
            setting.propagation, (34, 5, 5), 4, range(3), nn.ReLU(), torch.Generator().manual_seed(0)
        )
        return descent(network, setting.features, setting.nodes, loss, eta)

    one = start()
    _, heads, _ = gradients(one.model, setting.features, setting.nodes, loss)
    losses = follow(one, 1).series("loss")
    assert losses[1] < losses[0]
    for head, gradient in zip(one.model.heads, heads, strict=True):
        torch.testing.assert_close(head.detach(), -eta * gradient)
    again = start()
    again.load_state_dict(one.state_dict())
    assert follow(again, 1).series("loss").tolist() == follow(one, 1).series("loss").tolist()


def test_principal_components_keep_the_leading_gram() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert principal(x, 5) is x
    kept = principal(x, 2)
    values = torch.linalg.svdvals(x)
    assert torch.allclose(torch.linalg.svdvals(kept), values[:2] * 3 / values[:2].norm())


def test_without_layers_what_is_about_them_is_not_measured() -> None:
    plan = Plan.of(ANALYSIS, replace(TINY, depths=(0,)))
    unplanned = {claim.id for claim in plan.claims if not any(claim.needs(cell) for cell in plan.planned)}
    assert {"skip-faster-gcn", "depth-along-path", "descent-order", "relu-zero"} <= unplanned
    assert not {"bound-single", "conditioning-stack", "labels-centred-gcn"} & unplanned
    assert verdict_of("labels-centred-gcn", plan.config).estimate > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": "coora"}, "Did you mean 'cora'"),
        ({"problem": "cora", "splits": ("pubic",)}, "Did you mean 'public'"),
        ({"splits": ()}, "--splits needs at least one value"),
        ({"splits": ("public", "full")}, "karate has the split 'public' only, not 'full'"),
        ({"aggregation": ()}, "--aggregation needs at least one value"),
        ({"aggregation": ("gcnn",)}, "Did you mean 'gcn'"),
        ({"depths": (-1,)}, "--depths"),
        ({"nodes": 1}, "--nodes"),
        ({"draws": 0}, "--draws"),
        ({"components": 0}, "--components"),
        ({"dtype": "float32"}, "--dtype"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_seeds_that_only_turn_a_run_are_no_replicates() -> None:
    """Orthogonal layers from zero heads give the same losses whatever the seed; a fixed split leaves nothing random."""
    config = replace(TINY, nodes=0, seeds=2)
    verdict = verdict_of("skip-faster-gcn", config, depth=1)
    assert verdict.outcome == "outside the assumptions"
    assert "--nodes" in verdict.note
