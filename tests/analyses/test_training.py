"""The training analysis: its command line on a small real instance, runs, the choice of configurations, and the comparison."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from analyses.training import ANALYSIS
from analyses.training.analysis import FIGURES
from analyses.training.comparison import SECONDS, Comparison, seconds_to
from analyses.training.config import Config
from analyses.training.entrants import best, entered, entrants, problem_of
from analyses.training.methods import (
    CONFIGURATIONS,
    METHODS,
    PASSES,
    RIVALS,
    VARIANTS,
    Entrant,
    half_coupled,
    output_layer,
)
from analyses.training.races import RACES, Race
from analyses.training.run import FullBatch, Run, evaluate
from curvlab.fisher import STRUCTURES
from curvlab.optim import NaturalGradient
from curvlab.problems import PROBLEMS, Problem, resolve
from curvlab.study import Cell, Trace, follow, judge, stream
from curvlab.study.execution import Plan
from curvlab.study.loop import Process
from curvlab.study.measurements import tabulate

SMALL = (
    "--seeds", "2", "--steps", "6", "--configurations", "2", "--starts", "1", "--rivals", "sgd", "muon", "--structures", "kfac",
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
    expected = {f"{what}-kfac-{rival}" for what in ("steps-loss", "time-accuracy") for rival in ("sgd", "muon")}
    assert {*expected, "ingredient-rare", "time-step-rare", "contraction-rate"} <= set(verdicts)
    assert verdicts["steps-loss-kfac-sgd"] == "inconclusive", "two seeds decide nothing"
    assert verdicts["rate-kfac"] == verdicts["contraction-bound"] == "supported"
    assert verdicts["rate-full"] == "not measured", "only K-FAC was asked for"


def test_every_method_is_tuned_alike_and_judged_on_fresh_seeds(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    table = pd.read_parquet(run[1] / "measurements.parquet")
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments}
    tuned = table[table["quantity"] == "tuning_steps"].groupby("method")["configuration"].nunique()
    judged = table[table["quantity"] == "steps_to_loss"].groupby("method")["seed"].nunique()
    methods = {"sgd", "muon", "kfac", "kfac-split", "kfac-rare"}
    assert tuned.to_dict() == dict.fromkeys(methods, 2)
    assert judged.to_dict() == dict.fromkeys(methods, 2)
    seconds = table[table["quantity"] == SECONDS]
    assert set(seconds["method"]) == methods
    assert (seconds["value"] > 0).all()
    losses = table[(table["quantity"] == "loss") & (table["seed"] == 1001) & (table["step"] == 0)]
    assert len(set(losses["value"])) == 1, "all methods start from the same network"


CONFIG = Config(seeds=1, steps=4, starts=2, rivals=("sgd",), structures=("kfac",), ingredients=())
CONFIG_OF_ALL = Config()


@pytest.fixture(scope="module")
def digits() -> Problem:
    return problem_of(CONFIG, 0)


@pytest.fixture
def problem(digits: Problem) -> Problem:
    """A problem whose model may be trained."""
    return digits.to()


Tuned = tuple[float, float, str, str]
"""Steps and final loss of a configuration, and how they ended."""


def run_of(steps: float, loss: float, *, reached: bool = True, diverged: bool = False) -> Tuned:
    return steps, loss, "ok" if reached else "not reached", "diverged at step 9" if diverged else "ok"


@pytest.mark.parametrize(
    ("runs", "first"),
    [
        ([run_of(30, 0.01), run_of(20, 0.02)], 1),
        ([run_of(20, 0.02), run_of(20, 0.01)], 1),
        ([run_of(100, 0.2, reached=False), run_of(90, 0.05)], 1),
        ([run_of(10, float("inf"), diverged=True), run_of(40, 0.05)], 1),
        ([run_of(100, 0.3, reached=False), run_of(10, float("inf"), diverged=True)], 1),
        ([run_of(100, float("inf"), reached=False, diverged=True), run_of(100, 0.4, reached=False)], 1),
    ],
)
def test_the_best_configuration(runs: list[Tuned], first: int) -> None:
    rows = [
        {"configuration": index, "seed": 0, "quantity": quantity, "value": value, "status": status}
        for index, (steps, loss, reached, ended) in enumerate(runs)
        for quantity, value, status in (("tuning_steps", steps, reached), ("tuning_loss", loss, ended))
    ]
    table = pd.DataFrame(rows)
    assert best(table) == first
    mirrored = table.assign(configuration=len(runs) - 1 - table["configuration"])
    assert best(mirrored) == len(runs) - 1 - first


def test_a_configuration_is_chosen_over_all_seeds_that_it_was_tuned_on() -> None:
    steps = {0: (10, 40), 1: (19, 20), 2: (5, 100)}
    rows = [
        {"configuration": index, "seed": seed, "quantity": quantity, "value": float(value), "status": status}
        for index, values in steps.items()
        for seed, value in enumerate(values)
        for quantity, status in (("tuning_steps", "ok" if value < 100 else "not reached"), ("tuning_loss", "ok"))
    ]
    assert best(pd.DataFrame(rows)) == 1, (
        "20 steps on geometric average against 19.5; one that misses a seed comes last"
    )


def raced(monkeypatch: pytest.MonkeyPatch, race: Callable[[Entrant, int, int], Trace]) -> None:
    """Let runs be what a function of method, configuration and seed says."""
    for experiment in ("tuning", "judging"):
        monkeypatch.setattr(f"analyses.training.experiments.{experiment}.run", lambda *run: race(*run[:3]))


def plan_of(config: Config) -> Plan[Config]:
    """The plan of a run whose cache is there."""
    plan = Plan.of(ANALYSIS, config)
    plan.cache.folder.mkdir(parents=True, exist_ok=True)
    return plan


def trace_of(*seen: tuple[int, float, float]) -> Trace:
    return Trace([dict(zip(("step", "loss", "accuracy"), one, strict=True)) for one in seen])


def test_the_choice_is_made_on_streams_of_its_own_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, int, int]] = []

    def race(method: Entrant, index: int, seed: int) -> Trace:
        made.append((method.name, index, seed))
        return trace_of((0, 2.3, 0.1), (4, (0.5, 0.05, 0.2, 0.5)[index], 0.9))

    raced(monkeypatch, race)
    config = replace(CONFIG, results=tmp_path)
    cell = Cell({"experiment": "judging", "method": "kfac", "seed": 0})
    plan_of(config).task().observe(cell)
    tuned = [("kfac", index, stream(start, "tuning")) for index in range(4) for start in range(config.starts)]
    assert made == [*tuned, ("kfac", 1, 0)]
    plan_of(config).task().observe(cell)
    assert made[len(tuned) + 1 :] == [("kfac", 1, 0)], "another run finds the tuning runs among the finished cells"
    assert not {seed for _, _, seed in tuned} & set(range(10**6)), "no judged run has such a seed"


def judged(values: dict[str, list[float]], quantity: str = "steps_to_loss", status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame(
        {"method": name, "seed": seed, "quantity": quantity, "value": value, "status": status}
        for name, found in values.items()
        for seed, value in enumerate(found)
    )


def test_a_comparison_is_with_one_other_on_the_same_seeds() -> None:
    table = judged({"kfac": [10, 40], "sgd": [100, 100], "adam": [20, 40]})
    versus = Comparison("kfac", "adam")
    assert versus.difference(table)["value"].tolist() == [-10, 0]
    assert versus.ratio(table)["value"].tolist() == pytest.approx([0.5, 1])


def test_a_structure_that_beats_a_rival_at_every_seed_is_said_to_whatever_another_rival_does() -> None:
    """K-FAC has beaten Adam at 8 of 8 seeds, while the rival with the fewest steps on average, Muon, failed at some."""
    muon = [18, 20, 32, 58, 100, 100, 18, 56, 22, 100, 40, 30]
    steps = {"kfac": [32, 36] * 6, "adam": [36, 54] * 6, "muon": muon}
    claims = {claim.id: claim for claim in ANALYSIS.claims(CONFIG_OF_ALL)}
    names = [f"steps-loss-kfac-{rival}" for rival in ("adam", "muon")]
    table = judged(steps).assign(seed=lambda rows: rows["seed"] + 1001)
    assert [judge([claims[name]], table)[0].outcome for name in names] == ["supported", "inconclusive"]


def test_ties_within_the_margin_support_that_an_ingredient_costs_no_steps() -> None:
    (claim,) = (claim for claim in ANALYSIS.claims(CONFIG_OF_ALL) if claim.id == "ingredient-autocast")
    same = [float(steps) for steps in range(30, 42)]
    (verdict,) = judge([claim], judged({"kfac": same, "kfac-autocast": same}))
    assert (verdict.outcome, verdict.estimate) == ("supported", 1.0)


def test_every_structure_meets_every_rival_and_no_seed_of_theirs_was_explored() -> None:
    claims = [
        claim for claim in ANALYSIS.claims(CONFIG_OF_ALL) if claim.id.startswith(("steps-", "time-loss", "time-acc"))
    ]
    pairs = {claim.id.split("-", 2)[2] for claim in claims}
    assert pairs == {f"{structure}-{rival}" for structure in CONFIG_OF_ALL.structures for rival in RIVALS}
    assert len(claims) == 4 * len(pairs)
    assert {claim.expected.explored for claim in claims} == {12}
    assert 1000 not in CONFIG_OF_ALL.seeds_run, "configurations were laid around the run from seed 1000"


def test_seconds_are_steps_times_seconds_of_a_step() -> None:
    steps = judged({"kfac": [10, 40], "sgd": [100, 200]})
    price = judged({"kfac": [0.5, 0.25], "sgd": [0.01, 0.02]}, SECONDS)
    found = seconds_to(pd.concat([price, steps]), "steps_to_loss")
    assert found["value"].tolist() == pytest.approx([5, 10, 1, 4])
    saved = Comparison("kfac", "sgd").seconds("steps_to_loss")(pd.concat([steps, price]))
    assert saved["value"].tolist() == pytest.approx([4, 6])


def test_targets_that_nobody_reached_are_outside_the_assumptions() -> None:
    versus = Comparison("kfac", "sgd")
    failed = judged({"kfac": [100, 100], "sgd": [100, 100]}, status="not reached")
    assert "kfac" in str(versus.outside(failed))
    failed.loc[3, "status"] = "ok"
    assert versus.outside(failed) is None


@pytest.mark.parametrize(("steps", "outcome"), [((20, 22, 24), "supported"), ((90, 95, 99), "refuted")])
def test_claims_can_come_out_either_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: tuple[int, ...], outcome: str
) -> None:
    def race(method: Entrant, index: int, seed: int) -> Trace:
        return trace_of((0, 2.3, 0.1), (50 + index if method.name == "sgd" else steps[seed % 3], 0.05, 0.95))

    raced(monkeypatch, race)
    config = replace(CONFIG, seeds=12, starts=1, results=tmp_path)
    (claim,) = (claim for claim in ANALYSIS.claims(config) if claim.id == "steps-loss-kfac-sgd")
    cells = [cell for cell in ANALYSIS.cells(config) if claim.needs(cell)]
    assert {cell["experiment"] for cell in cells} == {"judging"}
    task = plan_of(config).task()
    (verdict,) = judge([claim], tabulate({cell: task.observe(cell) for cell in cells}))
    assert verdict.outcome == outcome


class _Interrupted(Exception):
    pass


def run_on(problem: Problem, name: str, race: Race, **point: float) -> Run:
    """The run of a method in its first configuration, but for what is said of it."""
    method = METHODS[name]
    points = [{**method.points[0], **point}]
    return replace(entered(replace(method, points=points), 0, problem, CONFIG, 0), race=race)


def interrupt(run: Run, checkpoint: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow a run, saved before every step, until it is interrupted in one."""
    batches = Run.batches

    def failing(self: Run, at: int):
        if at == step:
            raise _Interrupted
        return batches(self, at)

    with monkeypatch.context() as patch:
        patch.setattr("curvlab.study.loop.SAVED", -1.0)
        patch.setattr(Run, "batches", failing)
        with pytest.raises(_Interrupted):
            follow(run, run.race.steps, checkpoint=checkpoint)


