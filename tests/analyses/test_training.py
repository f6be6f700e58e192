"""The training analysis: its command line on a small real instance, runs, the choice of configurations, and the comparison."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from analyses.training import ANALYSIS, tuning
from analyses.training import race as racing
from analyses.training.comparison import SECONDS, Comparison, seconds_to
from analyses.training.config import Config
from analyses.training.figures import FIGURES
from analyses.training.methods import (
    CONFIGURATIONS,
    METHODS,
    PASSES,
    Method,
    Together,
    half_coupled,
    of_family,
    output_layer,
)
from analyses.training.parts import PARTS
from analyses.training.race import TUNING_SEED, entrants, optimiser_of, problem_of
from analyses.training.run import Checkpoint, Evaluation, Trace, batch, batches, evaluate, take_step, train
from analyses.training.tasks import TASKS, Task
from curvlab.fisher import STRUCTURES, LayerWise
from curvlab.problems import PROBLEMS, Problem, resolve
from curvlab.study import Cell, judge
from curvlab.study.measurements import normalise, tabulate

SMALL = (
    "--seeds", "3", "--races", "2", "--steps", "6", "--configurations", "2", "--rivals", "sgd", "muon", "--structures", "kfac",
    "--ingredients", "kfac-rare", "--target-loss", "2", "--target-accuracy", "0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "analyses.training", *SMALL, "--workers", "1", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, results / "training" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(FIGURES)
    assert "Cells without measurements" not in done.stdout
    verdicts = {v["claim"]: v["outcome"] for v in json.loads((folder / "verdicts.json").read_text())["verdicts"]}
    assert {"steps-loss-kfac", "steps-accuracy-kfac", "time-loss-kfac", "ingredient-rare", "equal-rate-kfac"} <= set(
        verdicts
    )
    assert verdicts["steps-loss-kfac"] != "outside the assumptions"


def test_every_method_is_tuned_alike_and_judged_on_fresh_seeds(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    table = pd.read_parquet(run[1] / "measurements.parquet")
    assert set(table["part"]) == set(PARTS)
    tuned = table[table["quantity"] == "tuning_steps"].groupby("method")["configuration"].nunique()
    judged = table[table["quantity"] == "steps_to_loss"].groupby("method")["seed"].nunique()
    methods = {"sgd", "muon", "kfac", "kfac-split", "kfac-rare"}
    assert tuned.to_dict() == dict.fromkeys(methods, 2)
    assert judged.to_dict() == dict.fromkeys(methods, 2)
    seconds = table[table["quantity"] == SECONDS]
    assert set(seconds["method"]) == methods
    assert (seconds["value"] > 0).all()
    losses = table[(table["quantity"] == "loss") & (table["seed"] == 1) & (table["step"] == 0)]
    assert len(set(losses["value"])) == 1, "all methods start from the same network"


CONFIG = Config(seeds=1, steps=4, rivals=("sgd",), structures=("kfac",), ingredients=())


@pytest.fixture(scope="module")
def digits() -> Problem:
    return problem_of(CONFIG, 0)


@pytest.fixture
def problem(digits: Problem) -> Problem:
    """A problem whose model may be trained."""
    return digits.to()


def run_of(steps: float, loss: float, *, reached: bool = True, diverged: bool = False) -> list[dict[str, object]]:
    return [
        {"quantity": "tuning_steps", "value": steps, "status": "ok" if reached else "not reached"},
        {"quantity": "tuning_loss", "value": loss, "status": "diverged" if diverged else "ok"},
    ]


@pytest.mark.parametrize(
    ("runs", "best"),
    [
        ([run_of(30, 0.01), run_of(20, 0.02)], 1),
        ([run_of(20, 0.02), run_of(20, 0.01)], 1),
        ([run_of(100, 0.2, reached=False), run_of(90, 0.05)], 1),
        ([run_of(10, float("inf"), diverged=True), run_of(40, 0.05)], 1),
        ([run_of(100, 0.3, reached=False), run_of(10, float("inf"), diverged=True)], 1),
        ([run_of(100, float("inf"), reached=False, diverged=True), run_of(100, 0.4, reached=False)], 1),
    ],
)
def test_the_best_configuration(runs: list[list[dict[str, object]]], best: int) -> None:
    assert tuning.best(runs) == best


def test_the_choice_is_made_on_the_tuning_seed_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, int, int]] = []

    def race(method: Method, index: int, config: Config, seed: int) -> Trace:
        made.append((method.name, index, seed))
        losses = {0: 0.5, 1: 0.05, 2: 0.2, 3: 0.5}
        return Trace([Evaluation(0, 2.3, 0.1), Evaluation(4, losses[index], 0.9)])

    monkeypatch.setattr(tuning, "race", race)
    config = replace(CONFIG, results=tmp_path)
    tuning.cache_of(config).folder.mkdir(parents=True)
    assert tuning.chosen("kfac", config) == 1
    assert made == [("kfac", index, TUNING_SEED) for index in range(4)]
    tuning.chosen.cache_clear()
    assert tuning.chosen("kfac", config) == 1
    assert len(made) == 4, "another process finds the tuning runs among the finished cells"
    assert TUNING_SEED not in range(100)


def judged(values: dict[str, list[float]], quantity: str = "steps_to_loss", status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame(
        {"method": name, "seed": seed, "quantity": quantity, "value": value, "status": status}
        for name, found in values.items()
        for seed, value in enumerate(found)
    )


def test_a_comparison_is_with_the_best_other_on_the_same_seeds() -> None:
    table = judged({"kfac": [10, 40], "sgd": [100, 100], "adam": [20, 40], "muon": [10, 1000]})
    found = Comparison("kfac", ("sgd", "adam", "muon")).steps(table)
    assert found["seed"].tolist() == [0, 1]
    assert found["value"].tolist() == pytest.approx([-0.30103, 0.0], abs=1e-5)


def test_seconds_are_steps_times_seconds_of_a_step() -> None:
    steps = judged({"kfac": [10, 40], "sgd": [100, 200]})
    price = judged({"kfac": [0.5, 0.25], "sgd": [0.01, 0.02]}, SECONDS)
    found = seconds_to(pd.concat([price, steps]), "steps_to_loss")
    assert found["value"].tolist() == pytest.approx([5, 10, 1, 4])
    ratio = Comparison("kfac", ("sgd",)).seconds("steps_to_loss")(pd.concat([steps, price]))
    assert (10 ** ratio["value"]).tolist() == pytest.approx([5, 2.5])


def test_targets_that_nobody_reached_are_outside_the_assumptions() -> None:
    versus = Comparison("kfac", ("sgd",))
    failed = judged({"kfac": [100, 100], "sgd": [100, 100]}, status="not reached")
    assert "kfac" in str(versus.outside(failed))
    failed.loc[3, "status"] = "ok"
    assert versus.outside(failed) is None


@pytest.mark.parametrize(("steps", "outcome"), [((20, 22, 24), "supported"), ((90, 95, 99), "refuted")])
def test_claims_can_come_out_either_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: tuple[int, ...], outcome: str
) -> None:
    def race(method: Method, index: int, config: Config, seed: int) -> Trace:
        reached = 50 + index if method.name == "sgd" else steps[seed % 3]
        return Trace([Evaluation(0, 2.3, 0.1), Evaluation(reached, 0.05, 0.95)])

    monkeypatch.setattr(tuning, "race", race)
    monkeypatch.setattr("analyses.training.parts.judging.race", race)
    config = replace(CONFIG, seeds=3, results=tmp_path)
    tuning.cache_of(config).folder.mkdir(parents=True)
    (claim,) = (claim for claim in ANALYSIS.claims(config) if claim.id == "steps-loss-kfac")
    cells = [cell for cell in ANALYSIS.cells(config) if claim.needs(cell)]
    assert {cell["part"] for cell in cells} == {"judging"}
    measured = {cell: normalise(cell, ANALYSIS.measure(cell, config)) for cell in cells}
    (verdict,) = judge([claim], tabulate(measured))
    assert verdict.outcome == outcome


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["muon", "kfac-adapted", "kfac-rare", "kfac-accumulated", "kfac-autocast", "full"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    name: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, task = METHODS[name], Task(batch=32, steps=12, every=3, loss=0.1, accuracy=0.9)
    make = partial(optimiser_of, method, point=method.points[0], config=CONFIG, seed=0)
    whole = problem.to()
    expected = train(whole, make(problem=whole), task, 0, passes=method.passes)

    monkeypatch.setattr("analyses.training.run.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("analyses.training.run.batch", _failing_at(7 * method.passes))
    checkpoint, first = Checkpoint(tmp_path / "run.pt"), problem.to()
    with pytest.raises(_Interrupted):
        train(first, make(problem=first), task, 0, checkpoint, passes=method.passes)
    monkeypatch.setattr("analyses.training.run.batch", batch)
    second = problem.to()
    found = train(second, make(problem=second), task, 0, checkpoint, passes=method.passes)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == []


class _Planted:
    """Unpickled as code would be: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["code", "truncated", "keys", "model", "momentum", "evaluations"])
