"""The advice analysis: its command line in small, how an optimiser is chosen, and what its figures and claims are made of."""

import json
from math import exp
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.advice import ANALYSIS
from analyses.advice.arms import ADAM, ARMS, GRID, Task, grid
from analyses.advice.config import PROBLEMS, Config
from analyses.advice.experiment import ADVICE
from analyses.advice.panels import advised, ratios
from analyses.advice.trial import SHARES, diverges, drawn, portions, problem_of, task_of, trained
from curvlab.advice import Candidate
from curvlab.study import judge, main, style
from curvlab.study.measurements import normalise, tabulate

SMALL = Config(budget=0.2)


class Clock:
    """Time that passes by calls."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def digits(seed: int = 0) -> tuple[Task, list[tuple[torch.Tensor, torch.Tensor]]]:
    problem = problem_of("digits-mlp", SMALL, seed)
    task = task_of(problem, "digits-mlp", SMALL, seed)
    return Task(task.model, task.loss, task.batches, graph=False, clock=Clock(0.01)), portions(problem, graph=False)


def test_the_command_measures_all_arms_and_draws(tmp_path: Path) -> None:
    options = ["--seeds", "1", "--budget", "0.1", "--arms", *ARMS, "--workers", "1", "--results", str(tmp_path)]
    assert main(ANALYSIS, [*options, "--problem", "karate-gcn", "--further"]) == 0
    folder = tmp_path / "advice" / "latest"
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == {"advice", "curves"}
    table = pd.read_parquet(folder / "measurements.parquet")
    losses = table[table["quantity"] == "loss"]
    assert set(losses["arm"]) == set(ARMS)
    assert set(losses["seed"]) == {1100}, "its own seeds, although it is the only problem of the run"
    assert (losses["value"] < 1.4).all(), "below the loss of a guess among four classes"
    spent = losses.set_index("arm")["cost"]
    assert 0.05 < spent["advice"] < 5
    assert spent["grid"] > 3 * spent["adam"]
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    assert {verdict["claim"] for verdict in verdicts} >= {"advice-diverges", "advice-grid", "advice-adam"}


def test_no_two_problems_share_a_seed_and_a_further_problem_changes_none() -> None:
    config = Config(problem=PROBLEMS[0], further=PROBLEMS[1:], seeds=12)
    seeds = [seed for own in config.seeds_by_problem.values() for seed in own]
    assert len(set(seeds)) == 12 * len(PROBLEMS)
    alone = Config(problem="cora-gcn", further=(), seeds=12).seeds_by_problem
    assert alone == {"cora-gcn": config.seeds_by_problem["cora-gcn"]}


def test_batches_have_every_sample_once_in_the_order_of_a_seed_and_graphs_are_one() -> None:
    problem = problem_of("digits-mlp", SMALL, 3)
    first, again, other = (task_of(problem, "digits-mlp", SMALL, seed) for seed in (3, 3, 4))
    assert {len(x) for x, _ in first.batches} == {64}
    assert len(first.batches) == len(problem.train[0]) // 64
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.batches, again.batches, strict=True))
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    rows = {x.numpy().tobytes() for batch, _ in first.batches for x in batch}
    assert rows <= {x.numpy().tobytes() for x in problem.train[0]}
    karate = problem_of("karate-gcn", SMALL, 0)
    assert task_of(karate, "karate-gcn", SMALL, 0).graph
    assert len(task_of(karate, "karate-gcn", SMALL, 0).batches) == 1


def test_the_mean_over_portions_of_the_test_samples_is_that_over_all() -> None:
    problem = problem_of("digits-mlp", SMALL, 0)
    x, y = problem.test
    found = portions(problem, graph=False)
    assert sum(len(part) for part, _ in found) == len(x)
    with torch.no_grad():
        whole = problem.loss(problem.model(x), y)
        parts = torch.stack([problem.loss(problem.model(a), b) for a, b in found])
    torch.testing.assert_close(parts.mean(), whole)


def test_training_is_looked_at_after_shares_of_its_time() -> None:
    """With a clock by which a step takes 0.01 s, 1.28 s are 128 steps; the first one does not count."""
    task, test = digits()
    run = trained(ADAM[2], task, test, 1.28)
    steps = [look.steps for look in run.looks]
    assert len(steps) == len(SHARES) + 1
    assert steps == pytest.approx([0, *(1 + 128 * share for share in SHARES)], abs=1)
    assert run.looks[-1].loss < 0.3 * run.looks[0].loss


@pytest.mark.parametrize(("candidate", "expected"), [(ADAM[2], False), (Candidate("SGD", {"lr": 1e4}), True)])
def test_divergence_within_500_steps_is_seen(candidate: Candidate, expected: bool) -> None:
    task, test = digits()
    run = trained(candidate, task, test, 0.05)
    assert diverges(run, task, test) == expected
    assert expected or run.steps == 500


def test_the_grid_search_takes_the_point_with_the_lowest_held_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its points has an equal part of ten times the budget; one that trains nothing counts as the worst."""
    losses = {str(candidate): abs(k - 5) + 1.0 for k, candidate in enumerate(GRID)}
    asked = []

    class Found:
        def __init__(self, best: float) -> None:
            self.winner, self.best = self, best

    def advised(_: Task, seconds: float, candidates: tuple[Candidate, ...]) -> Found:
        asked.append(seconds)
        if candidates[0] is GRID[5]:
            raise ValueError
        return Found(losses[str(candidates[0])] - 0.1 * (candidates[0] is GRID[6]))

    monkeypatch.setattr(Task, "advised", advised)
    task, _ = digits()
    assert grid(task, 1.2) is GRID[6]
    assert sum(asked) == pytest.approx(12.0)
    assert len(set(asked)) == 1