def same_parameters(one: Run, other: Run) -> bool:
    pairs = zip(one.problem.model.parameters(), other.problem.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["muon", "kfac-adapted", "kfac-rare", "kfac-accumulated", "kfac-autocast", "full"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    name: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Race(batch=32, steps=12, every=3, loss=0.1, accuracy=0.9)
    whole = run_on(problem, name, race)
    expected = follow(whole, race.steps)
    interrupt(run_on(problem, name, race), tmp_path / "run.pt", 7, monkeypatch)
    second = run_on(problem, name, race)
    assert follow(second, race.steps, checkpoint=tmp_path / "run.pt") == expected
    assert same_parameters(second, whole)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_interrupted_before_it_diverges_goes_on_to_that(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    race = Race(batch=32, steps=6, every=3, loss=0.1, accuracy=0.9)
    expected = follow(run_on(problem, "sgd", race, lr=1e30), race.steps)
    assert expected.diverged == 2, "the second step starts from outputs that are not finite"
    interrupt(run_on(problem, "sgd", race, lr=1e30), tmp_path / "run.pt", 1, monkeypatch)
    assert follow(run_on(problem, "sgd", race, lr=1e30), race.steps, checkpoint=tmp_path / "run.pt") == expected
    assert not caplog.records


class _Planted:
    """Unpickled as code would be: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "damage", ["code", "truncated", "keys", "model", "momentum", "evaluations", "other configuration"]
)
def test_a_damaged_or_crafted_checkpoint_is_set_aside_and_the_run_computed_again(
    damage: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    race = Race(batch=32, steps=6, every=3, loss=0.1, accuracy=0.9)
    whole = run_on(problem, "sgd", race)
    expected = follow(whole, race.steps)
    path, planted = tmp_path / "run.pt", tmp_path / "planted"
    interrupt(run_on(problem, "sgd", race), path, 4, monkeypatch)
    state = torch.load(path, weights_only=True)
    process = state["process"]
    momenta = process["optimisers"][0]["state"]
    momenta_of_other_shape = {key: {"momentum_buffer": torch.ones(7)} for key in momenta}
    crafted = {
        "code": {**state, "seen": _Planted(planted)},
        "truncated": state,
        "keys": {"step": 4},
        "model": process | {"model": {**process["model"], "0.weight": torch.ones(2, 3)}},
        "momentum": process | {"optimisers": [{**process["optimisers"][0], "state": momenta_of_other_shape}]},
        "evaluations": {**state, "seen": [{"step": 6, "loss": 0.0, "accuracy": 1.0}]},
        "other configuration": process | {"label": "sgd, lr=1, momentum=0"},
    }
    assert momenta
    content = crafted[damage]
    torch.save({**state, "process": content} if "label" in content else content, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])

    second = run_on(problem, "sgd", race)
    assert follow(second, race.steps, checkpoint=path) == expected
    assert same_parameters(second, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt.damaged"]
    assert not planted.exists()
    [warning] = [record.getMessage() for record in caplog.records if record.name == "curvlab.study.loop"]
    assert f"The checkpoint {path} cannot be taken up" in warning


def test_a_fresh_run_takes_up_no_checkpoint(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, results=tmp_path, configurations=1, fresh=True)
    plan, cell = plan_of(config), Cell({"experiment": "judging", "method": "sgd", "seed": 0})
    expected = plan.task().observe(cell)
    checkpoint = plan.cache.checkpoint(cell)
    interrupt(run_on(problem, "sgd", config.race), checkpoint, 2, monkeypatch)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "seen": [{"step": 0, "loss": 0.0, "accuracy": 1.0}]}, checkpoint)
    assert plan.task().observe(cell) == expected


def test_divergence_is_a_status_with_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wild = replace(METHODS["sgd"], points=({"lr": 1e4, "momentum": 0.9},) * 4)
    monkeypatch.setitem(RIVALS, "sgd", wild)
    task = plan_of(replace(CONFIG, results=tmp_path)).task()
    rows = task.observe(Cell({"experiment": "judging", "method": "sgd", "seed": 0}))
    found = {row["quantity"]: row for row in rows}
    step = int(found["diverged_at"]["value"])
    assert found["steps_to_loss"]["status"] == found["final_loss"]["status"] == f"diverged at step {step}"
    assert found["steps_to_loss"]["value"] == CONFIG.race.steps
    assert 1 <= step <= CONFIG.race.steps


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_steps_that_lower_the_loss(name: str, problem: Problem) -> None:
    run = run_on(problem, name, CONFIG.race, **({"damping": 1.0} if METHODS[name].structure else {}))
    before = evaluate(run.problem)["loss"]
    assert all(run.take(run.batches(step)) for step in range(4))
    assert evaluate(run.problem)["loss"] < before


@pytest.mark.parametrize("name", [name for name in RACES if name != "digits-mlp"])
def test_every_method_takes_steps_on_every_problem_that_admits_it(name: str) -> None:
    if name in ("fashion-lenet", "cifar10-5k-cnn") and not os.environ.get("CURVLAB_DATA"):
        pytest.skip("CURVLAB_DATA does not name a folder with the images")
    config = Config(problem=name, batch=4)
    start = problem_of(config, 0)
    for method in entrants(config):
        run = entered(method, 0, start, config, 0)
        for step in range(2):
            assert run.take(run.batches(step)), method.name
        for parameter, before in zip(run.problem.model.parameters(), start.model.parameters(), strict=True):
            assert not torch.equal(parameter, before), method.name
            assert bool(parameter.isfinite().all()), method.name


def after_steps(name: str, problem: Problem, *steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Train with a method, exact rows, and return the parameters."""
    made = METHODS[name].build(problem.model, problem.loss, {"lr": 0.3, "damping": 0.1}, "exact", 0)
    run = Run(problem, made, name, CONFIG.race, 0, autocast=METHODS[name].autocast)
    assert all(run.take(data) for data in steps)
    return torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])


def test_accumulated_passes_are_one_pass_on_all_their_samples(problem: Problem) -> None:
    run = run_on(problem, "kfac-accumulated", CONFIG.race)
    steps = [run.batches(step) for step in range(3)]
    assert {len(step) for step in steps} == {PASSES}
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
    steps = [run_on(problem, "kfac", CONFIG.race).batches(step) for step in range(3)]
    before = torch.cat([parameter.detach().flatten() for parameter in problem.model.parameters()])
    found, expected = after_steps("kfac-autocast", mixed, *steps), after_steps("kfac", full, *steps)
    handle.remove()
    assert seen == [torch.bfloat16] * 3
    error = (found - expected).norm() / (expected - before).norm()
    assert 0 < error < 20 * torch.finfo(torch.bfloat16).eps


def test_the_output_layer_can_be_left_to_the_plain_gradient(problem: Problem) -> None:
    name = output_layer(problem.model)
    assert dict(problem.model.named_modules())[name].weight.shape == (10, 64)
    (data,) = run_on(problem, "kfac", CONFIG.race).batches(0)
    start, weight = problem.to().model.get_parameter(f"{name}.weight"), problem.model.get_parameter(f"{name}.weight")
    (gradient,) = torch.autograd.grad(problem.loss(problem.model(data[0]), data[1]), weight)
    after_steps("kfac-plain", problem, [data])
    assert torch.allclose(weight, start - 0.3 * gradient)


def test_muon_has_the_weights_of_linear_layers_and_adamw_the_rest(problem: Problem) -> None:
    optimisers = run_on(problem, "muon", CONFIG.race).optimisers
    shapes = [[list(p.shape) for group in part.param_groups for p in group["params"]] for part in optimisers]
    assert shapes == [[[64, 64], [64, 64], [10, 64]], [[64], [64], [10]]]


def test_half_coupled_lies_between_full_and_block_diagonal() -> None:
    assert torch.equal(half_coupled(3), (torch.eye(3) + torch.ones(3, 3)) / 2)


def test_batches_are_those_of_the_seed_and_cover_an_epoch(problem: Problem) -> None:
    def batch(seed: int, step: int) -> Tensor:
        run = replace(run_on(problem, "sgd", replace(CONFIG.race, batch=100)), seed=seed)
        return run.batches(step)[0][0]

    x, _ = problem.train
    seen = torch.cat([batch(3, step) for step in range(12)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(torch.unique(x[_order(len(x), 3)[:1200]].flatten(1), dim=0))
    assert torch.equal(batch(3, 5), batch(3, 5))
    assert not torch.equal(batch(3, 0), batch(4, 0))
    assert not torch.equal(batch(3, 0), batch(3, 12))


def _order(samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed))


def test_evaluation_leaves_batch_normalisation_as_it_was() -> None:
    problem = resolve("digits-residual", width=2)
    problem.model.train()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    assert 0 <= evaluate(problem)["accuracy"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(module.training for module in problem.model.modules())


def test_the_loss_is_that_of_all_samples_and_the_accuracy_that_of_the_test_set(problem: Problem) -> None:
    found = evaluate(problem)
    x, y = problem.train
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(problem.model(x), y)), rel=1e-5)
        right = problem.model(problem.test[0]).argmax(1) == problem.test[1]
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))