def test_a_damaged_or_crafted_checkpoint_is_set_aside_and_the_run_computed_again(
    damage: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    method, task = METHODS["sgd"], Task(batch=32, steps=6, every=3, loss=0.1, accuracy=0.9)
    make = partial(optimiser_of, method, point=method.points[0], config=CONFIG, seed=0)
    whole = problem.to()
    expected = train(whole, make(problem=whole), task, 0)

    monkeypatch.setattr("analyses.training.run.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("analyses.training.run.batch", _failing_at(4))
    path, first, planted = tmp_path / "run.pt", problem.to(), tmp_path / "planted"
    with pytest.raises(_Interrupted):
        train(first, make(problem=first), task, 0, Checkpoint(path))
    monkeypatch.setattr("analyses.training.run.batch", batch)
    state = torch.load(path, weights_only=True)
    momenta = state["optimiser"]["state"]
    momenta_of_other_shape = {key: {"momentum_buffer": torch.ones(7)} for key in momenta}
    crafted = {
        "code": {**state, "points": _Planted(planted)},
        "truncated": state,
        "keys": {"step": 4},
        "model": {**state, "model": {**state["model"], "0.weight": torch.ones(2, 3)}},
        "momentum": {**state, "optimiser": {**state["optimiser"], "state": momenta_of_other_shape}},
        "evaluations": {**state, "points": []},
    }
    assert momenta
    torch.save(crafted[damage], path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])

    second = problem.to()
    assert train(second, make(problem=second), task, 0, Checkpoint(path)) == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt.damaged"]
    assert not planted.exists()
    [warning] = [record.getMessage() for record in caplog.records if record.name == "analyses.checkpoints"]
    assert f"The checkpoint {path} cannot be taken up" in warning


def _failing_at(step: int):
    def failing(problem: Problem, task: Task, seed: int, at: int):
        if at == step:
            raise _Interrupted
        return batch(problem, task, seed, at)

    return failing


def test_divergence_is_a_status_with_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wild = replace(METHODS["sgd"], points=({"lr": 1e4, "momentum": 0.9},) * 4)
    monkeypatch.setitem(METHODS, "sgd", wild)
    config = replace(CONFIG, results=tmp_path)
    tuning.cache_of(config).folder.mkdir(parents=True)
    rows = ANALYSIS.measure(Cell({"part": "judging", "method": "sgd", "seed": 0}), config)
    found = {row["quantity"]: row for row in rows}
    assert found["steps_to_loss"]["status"] == found["final_loss"]["status"] == "diverged"
    assert found["steps_to_loss"]["value"] == CONFIG.task.steps
    assert 1 <= found["diverged_at"]["value"] <= CONFIG.task.steps


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_steps_that_lower_the_loss(name: str, problem: Problem) -> None:
    method, task = METHODS[name], CONFIG.task
    optimiser = optimiser_of(method, problem, {**method.points[0], "damping": 1.0} if method.structure else method.points[0],
                             CONFIG, 0)  # fmt: skip
    before = evaluate(problem, 0).loss
    assert all(take_step(problem, optimiser, *batches(problem, task, 0, step, method.passes)) for step in range(4))
    assert evaluate(problem, 4).loss < before


@pytest.mark.parametrize("name", [name for name in TASKS if name != "digits-mlp"])
def test_every_method_takes_steps_on_every_problem_that_admits_it(name: str) -> None:
    if name in ("fashion-lenet", "cifar10-5k-cnn") and not os.environ.get("CURVLAB_DATA"):
        pytest.skip("CURVLAB_DATA does not name a folder with the images")
    config = Config(problem=name, batch=4)
    start = problem_of(config, 0)
    for method in entrants(config):
        problem = replace(start, model=copy.deepcopy(start.model))
        optimiser = optimiser_of(method, problem, method.points[0], config, 0)
        for step in range(2):
            assert take_step(problem, optimiser, *batches(problem, config.task, 0, step, method.passes)), method.name
        for parameter, before in zip(problem.model.parameters(), start.model.parameters(), strict=True):
            assert not torch.equal(parameter, before), method.name
            assert bool(parameter.isfinite().all()), method.name


def after_steps(name: str, problem: Problem, *steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Train with a method, exact rows, and return the parameters."""
    made = METHODS[name].build(problem.model, problem.loss, {"lr": 0.3, "damping": 0.1}, "exact", 0)
    assert all(take_step(problem, made, *data) for data in steps)
    return torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])


def test_accumulated_passes_are_one_pass_on_all_their_samples(problem: Problem) -> None:
    steps = [batches(problem, CONFIG.task, 0, step, PASSES) for step in range(3)]
    joined = [[tuple(torch.cat(part) for part in zip(*step, strict=True))] for step in steps]
    found, expected = (
        after_steps(name, problem.to(dtype=torch.float64), *([(x.double(), y) for x, y in step] for step in data))
        for name, data in (("kfac-accumulated", steps), ("kfac", joined))
    )
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_steps_under_autocast_are_those_in_full_precision_but_for_its_round_off(problem: Problem) -> None:
    seen = []
    mixed, full = problem.to(), problem.to()
    handle = mixed.model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.dtype))
    steps = [[batch(problem, CONFIG.task, 0, step)] for step in range(3)]
    before = torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])
    found, expected = after_steps("kfac-autocast", mixed, *steps), after_steps("kfac", full, *steps)
    handle.remove()
    assert seen == [torch.bfloat16] * 3
    error = (found - expected).norm() / (expected - before).norm()
    assert 0 < error < 10 * torch.finfo(torch.bfloat16).eps


def test_the_output_layer_can_be_left_to_the_plain_gradient(problem: Problem) -> None:
    name = output_layer(problem.model)
    assert dict(problem.model.named_modules())[name].weight.shape == (10, 64)
    data = batch(problem, CONFIG.task, 0, 0)
    start, weight = problem.to().model.get_parameter(f"{name}.weight"), problem.model.get_parameter(f"{name}.weight")
    (gradient,) = torch.autograd.grad(problem.loss(problem.model(data[0]), data[1]), weight)
    after_steps("kfac-plain", problem, [data])
    assert torch.allclose(weight, start - 0.3 * gradient)


def test_muon_has_the_weights_of_linear_layers_and_adamw_the_rest(problem: Problem) -> None:
    method = METHODS["muon"]
    optimiser = optimiser_of(method, problem, method.points[0], CONFIG, 0)
    assert isinstance(optimiser, Together)
    shapes = [[list(p.shape) for group in part.param_groups for p in group["params"]] for part in optimiser.optimisers]
    assert shapes == [[[64, 64], [64, 64], [10, 64]], [[64], [64], [10]]]


def test_half_coupled_lies_between_full_and_block_diagonal(problem: Problem) -> None:
    structure = half_coupled(problem.model)
    assert isinstance(structure, LayerWise)
    sigma = torch.tensor(structure.options["sigma"])
    assert torch.equal(sigma, (torch.eye(3) + torch.ones(3, 3)) / 2)


def test_batches_are_those_of_the_seed_and_cover_an_epoch(problem: Problem) -> None:
    x, _ = problem.train
    task = replace(CONFIG.task, batch=100)
    seen = torch.cat([batch(problem, task, 3, step)[0] for step in range(12)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(torch.unique(x[_order(len(x), 3)[:1200]].flatten(1), dim=0))
    assert torch.equal(batch(problem, task, 3, 5)[0], batch(problem, task, 3, 5)[0])
    assert not torch.equal(batch(problem, task, 3, 0)[0], batch(problem, task, 4, 0)[0])
    assert not torch.equal(batch(problem, task, 3, 0)[0], batch(problem, task, 3, 12)[0])


def _order(samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed))


def test_evaluation_leaves_batch_normalisation_as_it_was() -> None:
    problem = resolve("digits-residual", width=2)
    problem.model.train()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    found = evaluate(problem, 0)
    assert 0 <= found.accuracy <= 1
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(module.training for module in problem.model.modules())


def test_the_loss_is_that_of_all_samples_and_the_accuracy_that_of_the_test_set(problem: Problem) -> None:
    found = evaluate(problem, 0)
    x, y = problem.train
    with torch.no_grad():
        assert found.loss == pytest.approx(float(nn.functional.cross_entropy(problem.model(x), y)), rel=1e-5)
        right = problem.model(problem.test[0]).argmax(1) == problem.test[1]
    assert found.accuracy == pytest.approx(float(right.double().mean()))


def test_batch_normalisation_admits_moments_only() -> None:
    present = {
        method.name for method in entrants(replace(CONFIG, problem="digits-residual", structures=tuple(STRUCTURES)))
    }
    assert present == {"sgd", "diagonal", "kfac", "ekfac"}


def test_the_table_of_methods_is_complete_and_even() -> None:
    assert {method.name for method in of_family("structure")} == set(STRUCTURES)
    assert {len(method.points) for method in METHODS.values()} == {CONFIGURATIONS}
    for method in METHODS.values():
        assert len({tuple(point.items()) for point in method.points}) == CONFIGURATIONS
        assert method.base in {"", *METHODS}
    assert set(TASKS) <= set(PROBLEMS)


def test_claims_have_distinct_ids_and_cells() -> None:
    config = Config()
    claims, cells = ANALYSIS.claims(config), ANALYSIS.cells(config)
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert any(claim.needs(cell) for cell in cells), claim.id
    parts = [cell["part"] for cell in cells]
    assert parts.index("judging") > len(parts) - 1 - parts[::-1].index("tuning"), "tuning comes first"


def test_estimates_of_the_time_know_the_problem() -> None:
    times = {}
    for name in TASKS:
        config = Config(problem=name)
        cells = [cell for cell in ANALYSIS.cells(replace(config, problem="digits-mlp")) if cell["part"] == "judging"]
        times[name] = ANALYSIS.resources(cells[0], config)[0] / config.task.steps
    assert sorted(times, key=times.__getitem__) == [
        "digits-mlp", "digits-residual", "fashion-lenet", "characters", "cifar10-5k-cnn",
    ]  # fmt: skip


def test_a_problem_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="no classes"):
        racing.problem_of(replace(CONFIG, problem="digits"), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"rivals": ("adm",)}, "Did you mean 'adam'"),
        ({"ingredients": ("kfac",)}, "--ingredients"),
        ({"configurations": 0}, "--configurations"),
        ({"races": 0}, "--races"),
        ({"target_loss": -1.0}, "--target-loss"),
        ({"target_accuracy": 90.0}, "--target-accuracy"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
