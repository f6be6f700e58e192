"""Natural gradient on graphs: the method against dense matrices, the choice of recipes, and the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from analyses.gnn_natural_gradient import ANALYSIS
from analyses.gnn_natural_gradient.arms import BEST_EPOCH, reduced
from analyses.gnn_natural_gradient.comparisons import gain
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.experiments import accuracy, kronecker, sensitivity, timing
from analyses.gnn_natural_gradient.experiments.tuning import best
from analyses.gnn_natural_gradient.recipe import ADAM, METHODS, SGD, Recipe
from analyses.gnn_natural_gradient.training import (
    ACCURACY,
    VALIDATION,
    VALIDATION_LOSS,
    GraphTraining,
    Setting,
    setting_of,
)
from curvlab.fisher import KFAC
from curvlab.problems import load_graph
from curvlab.study import Cell, Trace, follow, judge, undecided
from curvlab.study.execution import Plan
from curvlab.study.measurements import normalise, tabulate
from paper_figures.izadi_2020 import PAPER, accuracies

EPOCHS = 4


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of("karate", "public", "cpu", "float64", 0)


def test_a_seed_draws_the_split_of_karate_and_keeps_its_counts(setting: Setting) -> None:
    published = load_graph("karate")
    found = [setting, setting_of("karate", "public", "cpu", "float64", 1)]
    for drawn in found:
        parts = (drawn.graph.train, drawn.graph.validation, drawn.graph.test)
        assert torch.cat(parts).sort()[0].equal(torch.arange(len(drawn.labels)))
        assert [len(part) for part in parts] == [4, len(published.validation), len(published.test)]
        assert drawn.labels[drawn.graph.train].sort()[0].tolist() == [0, 1, 2, 3]
        assert drawn.trains.nonzero()[:, 0].equal(drawn.graph.train.sort()[0])
    assert not found[0].graph.test.equal(found[1].graph.test)


def dense_operator(setting: Setting) -> Tensor:
    """Return D^(−1/2)(A + I)D^(−1/2)."""
    N = len(setting.labels)
    adjacency = torch.eye(N, dtype=torch.float64)
    adjacency[setting.graph.edge_index[1], setting.graph.edge_index[0]] += 1
    degree = adjacency.sum(1)
    return adjacency / torch.outer(degree, degree).sqrt()


class Reference:
    """The published algorithm on dense matrices, step by step, by plain gradient descent of rate one."""

    def __init__(self, setting: Setting, model: nn.Module, recipe: Recipe) -> None:
        self.setting, self.recipe = setting, recipe
        self.P = dense_operator(setting)
        self.weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self.inverses: list[tuple[Tensor, Tensor]] = []

    def step(self, epoch: int) -> None:
        trains, labels, recipe = self.setting.trains, self.setting.labels, self.recipe
        W1, b1, W2, b2 = self.weights
        weight = (epoch / EPOCHS) ** recipe.gamma if recipe.gamma is not None else 0.0
        x1 = self.P @ self.setting.features
        h1 = x1 @ W1.T + b1
        x2 = self.P @ h1.relu()
        h2 = x2 @ W2.T + b2
        losses = nn.functional.cross_entropy(h2, torch.where(trains, labels, h2.argmax(1)), reduction="none")
        loss = losses[trains].mean() + (weight if recipe.in_loss else 0.0) * losses[~trains].mean()
        grads = torch.autograd.grad(loss, [h1, h2, *self.weights])
        labelled, others = int(trains.sum()), int((~trains).sum())
        if (epoch - 1) % recipe.refresh == 0:
            n = labelled + (weight if recipe.in_fisher else 0.0) * others
            self.inverses = []
            for x, g in ((x1, grads[0]), (x2, grads[1])):
                bar = torch.cat([x.detach(), torch.ones(len(x), 1, dtype=x.dtype)], 1)
                g = labelled * g
                factors = (bar.T @ bar / n, g.T @ g / n)
                self.inverses.append(
                    tuple(torch.linalg.inv(f + recipe.epsilon**0.5 * torch.eye(len(f), dtype=f.dtype)) for f in factors)
                )
        with torch.no_grad():
            for layer, (A, G) in enumerate(self.inverses):
                W, b = self.weights[2 * layer : 2 * layer + 2]
                dW, db = grads[2 + 2 * layer : 4 + 2 * layer]
                step = G @ torch.cat([dW, db[:, None]], 1) @ A
                W -= recipe.lr * step[:, :-1]
                b -= recipe.lr * step[:, -1]


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("in_loss", [True, False])
@pytest.mark.parametrize("in_fisher", [True, False])
def test_the_method_is_the_published_one(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, gamma: float | None, in_loss: bool, in_fisher: bool
) -> None:
    monkeypatch.setattr("analyses.gnn_natural_gradient.training.MOMENTUM", 0.0)
    recipe = replace(SGD, lr=0.3, refresh=2, gamma=gamma, in_loss=in_loss, in_fisher=in_fisher)
    run = GraphTraining(setting, recipe, 0, EPOCHS)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    reference = Reference(setting, run.model, recipe)
    for epoch in range(1, EPOCHS + 1):
        run.step(epoch - 1)
        reference.step(epoch)
        for found, expected in zip(run.model.parameters(), reference.weights, strict=True):
            torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-11)


def test_layers_before_their_aggregation_compute_the_same(setting: Setting) -> None:
    """With zero biases; and features that are aggregated beforehand change nothing."""
    nodes = torch.arange(len(setting.labels))
    outputs = [setting.network(replace(ADAM, aggregated=way), 3).eval()(nodes) for way in (True, False)]
    model = setting.network(ADAM, 3)
    first, second = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    P = dense_operator(setting)
    expected = P @ (P @ setting.features @ first.T).relu() @ second.T
    for found in outputs:
        torch.testing.assert_close(found, expected)


def train(setting: Setting, recipe: Recipe, seed: int, epochs: int) -> Trace:
    return follow(GraphTraining(setting, recipe, seed, epochs), epochs)


def test_a_seed_is_one_run_and_leaves_the_generator_alone(setting: Setting) -> None:
    before = torch.get_rng_state()
    first, again, other = (train(setting, ADAM, seed, 3).series(VALIDATION_LOSS).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("recipe", [replace(ADAM, refresh=2, kind="mc", gamma=1.0), replace(SGD, kfac=False)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    setting: Setting, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With curvature that is kept from earlier epochs, and with dropout."""
    monkeypatch.setattr("curvlab.study.loop.SAVED", -1.0)
    run, file = GraphTraining(setting, recipe, 0, 5), tmp_path / "run.pt"
    take = run.step

    def interrupted(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        take(step)

    monkeypatch.setattr(run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follow(run, 5, checkpoint=file)
    torch.manual_seed(7)
    resumed = follow(GraphTraining(setting, recipe, 0, 5), 5, checkpoint=file)
    assert resumed.seen == train(setting, recipe, 0, 5).seen
    assert not list(tmp_path.iterdir()), "it was taken up, not set aside"


def test_divergence_is_a_status(setting: Setting) -> None:
    trace = train(setting, replace(SGD, kfac=False, lr=1e200), 0, 30)
    assert trace.status.startswith("diverged")
    assert len(trace.seen) < 30


def test_a_run_is_judged_at_its_lowest_validation_loss() -> None:
    losses = {1: 2.0, 2: 1.0, 3: 1.5}
    seen = [{"step": s, VALIDATION_LOSS: v, VALIDATION: 10.0 * s, ACCURACY: 20.0 * s} for s, v in losses.items()]
    found = {row["quantity"]: row["value"] for row in reduced(Trace(seen), ADAM)}
    assert found == {ACCURACY: 40.0, VALIDATION: 20.0, VALIDATION_LOSS: 1.0, BEST_EPOCH: 2}
    at_once = reduced(Trace([], diverged=1), ADAM)
    assert all(np.isnan(row["value"]) and row["status"] == "diverged at step 1" for row in at_once)


def test_drawn_labels_and_width_are_other_runs(setting: Setting) -> None:
    recipes = (ADAM, replace(ADAM, kind="mc"), replace(ADAM, width=64))
    assert len({train(setting, recipe, 0, 3).series(VALIDATION_LOSS)[-1] for recipe in recipes}) == 3


def test_the_published_recipes_come_first() -> None:
    first = {name: method.recipes[0] for name, method in METHODS.items()}
    assert first["adam-kfac"] == Recipe()
    assert first["adam"] == Recipe(kfac=False)
    assert first["sgd-kfac"] == Recipe("sgd", weight_decay=0.0)
    assert len({len(method.recipes) for method in METHODS.values()}) == 1
    assert all(len(set(method.recipes)) == len(method.recipes) for method in METHODS.values())
    assert accuracy.published("adam", Config(problem="cora"), "complete").width == 64
    assert accuracy.published("adam-kfac", Config(problem="cora"), "public") == Recipe()


def tuned(*configurations: tuple[list[float], list[float], str]) -> pd.DataFrame:
    """Runs of configurations by their validation accuracies, validation losses and status."""
    return pd.DataFrame(
        [
            {
                "configuration": index,
                "seed": start,
                "quantity": f"tuning_{name}",
                "value": value,
                "status": status,
            }
            for index, (accuracies, losses, status) in enumerate(configurations)
            for name, found in ((VALIDATION, accuracies), (VALIDATION_LOSS, losses))
            for start, value in enumerate(found)
        ]
    )


def test_the_choice_is_by_validation_accuracy_then_loss_and_without_divergence() -> None:
    first = ([80, 60], [1.0, 1.0], "ok")
    assert best(tuned(first, ([70, 70], [0.9, 0.9], "ok"))) == 1
    assert best(tuned(first, ([71, 70], [9.0, 9.0], "ok"))) == 1
    assert best(tuned(first, first)) == 0
    assert best(tuned(first, ([99, 99], [0.1, 0.1], "diverged at step 3"))) == 0
    assert best(tuned(*[([float("nan")] * 2, [float("nan")] * 2, "diverged at step 1")] * 2)) == 0


def arm_table(values: dict[str, tuple[float, float, float]]) -> pd.DataFrame:
    """Validation accuracy, validation loss and test accuracy of arms at one seed."""
    names = (VALIDATION, VALIDATION_LOSS, ACCURACY)
    return pd.DataFrame(
        [
            {"arm": arm, "seed": 0, "quantity": name, "value": value}
            for arm, found in values.items()
            for name, value in zip(names, found, strict=True)
        ]
    )


ARMS = {"a": (80, 0.5, 10), "b": (80, 0.4, 20), "c": (70, 0.1, 99)}


def test_optimism_is_that_of_the_choice_on_validation_nodes() -> None:
    assert sensitivity.optimism(arm_table(ARMS))["value"].tolist() == [79]


def test_arms_are_compared_in_pairs() -> None:
    claim = gain("x", "X.", "claim 2", [("c", "a"), ("c", "b")], Config(), undecided("Nobody knows."), "exploration")
    assert claim.estimated(arm_table(ARMS))["value"].tolist() == [84]


def test_epochs_to_the_rivals_lowest_loss() -> None:
    curves = {"x": [3.0, 1.0, 0.5], "y": [3.0, 2.0, 1.5]}
    rows = [
        {"arm": arm, "seed": 0, "epoch": epoch + 1, "quantity": "curve_validation_loss", "value": value}
        for arm, curve in curves.items()
        for epoch, value in enumerate(curve)
    ]
    table = pd.DataFrame(rows)
    assert float(accuracy.reached_ratio(table, "x", "y", 100)["value"].iloc[0]) == pytest.approx(np.log10(2 / 3))
    assert float(accuracy.reached_ratio(table, "y", "x", 3)["value"].iloc[0]) == pytest.approx(np.log10(4 / 3))


def test_seconds_are_epochs_times_their_price() -> None:
    runs = (("x", "k", 10.0), ("y", "p", 40.0))
    rows = [{"arm": a, "method": m, "seed": 0, "quantity": "best_epoch", "value": v} for a, m, v in runs]
    rows += [{"method": m, "seed": 0, "quantity": timing.SECONDS, "value": v} for m, v in (("k", 2.0), ("p", 1.0))]
    found = timing.seconds_ratio(pd.DataFrame(rows), "x", "y")
    assert found["value"].tolist() == pytest.approx([np.log10(0.5)])


@pytest.mark.parametrize(
    ("accuracies", "outcome"),
    [((75.0, 75.5, 74.5), "refuted"), ((82.0, 82.5, 81.5), "supported"), ((70.0, 82.0, 90.0), "inconclusive")],
)
def test_a_published_accuracy_is_held_to_the_prediction_interval(accuracies: tuple[float, ...], outcome: str) -> None:
    """82.84 %; three runs with a standard deviation of 0.5 predict a mean of ten within 1.42 points."""
    config = Config(problem="cora", seeds=3)
    (claim,) = (c for c in ANALYSIS.claims(config) if c.id == "headline-published")
    measured = {
        Cell({"experiment": "accuracy", "arm": "adam-kfac published", "split": "public", "seed": seed}): [
            {"quantity": ACCURACY, "value": value}
        ]
        for seed, value in enumerate(accuracies)
    }
    table = tabulate({c: normalise(c, rows) for c, rows in measured.items()})
    assert judge([claim], table)[0].outcome == outcome
    assert accuracy.predicted(table, 82.84)["tolerance"].iloc[0] == pytest.approx(
        4.303 * np.std(accuracies, ddof=1) * np.sqrt(1 / 3 + 1 / 10), rel=1e-3
    )


def test_a_wrong_kronecker_form_is_refuted(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_isolated", "_without_edges"):
        row = pd.Series(getattr(kronecker, name)(setting, 0))
        assert row["value"] <= row["tolerance"]
    monkeypatch.setattr(kronecker, "izadi", lambda: KFAC(factored_damping=True))
    row = pd.Series(kronecker._without_edges(setting, 0))
    assert row["value"] > row["tolerance"]


def test_options_are_checked() -> None:
    for options, message in (
        ({"problem": "kora"}, "Did you mean 'cora'"),
        ({"splits": ("publik",)}, "Did you mean 'public'"),
        ({"splits": ("complete",)}, "karate has the split 'public' only"),
        ({"splits": ()}, "at least one"),
        ({"configurations": 99}, "--configurations must be from 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"gammas": (0.0,)}, "--gammas must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**options)


def unplanned(config: Config) -> set[str]:
    plan = Plan.of(ANALYSIS, config)
    return {claim.id for claim in plan.claims if not any(claim.needs(cell) for cell in plan.planned)}


def test_grids_share_the_published_point() -> None:
    config = Config(seeds=1, epsilons=(0.01, 0.1), refreshes=(50,), gammas=(1.0,))
    assert [arm.name for arm in sensitivity.arms(config)] == ["adam epsilon=0.1", "sgd epsilon=0.1", "ε=0.1 both γ=1"]
    assert unplanned(config) == {"sensitivity-refresh", "sensitivity-gamma"}


def test_without_schedules_unlabelled_nodes_are_not_measured() -> None:
    assert not unplanned(Config())
    without = {claim.id for claim in ANALYSIS.claims(Config()) if claim.id.startswith("lambda-")}
    assert unplanned(Config(gammas=())) == {*without, "sensitivity-gamma"}


SMALL = (
    "--first-seed", "0", "--seeds", "2", "--epochs", "6", "--configurations", "2", "--starts", "1", "--epsilons", "0.1",
    "--gammas", "1", "2", "--refreshes", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    line = [sys.executable, "-m", "analyses.gnn_natural_gradient", *SMALL, "--workers", "1", "--results", str(results)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return done, results / "gnn_natural_gradient" / "latest"


def test_the_command_ends_with_verdicts_and_files(command: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = command
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(ANALYSIS.figures)
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments}
    assert set(table.loc[table["experiment"] == "tuning", "seed"]) == {0}
    verdicts = {v["claim"]: v for v in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert {verdicts[claim]["outcome"] for claim in ("kronecker-isolated", "kronecker-mlp")} == {"supported"}
    assert all(verdict["estimate"] is not None for verdict in verdicts.values() if verdict["seeds"])


def test_selected_runs_have_the_recipe_that_tuning_chose(
    command: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    table = pd.read_parquet(command[1] / "measurements.parquet")
    for method, known in METHODS.items():
        rows = table[table["method"] == method]
        judged = rows[(rows["experiment"] == "accuracy") & (rows["choice"] == "selected")]
        chosen = best(rows[rows["experiment"] == "tuning"])
        assert set(judged["recipe"].dropna()) == {str(known.recipes[chosen])}


def test_the_paper_is_drawn_from_stored_results(command: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, folder = command
    table = pd.read_parquet(folder / "measurements.parquet")
    verdicts = pd.DataFrame(json.loads((folder / "verdicts.json").read_text())["verdicts"])
    for draw in PAPER.figures.values():
        assert draw(table, verdicts).axes
    rows = accuracies(table)
    assert len(rows) == len(METHODS)
