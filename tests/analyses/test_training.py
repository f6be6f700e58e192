"""The training analysis: its command line on a small real instance, the choice of configurations, comparisons and claims."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analyses.training import ANALYSIS
from analyses.training.analysis import FIGURES
from analyses.training.comparison import SECONDS, Comparison, seconds_to
from analyses.training.config import Config
from analyses.training.entrants import best, entrants
from analyses.training.methods import (
    CONFIGURATIONS,
    DEFAULT,
    DEFAULTS,
    METHODS,
    RIVALS,
    VARIANTS,
    Entrant,
)
from analyses.training.races import RACES
from curvlab.fisher import STRUCTURES, of_theory
from curvlab.problems import PROBLEMS
from curvlab.study import Cell, Trace, judge, stream
from curvlab.study.execution import Plan
from curvlab.study.measurements import tabulate

SMALL = (
    "--seeds", "2", "--steps", "6", "--configurations", "2", "--starts", "1", "--rivals", "sgd", "muon", "--structures", "kfac",
    "--defaults", "preconditioned-sgd", "--ingredients", "kfac-rare", "natural-gradient-unclipped", "--target-loss", "2",
    "--target-accuracy", "0.2",
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
    assert {"ingredient-default-clipped", "steps-loss-preconditioned-sgd-muon", "trains-preconditioned-sgd"} <= set(
        verdicts
    )
    assert "trains-natural-gradient" not in verdicts, "it runs for the sake of one without its trust region only"
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
    methods |= {"preconditioned-sgd", "natural-gradient", "natural-gradient-unclipped"}
    assert judged.to_dict() == dict.fromkeys(methods, 2)
    seconds = table[table["quantity"] == SECONDS]
    assert set(seconds["method"]) == methods
    assert (seconds["value"] > 0).all()
    losses = table[(table["quantity"] == "loss") & (table["seed"] == 1001) & (table["step"] == 0)]
    assert len(set(losses["value"])) == 1, "all methods start from the same network"


CONFIG = Config(seeds=1, steps=4, starts=2, rivals=("sgd",), structures=("kfac",), ingredients=())
CONFIG_OF_ALL = Config()


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


def test_every_structure_and_every_default_meets_every_rival_and_no_seed_of_theirs_was_explored() -> None:
    claims = [
        claim for claim in ANALYSIS.claims(CONFIG_OF_ALL) if claim.id.startswith(("steps-", "time-loss", "time-acc"))
    ]
    pairs = {claim.id.split("-", 2)[2] for claim in claims}
    judged = (*CONFIG_OF_ALL.structures, *CONFIG_OF_ALL.defaults)
    assert pairs == {f"{method}-{rival}" for method in judged for rival in RIVALS}
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


@pytest.mark.parametrize(
    ("end", "diverged", "outcome"), [(0.05, None, "supported"), (0.05, 4, "refuted"), (0.5, None, "refuted")]
)
def test_a_default_trains_if_every_run_of_it_reaches_the_loss_and_none_diverges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: float, diverged: int | None, outcome: str
) -> None:
    def race(method: Entrant, index: int, seed: int) -> Trace:
        last = seed == 11
        return replace(trace_of((0, 2.3, 0.1), (3, end if last else 0.05, 0.95)), diverged=diverged if last else None)

    raced(monkeypatch, race)
    config = replace(CONFIG, first_seed=0, seeds=12, results=tmp_path)
    (claim,) = (claim for claim in ANALYSIS.claims(config) if claim.id == f"trains-{DEFAULT}")
    claim = replace(claim, expected=replace(claim.expected, explored=0))
    cells = [cell for cell in ANALYSIS.cells(config) if claim.needs(cell)]
    assert {(cell["experiment"], cell["method"]) for cell in cells} == {("judging", DEFAULT)}
    task = plan_of(config).task()
    (verdict,) = judge([claim], tabulate({cell: task.observe(cell) for cell in cells}))
    assert verdict.outcome == outcome


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


def test_batch_normalisation_admits_moments_only() -> None:
    present = {method.name for method in entrants(replace(CONFIG, problem="digits-residual", structures=of_theory()))}
    assert present == {"sgd", "diagonal", "kfac", "ekfac", *DEFAULTS}


def test_the_table_of_methods_is_complete_and_even() -> None:
    assert list(METHODS) == [*RIVALS, *STRUCTURES, *DEFAULTS, *VARIANTS]
    assert [name for name in METHODS if not METHODS[name].tuned] == [
        *DEFAULTS, *(name for name in VARIANTS if name.startswith(DEFAULT)),
    ]  # fmt: skip
    for method in METHODS.values():
        assert len({tuple(point.items()) for point in method.points}) == (CONFIGURATIONS if method.tuned else 1)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"rivals": ("adm",)}, "Did you mean 'adam'"),
        ({"defaults": ("natural",)}, "Did you mean 'natural-gradient'"),
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