def test_batch_normalisation_admits_moments_only() -> None:
    present = {
        method.name for method in entrants(replace(CONFIG, problem="digits-residual", structures=tuple(STRUCTURES)))
    }
    assert present == {"sgd", "diagonal", "kfac", "ekfac"}


def test_the_table_of_methods_is_complete_and_even() -> None:
    assert list(METHODS) == [*RIVALS, *STRUCTURES, *VARIANTS]
    assert {len(method.points) for method in METHODS.values()} == {CONFIGURATIONS}
    for method in METHODS.values():
        assert len({tuple(point.items()) for point in method.points}) == CONFIGURATIONS
        assert method.base in {"", *METHODS}
    assert set(RACES) <= set(PROBLEMS)


def test_tuning_comes_first() -> None:
    order = [cell["experiment"] for cell in ANALYSIS.cells(Config())]
    assert order.index("judging") > len(order) - 1 - order[::-1].index("tuning")


def test_estimates_of_the_time_know_the_problem() -> None:
    times = {}
    for name in RACES:
        config = Config(problem=name)
        cells = [
            cell for cell in ANALYSIS.cells(replace(config, problem="digits-mlp")) if cell["experiment"] == "judging"
        ]
        times[name] = ANALYSIS.resources(cells[0], config)[0] / config.race.steps
    assert sorted(times, key=times.__getitem__) == [
        "digits-mlp", "digits-residual", "fashion-lenet", "characters", "cifar10-5k-cnn",
    ]  # fmt: skip


def test_a_full_batch_run_goes_on_from_a_state() -> None:
    def run() -> FullBatch:
        problem = resolve("two-layer", width=16, seed=0)
        return FullBatch(problem, [NaturalGradient(problem.model, problem.loss, 0.5, structure="full", damping=1e-3)])

    whole, first, second = run(), run(), run()
    assert isinstance(first, Process)
    expected = follow(whole, 3).series("squared")
    follow(first, 2)
    second.load_state_dict(first.state_dict())
    assert follow(second, 1).series("squared") == pytest.approx(expected[2:], rel=1e-12)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"rivals": ("adm",)}, "Did you mean 'adam'"),
        ({"ingredients": ("kfac",)}, "--ingredients"),
        ({"configurations": 0}, "--configurations"),
        ({"starts": 0}, "--starts"),
        ({"target_loss": -1.0}, "--target-loss"),
        ({"target_accuracy": 90.0}, "--target-accuracy"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