def test_random_numbers_of_training_are_those_of_the_seed_and_the_global_ones_stay() -> None:
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        with drawn(seed):
            found.append(torch.rand(3))
            assert torch.get_num_threads() == 1
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)


CONFIG = Config(seeds=12, arms=("advice", "adam", "grid"), further=("karate-gcn", "fashion-mlp"))


def made(loss: dict[str, float], diverged: int = 0) -> pd.DataFrame:
    """Measurements of pieces of which so many diverged, with losses by arm, a little apart from seed to seed."""
    cells = {}
    for place, cell in enumerate(ADVICE.planned(CONFIG)):
        arm = str(cell["arm"])
        rows = [{"quantity": "loss", "value": loss[arm] * exp(0.01 * (place % 7)), "method": "Adam"}]
        rows += [{"quantity": "seen", "value": loss[arm] * (2 - share), "share": share} for share in SHARES]
        if arm == "advice":
            rows.append({"quantity": "diverged", "value": float(place < 3 * diverged)})
        cells[cell] = normalise(cell, rows)
    return tabulate(cells)


@pytest.mark.parametrize(
    ("loss", "diverged", "claim", "outcome"),
    [
        ({"advice": 1.0, "adam": 2.0, "grid": 1.0}, 0, "advice-adam", "supported"),
        ({"advice": 2.0, "adam": 1.0, "grid": 1.0}, 0, "advice-adam", "refuted"),
        ({"advice": 1.0, "adam": 2.0, "grid": 1.0}, 0, "advice-grid", "supported"),
        ({"advice": 1.3, "adam": 2.0, "grid": 1.0}, 0, "advice-grid", "refuted"),
        ({"advice": 1.3, "adam": 2.0, "grid": 1.0}, 0, "grid-karate-gcn", "refuted"),
        ({"advice": 1.0, "adam": 2.0, "grid": 1.0}, 12, "advice-diverges", "refuted"),
        ({"advice": 1.0, "adam": 2.0, "grid": 1.0}, 2, "advice-diverges", "inconclusive"),
    ],
)
def test_claims_can_come_out_either_way(loss: dict[str, float], diverged: int, claim: str, outcome: str) -> None:
    verdicts = judge(ADVICE.claimed(CONFIG), made(loss, diverged), planned=ADVICE.planned(CONFIG))
    assert {verdict.claim: verdict.outcome for verdict in verdicts}[claim] == outcome


def test_figures_show_ratios_and_counts() -> None:
    table = made({"advice": 1.0, "adam": 2.0, "grid": 0.8}, diverged=5)
    with style.use():
        _, grid_of_axes = style.canvas(1, 2)
        ratios(grid_of_axes[0, 0], table[table["arm"] != "grid"], other="adam")
        advised(grid_of_axes[0, 1], table)
    names = [label.get_text() for label in grid_of_axes[0, 0].get_yticklabels()]
    assert {"digits-mlp", "karate-gcn", "fashion-mlp"} <= set(names)
    place = names.index("digits-mlp")
    points = [line.get_xdata() for line in grid_of_axes[0, 0].lines if place - 0.3 < np.mean(line.get_ydata()) < place]
    assert np.all(np.abs(np.log(2 * np.concatenate(points))) < 0.08)
    texts = [text.get_text() for text in grid_of_axes[0, 1].texts]
    assert "5/12" in texts
    assert "12" in texts


def test_what_a_run_lacks_is_drawn_hollow_from_the_results_that_come_along() -> None:
    table = made({"advice": 1.0, "adam": 2.0, "grid": 0.8})
    own = table[(table["arm"] != "grid") & (table["problem"] != "fashion-mlp")]
    with style.use():
        _, grid_of_axes = style.canvas(1, 2)
        for axes, other in zip(grid_of_axes[0], ("adam", "grid"), strict=True):
            ratios(axes, own, other=other)
    for axes, hollow in zip(
        grid_of_axes[0], ({"fashion-mlp"}, {"digits-mlp", "karate-gcn", "fashion-mlp"}), strict=True
    ):
        names = [label.get_text() for label in axes.get_yticklabels()]
        faces = {
            names[round(line.get_ydata()[0])]: line.get_markerfacecolor()
            for line in axes.lines
            if line.get_marker() == "o"
        }
        assert set(faces) == {"digits-mlp", "karate-gcn", "fashion-mlp"}
        assert {name for name, face in faces.items() if face == "white"} == hollow


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"arms": ("advise",)}, "advice"),
        ({"budget": 0.0}, "--budget"),
        ({"seeds": 101}, "--seeds"),
        ({"seeds": 0}, "--seeds"),
    ],
)
def test_options_are_checked(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Config(**options)  # type: ignore[arg-type]
