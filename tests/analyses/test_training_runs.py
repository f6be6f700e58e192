"""Runs of the training analysis: steps of every method, their batches and evaluation, and going on after an interruption."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analyses.training import ANALYSIS
from analyses.training.config import Config
from analyses.training.entrants import entered, entrants, problem_of
from analyses.training.methods import DEFAULT, DEFAULTS, METHODS, PASSES, VARIANTS, half_coupled, output_layer
from analyses.training.races import RACES, Race
from analyses.training.run import FullBatch, Run, evaluate
from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner
from curvlab.problems import Problem, resolve
from curvlab.study import Cell, follow, generator
from curvlab.study.execution import Plan
from curvlab.study.loop import Process

CONFIG = Config(seeds=1, steps=4, starts=2, rivals=("sgd",), structures=("kfac",), ingredients=())


@pytest.fixture(scope="module")
def digits() -> Problem:
    return problem_of(CONFIG, 0)


@pytest.fixture
def problem(digits: Problem) -> Problem:
    """A problem whose model may be trained."""
    return digits.to()


UNCLIPPED = f"{DEFAULT}-unclipped"
"""What may diverge, as its steps have no bound."""


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


@pytest.mark.parametrize(
    "name", ["muon", "kfac-adapted", "kfac-rare", "kfac-accumulated", "kfac-autocast", "full", *DEFAULTS]
)
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
    plan, cell = Plan.of(ANALYSIS, config), Cell({"experiment": "judging", "method": "sgd", "seed": 0})
    plan.cache.folder.mkdir(parents=True)
    expected = plan.task().observe(cell)
    checkpoint = plan.cache.checkpoint(cell)
    interrupt(run_on(problem, "sgd", config.race), checkpoint, 2, monkeypatch)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "seen": [{"step": 0, "loss": 0.0, "accuracy": 1.0}]}, checkpoint)
    assert plan.task().observe(cell) == expected


@pytest.mark.parametrize("name", [name for name in METHODS if name != UNCLIPPED])
def test_every_method_but_the_default_without_its_trust_region_takes_steps_that_lower_the_loss(
    name: str, problem: Problem
) -> None:
    run = run_on(problem, name, CONFIG.race, **({"damping": 1.0} if "damping" in METHODS[name].points[0] else {}))
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
        if method.name == UNCLIPPED:
            continue
        run = entered(method, 0, start, config, 0)
        for step in range(2):
            assert run.take(run.batches(step)), method.name
        for parameter, before in zip(run.problem.model.parameters(), start.model.parameters(), strict=True):
            assert not torch.equal(parameter, before), method.name
            assert bool(parameter.isfinite().all()), method.name


def options_of(optimiser: NaturalGradient) -> dict[str, object]:
    """Everything that a natural gradient was asked for, but for the seed of its draws."""
    pre, (group,) = optimiser.preconditioner, optimiser.param_groups
    step = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    return {
        **step, **structure_of(pre), "damping": optimiser._damping, "decoupled": optimiser.decoupled,
        "quadratic": optimiser.chooses_step,
    }  # fmt: skip


def structure_of(pre: Preconditioner) -> dict[str, object]:
    """Everything that a preconditioner was asked for, but for damping and the seed of its draws."""
    return {
        "structure": type(pre.structure), **pre.structure.options, "decay": pre.decay.value,
        "kl_clip": pre.kl_clip and pre.kl_clip.value, "refresh_every": pre.refresh_every.value, "kind": pre.how.kind,
        "draws": pre.how.draws, "rows": pre.how.per, "plain": tuple(pre.plain), "graph": pre.graph, "output": pre.output,
        "patience": pre._skips.patience,
    }  # fmt: skip


def made(name: str, problem: Problem) -> torch.optim.Optimizer:
    (optimiser,) = run_on(problem, name, CONFIG.race).optimisers
    return optimiser


def test_the_defaults_are_those_of_model_and_loss_alone(problem: Problem) -> None:
    model, loss = problem.model, problem.loss
    found = made(DEFAULT, problem)
    assert isinstance(found, NaturalGradient)
    expected = NaturalGradient(model, loss)
    assert (options_of(found), repr(found)) == (options_of(expected), repr(expected))
    before_sgd = made("preconditioned-sgd", problem)
    assert type(before_sgd) is torch.optim.SGD
    pre, plain = before_sgd.preconditioner, Preconditioner(model, loss)
    assert (structure_of(pre), pre.damping, repr(pre)) == (structure_of(plain), plain.damping, repr(plain))
    assert {**before_sgd.defaults, **METHODS["preconditioned-sgd"].points[0]} == before_sgd.defaults


LACKING = {
    "unclipped": {"kl_clip": None},
    "steady": {"damping": LevenbergMarquardt(omega=1.0)},
    "fresh": {"invert_every": 1},
    "product": {"factored_damping": False},
}


@pytest.mark.parametrize("part", LACKING)
def test_what_lacks_a_part_of_the_default_differs_in_it_alone(part: str, problem: Problem) -> None:
    name = f"{DEFAULT}-{part}"
    found, base = options_of(made(name, problem)), options_of(made(METHODS[name].base, problem))
    assert {key: value for key, value in found.items() if value != base[key]} == LACKING[part]
    assert {name for name in VARIANTS if name.startswith(DEFAULT)} == {f"{DEFAULT}-{part}" for part in LACKING}


def test_damping_that_is_steady_is_that_which_the_default_starts_with(problem: Problem) -> None:
    adapted, steady = (run_on(problem.to(), name, CONFIG.race) for name in (DEFAULT, f"{DEFAULT}-steady"))
    seen: dict[str, list[float]] = {}
    for run in (adapted, steady):
        (optimiser,) = run.optimisers
        for step in range(12):
            assert run.take(run.batches(step))
            seen.setdefault(run.label, []).append(optimiser.log()["damping"])
    moving, fixed = seen.values()
    assert set(fixed) == {moving[0]}
    assert len(set(moving)) > 1


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
    order = torch.randperm(len(x), generator=generator(3, "batches", 0))
    assert torch.equal(seen, x[order[:1200]])
    assert torch.equal(batch(3, 5), batch(3, 5))
    assert not torch.equal(batch(3, 0), batch(4, 0))
    assert not torch.equal(batch(3, 0), batch(3, 12))


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


def test_a_full_batch_run_goes_on_from_a_state() -> None:
    def run() -> FullBatch:
        problem = resolve("two-layer", width=16, seed=0)
        return FullBatch(
            problem, [NaturalGradient(problem.model, problem.loss, 0.5, structure="full", damping=1e-3, kl_clip=None)]
        )

    whole, first, second = run(), run(), run()
    assert isinstance(first, Process)
    expected = follow(whole, 3).series("squared")
    follow(first, 2)
    second.load_state_dict(first.state_dict())
    assert follow(second, 1).series("squared") == pytest.approx(expected[2:], rel=1e-12)
    assert expected[-1] < expected[0]
