"""The edge-of-stability analysis: its command line on a small real instance, its measurements, and its power to refute."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from analyses.edge_of_stability import ANALYSIS, descent
from analyses.edge_of_stability.analysis import FIGURES
from analyses.edge_of_stability.config import Config
from analyses.edge_of_stability.descent import TrackedDescent, descend, flow
from analyses.edge_of_stability.experiments import chebyshev, losses, preconditioned, schedules, training
from analyses.edge_of_stability.optimisers import Optimiser, adam, frozen, momentum, natural
from analyses.edge_of_stability.setting import Setting, flat, setting_of
from analyses.edge_of_stability.windows import AT_EDGE, NEVER, Edge
from curvlab.fisher import make
from curvlab.rows import sqrt_fisher
from curvlab.spectrum import Preconditioned
from curvlab.study import Cell, Trace, Verdict, judge, loop, main
from curvlab.study.execution import Plan
from curvlab.study.loop import Process
from curvlab.study.measurements import Row, tabulate
from curvlab.testing.oracle import assert_close
from paper_figures.cohen_2021 import plateaus

OPTIONS = {
    "width": 8,
    "samples": 24,
    "steps": 80,
    "every": 20,
    "structures": ("full", "kfac"),
    "preconditioners": ("kfac",),
}
TINY = Config(**OPTIONS, seeds=2)
SMALL = ("--width", "8", "--samples", "24", "--steps", "80", "--every", "20", "--structures", "full", "kfac")
QUICK = (
    "--preconditioners", "kfac", "--seeds", "1", "--nesterov", "--heavy-ball", "0.5", "--batch-size", "8", "12", "--workers", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chebyshev, "STEPS", 250)
        patch.setattr(schedules, "EARLY", 5)
        patch.setattr(preconditioned, "SAMPLES", 6)
        patch.setattr(preconditioned, "STEPS", {"frozen": 60, "live": 20})
        code = main(ANALYSIS, [*SMALL, *QUICK, "--results", str(results)])
    return code, results / "edge_of_stability" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[int, Path]) -> None:
    code, folder = run
    assert code == 0
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(FIGURES)
    table = pd.read_parquet(folder / "measurements.parquet")
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments} - {"published"}
    stored = json.loads((folder / "verdicts.json").read_text())
    assert not stored["failures"]
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in stored["verdicts"]}
    identities = ("quadratic-gd", "quadratic-momentum", "quadratic-roots", "chebyshev-tracking")
    assert {claim: outcomes[claim] for claim in identities} == dict.fromkeys(identities, "supported")


@pytest.fixture
def setting() -> Setting:
    return setting_of(Cell({"problem": "digits", "width": 5, "samples": 12, "seed": 0}), TINY)


def dense_hessian(model: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        named = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return loss(functional_call(model, named, (inputs,)), targets)

    return hessian(value)(parameters_to_vector(model.parameters()).detach())


def eigenvalues(setting: Setting, model: nn.Module) -> Tensor:
    return torch.linalg.eigvalsh(dense_hessian(model, setting.problem.loss, *setting.problem.train)).flip(0)


def test_a_run_is_torchs_and_its_sharpness_the_dense_one(setting: Setting) -> None:
    model, plain = setting.network(), setting.network()
    process = TrackedDescent(model, setting, momentum(model, "heavy-ball", 0.2, 0.9), (0, 3, 6))
    assert isinstance(process, Process)
    trace = descend(process, 6)
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9)
    inputs, targets = setting.problem.train
    assert len(trace.seen) == 7
    for step, seen in enumerate(trace.seen):
        loss = setting.problem.loss(plain(inputs), targets)
        assert seen["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
        if step in (0, 3, 6):
            dense = eigenvalues(setting, plain)
            assert seen["sharpness"] == pytest.approx(float(dense[0]), abs=seen["residual"] + 1e-9)
        optimiser.zero_grad()
        loss.backward()
        assert seen["square"] == pytest.approx(sum(float(p.grad.square().sum()) for p in plain.parameters()))
        optimiser.step()
    assert_close(flat(model), flat(plain))


def test_alignment_is_that_of_the_dense_eigenvectors(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "TOLERANCE", 1e-10)
    model = setting.network()
    _, vectors = torch.linalg.eigh(dense_hessian(model, setting.problem.loss, *setting.problem.train))
    gradient = setting.gradient(model)[1]
    expected = float((vectors[:, -2:].T @ gradient).square().sum() / gradient.square().sum())
    seen = descend(TrackedDescent(model, setting, momentum(model, "gd", 0.1), (0,)), 1).seen[0]
    assert seen["gradient_alignment"] == pytest.approx(expected, rel=1e-6)
    assert seen["step_alignment"] == pytest.approx(expected, rel=1e-6)


def process_of(method: str, setting: Setting, *, interrupted: int | None = None) -> TrackedDescent:
    """Training that is measured on the way, and stopped from outside at a step."""

    def before(step: int) -> None:
        if step == interrupted:
            raise KeyboardInterrupt

    model = setting.network()
    optimisers: dict[str, Optimiser] = {
        "adam": adam(model, 0.01),
        "natural": natural(model, setting, make("kfac"), 1e-2, 0.1),
    }
    return TrackedDescent(model, setting, optimisers[method], (1, 4, 8), before=before)


@pytest.mark.parametrize("method", ["adam", "natural"])
def test_a_run_that_is_taken_up_again_is_the_same(
    method: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVED", -1.0)
    whole, again, path = process_of(method, setting), process_of(method, setting), tmp_path / "run.pt"
    expected = descend(whole, 8)
    with pytest.raises(KeyboardInterrupt):
        descend(process_of(method, setting, interrupted=5), 8, checkpoint=path)
    assert path.exists()
    assert descend(again, 8, checkpoint=path) == expected
    assert torch.equal(flat(again.model), flat(whole.model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["model", "optimiser", "subspace"])
def test_a_checkpoint_of_another_network_is_set_aside_and_the_run_computed_again(
    damage: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVED", -1.0)
    path, again = tmp_path / "run.pt", process_of("adam", setting)
    with pytest.raises(KeyboardInterrupt):
        descend(process_of("adam", setting, interrupted=5), 8, checkpoint=path)
    state = torch.load(path, weights_only=True)
    process = state["process"]
    process[damage] = {
        "model": {**process["model"], next(iter(process["model"])): torch.ones(2, 3)},
        "optimiser": {**process["optimiser"], "state": {0: {"step": torch.ones(())}}},
        "subspace": process["subspace"][:, 1:],
    }[damage]
    torch.save(state, path)
    assert descend(again, 8, checkpoint=path) == descend(process_of("adam", setting), 8)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt.damaged"]


def test_divergence_keeps_what_was_measured(setting: Setting) -> None:
    model = setting.network()
    optimiser = momentum(model, "gd", 50.0)
    trace = descend(TrackedDescent(model, setting, optimiser, (0, 50)), 50)
    assert trace.diverged is not None
    assert trace.diverged < 50
    losses = trace.series("loss")
    assert len(losses) == trace.diverged + 1
    assert losses[-1] > 100 * losses[0] >= losses[:-1].max()
    edge = Edge(trace, optimiser.threshold, 50.0)
    assert edge.steps.tolist() == [0]
    rows = edge.rows()
    assert {"quantity": "diverged", "value": trace.diverged, "status": f"diverged at step {trace.diverged}"} in rows
    assert all(np.isfinite(row["value"]) or row["status"].startswith("outside") for row in rows)


def test_the_flow_is_that_of_small_steps(setting: Setting) -> None:
    times = np.array([0.0, 0.5, 1.0])
    path = flow(setting.network(), setting, times, precision=1e-8)
    model = setting.network()
    assert path[0] == pytest.approx(flat(model).numpy())
    for fine in (200, 400):
        model = setting.network()
        descend(TrackedDescent(model, setting, momentum(model, "gd", 1.0 / fine)), fine)
    assert np.linalg.norm(flat(model).numpy() - path[-1]) < 0.01 * np.linalg.norm(path[-1] - path[0])


def test_batches_cut_shuffled_epochs(setting: Setting) -> None:
    batches = [training.batch_of(setting, 5, 0, step) for step in range(6)]
    assert [len(batch) for batch in batches] == [5, 5, 2] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert not torch.equal(batches[0], batches[3])
    assert not torch.equal(batches[0], training.batch_of(setting, 5, 1, 0))


@pytest.mark.parametrize("live", [False, True])
def test_preconditioned_steps_and_curvature_are_the_dense_ones(setting: Setting, live: bool) -> None:
    model, structure, rho = setting.network(), make("kfac"), 0.05
    problem = setting.problem
    structure.update(sqrt_fisher(model, problem.loss, *problem.train))
    optimiser = natural(model, setting, structure, rho, 0.3) if live else frozen(model, structure, rho, 0.3)
    first = structure.to_dense()
    for step in range(2):
        here = setting.network()
        vector_to_parameters(flat(model), here.parameters())
        matrix = first
        if live:
            matrix = make("kfac").update(sqrt_fisher(here, problem.loss, *problem.train)).to_dense()
        damped = matrix + rho * torch.eye(len(matrix), dtype=matrix.dtype)
        move = torch.linalg.solve(damped, setting.gradient(here)[1])
        before = flat(model)
        seen = descend(TrackedDescent(model, setting, optimiser, (0,), top=1), 1).seen[0]
        if live or not step:
            H = dense_hessian(here, problem.loss, *problem.train)
            expected = torch.linalg.eigvals(torch.linalg.solve(damped, H)).real.max()
            assert seen["sharpness"] == pytest.approx(float(expected), rel=1e-2)
        # A run of one step measured at 0 takes one step.
        assert_close(flat(model), before - 0.3 * move, 1e-8)


def test_adams_curvature_is_that_of_its_diagonal(setting: Setting) -> None:
    model = setting.network()
    optimiser = adam(model, 0.01)
    hessian = setting.hessian(model)
    assert optimiser.curvature(hessian) is None
    descend(TrackedDescent(model, setting, optimiser), 3)
    operator = optimiser.curvature(hessian)
    assert isinstance(operator, Preconditioned)
    assert optimiser.threshold == pytest.approx(38 / 0.01)


def edge(ratios: list[float], fallen: list[float], every: int = 100) -> Edge:
    """A run whose loss is given at every step and whose sharpness is measured every so many, against a threshold of 2."""
    seen = [{"step": step, "loss": loss, "square": 1.0} for step, loss in enumerate(fallen)]
    for i, ratio in enumerate(ratios):
        seen[every * i] |= {"sharpness": 2 * ratio, "step_alignment": 0.25}
    return Edge(Trace(seen), 2.0, 1.0)


FALLING = [1.0 - 0.001 * k for k in range(701)]


def told(run: Edge) -> dict[str, float | str]:
    """What a run says of itself by name: a value, or why it says nothing."""
    return {str(row["quantity"]): row.get("status") or row["value"] for row in run.rows() if "step" not in row}


def test_windows_of_a_made_up_run_leave_the_overshoot_out() -> None:
    rough = [loss + (0.01 if k >= 400 and k % 2 else 0.0) for k, loss in enumerate(FALLING)]
    found = told(edge([0.5, 0.7, 1.0, 1.9, 1.25, 0.8, 1.25, 0.8], [*rough[:150], 9.0, *rough[151:]]))
    assert found["crossing"] == 200
    assert found["survived"] == found["lemma_broken"] == 1
    few = "outside the assumptions: it was measured fewer than 3 times below its threshold"
    assert found["trend"] == found["increase_before"] == few
    assert found["increase_after"] == pytest.approx(0.5)
    assert found["plateau_ratio"] == pytest.approx(1.0)  # by the logarithm; 1.9 lies within 200 steps of the crossing
    assert found["plateau_sharpness"] == pytest.approx(2.0)
    assert found["long_change"] == pytest.approx((0.35 + 0.005) / (0.5 + 0.005), rel=0.2)
    assert found["step_share"] == 0.25


def test_the_time_below_the_threshold_ends_with_the_last_measurement_there() -> None:
    rises = [loss + (0.01 if k in (150, 350) else 0.0) for k, loss in enumerate(FALLING)]
    found = told(edge([0.5, 0.4, 0.7, 0.8, 1.1, 1.0, 1.0, 1.0], rises))
    assert found["trend"] == pytest.approx(2 / 3)
    assert found["increase_before"] == pytest.approx(1 / 300)


def test_a_run_that_says_nothing_of_the_edge_says_why() -> None:
    never = told(edge([0.5, 0.4, 0.6, 0.6, 0.5, 0.6, 0.6, 0.6], FALLING))
    assert {never[name] for name in ("crossing", "survived", *AT_EDGE)} == {f"outside the assumptions: {NEVER}"}
    late = told(edge([0.5, 0.4, 0.6, 0.6, 0.5, 1.0, 1.0, 1.0], FALLING))
    assert late["survived"] == 1
    ended = "outside the assumptions: the run ended within 200 steps of reaching its threshold"
    assert {late[name] for name in AT_EDGE} == {ended}
    run = edge([0.5, 0.4, 0.6, 1.0, 1.0, 1.0, 1.0, 1.0], FALLING)
    diverged = told(replace(run, trace=Trace(run.trace.seen, 700)))
    assert diverged["survived"] == 0
    assert {diverged[name] for name in AT_EDGE} == {"outside the assumptions: the run diverged"}


def observed(config: Config, cell: Cell) -> list[Row]:
    return Plan.of(ANALYSIS, config).task().observe(cell)


def verdicts_of(config: Config, *claim_ids: str) -> dict[str, Verdict]:
    """Measure what some claims need, and judge them."""
    claims = [claim for claim in ANALYSIS.claims(config) if claim.id in claim_ids]
    cells = [cell for cell in ANALYSIS.cells(config) if any(claim.needs(cell) for claim in claims)]
    task = Plan.of(ANALYSIS, config).task()
    measured = {cell: task.observe(cell) for cell in cells}
    return {verdict.claim: verdict for verdict in judge(claims, tabulate(measured))}


def test_a_wrong_threshold_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(method: str, eta: float, beta: float) -> float:
        return 3.0 / eta

    monkeypatch.setattr("analyses.edge_of_stability.experiments.quadratic.sharpness_threshold", wrong)
    assert verdicts_of(TINY, "quadratic-gd")["quadratic-gd"].outcome == "refuted"


def test_a_run_that_never_gets_there_says_so() -> None:
    verdict = verdicts_of(Config(**OPTIONS, seeds=2, etas=(0.001,)), "edge-gd-0.001")["edge-gd-0.001"]
    assert verdict.outcome == "outside the assumptions"
    assert verdict.note == f"2 of 2 observations: {NEVER}"


def judged(claim_id: str, *observations: tuple[int, str, float]) -> Verdict:
    """The verdict on made-up observations, each a seed, a quantity and a value, at one step size."""
    (claim,) = (claim for claim in ANALYSIS.claims(TINY) if claim.id == claim_id)
    rows = [{"seed": seed, "quantity": name, "value": value, "eta": 0.3} for seed, name, value in observations]
    (verdict,) = judge([claim], pd.DataFrame(rows))
    return verdict


def test_a_run_is_judged_by_its_ratios_to_the_threshold() -> None:
    there = [(1000 + seed, "plateau_ratio", 1.0 + 0.001 * seed) for seed in range(3)]
    verdict = judged("edge-gd-0.3", *there)
    assert (verdict.outcome, verdict.scale) == ("supported", "log")


def test_one_step_size_has_no_slope() -> None:
    verdict = judged("plateaus-inverse", (1000, "plateau_sharpness", 1.0))
    assert verdict.outcome == "outside the assumptions"
    assert "at least two step sizes (--etas)" in verdict.note


@pytest.mark.parametrize(("factor", "outcome"), [(1.1, "supported"), (0.9, "refuted")])
def test_natural_gradient_has_its_bound(monkeypatch: pytest.MonkeyPatch, factor: float, outcome: str) -> None:
    """Claim 13 above the bound and, were the bound taken for a higher one, below it."""
    config = Config(**(OPTIONS | {"width": 24, "preconditioners": ("full",)}), seeds=3)
    monkeypatch.setattr(preconditioned, "SAMPLES", 5)
    monkeypatch.setattr(preconditioned, "STEPS", {"frozen": 60, "live": 20})
    monkeypatch.setattr(preconditioned, "BEYOND", (0.5, factor))
    found = verdicts_of(config, "natural-curvature-full", "natural-below-full", "natural-beyond-full")
    assert found["natural-beyond-full"].outcome == outcome
    for claim in ("natural-curvature-full", "natural-below-full"):
        assert found[claim].outcome == "supported"


def test_the_weight_of_cross_entropy(setting: Setting) -> None:
    with torch.no_grad():
        p = torch.softmax(setting.problem.model(setting.problem.train[0]), 1).numpy()
    assert losses.uncertainty(setting, setting.problem.model) == pytest.approx((p - p**2).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("ful",)}, "Did you mean 'full'"),
        ({"preconditioners": ("layer-wise",)}, "'layer-wise' is a family of structures"),
        ({"network": "fc-tan"}, "Did you mean 'fc-tanh'"),
        ({"etas": (0.0,)}, "--etas"),
        ({"etas": ()}, "--etas"),
        ({"batch_size": (0,)}, "--batch-size"),
        ({"steps": 10}, "--steps"),
        ({"beta": 1.0}, "--beta"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("optimiser", ["adam", "adam-frozen", "sgd"])
def test_other_optimisers_run(optimiser: str) -> None:
    config = Config(**OPTIONS, seeds=1, adam=(0.001,), batch_size=(8,))
    (cell,) = (
        cell
        for cell in ANALYSIS.cells(config)
        if cell["experiment"] in ("training", "batches") and cell["optimiser"] == optimiser
    )
    rows = observed(config, cell)
    ratio = [row["value"] for row in rows if row["quantity"] == "ratio"]
    assert len(ratio) == 9 - (optimiser == "adam")
    assert min(ratio) > 0


def test_the_table_of_plateaus_has_a_row_a_run() -> None:
    at = partial(dict, experiment="training", optimiser="gd")
    rows = [
        at(eta=eta, seed=seed, quantity=name, value=value + seed / 10)
        for eta in (0.3, 0.5)
        for seed in range(3)
        for name, value in (("plateau_ratio", 1.0), ("crossing", 100.0))
    ]
    table = plateaus(pd.DataFrame(rows))
    assert table[r"$\eta$"].tolist() == ["0.3", "0.5"]
    assert set(table["sharpness / threshold"]) == {r"$1.100 \pm 0.248$"}
