"""The isotropy analysis: its command line on a small real instance, and its power to refute."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses.descent import Descent
from analyses.ntk_isotropy import ANALYSIS
from analyses.ntk_isotropy.config import Config
from analyses.ntk_isotropy.descent import train
from analyses.ntk_isotropy.responses import measured_response, probes
from analyses.ntk_isotropy.setting import SIGMAS, Setting, make
from curvlab.fisher import LayerWise
from curvlab.study import Cell, Verdict, follow, judge
from curvlab.study.execution import Plan
from curvlab.study.measurements import tabulate

SMALL = (
    "--widths", "128", "144", "--first-seed", "12", "--seeds", "3",
    "--structures", "full", "block-diagonal", "block-tridiagonal", "kfac", "ekfac",
    "--other-depths", "5", "--other-activations", "--other-kinds", "--step-scales", "0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "analyses.ntk_isotropy", *SMALL, "--results", str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done, results / "ntk_isotropy" / "latest"


def test_the_command_ends_with_verdicts_and_files(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "Redraw:" in done.stdout
    for name in ("config.json", "environment.json", "measurements.parquet", "verdicts.json", "report.md", "log.txt"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "figures").glob("*.pdf"))


def test_identities_are_supported_and_known_failures_refuted(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    verdicts = json.loads((run[1] / "verdicts.json").read_text())
    table = verdicts if isinstance(verdicts, list) else verdicts["verdicts"]
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in table}
    for claim in (
        "isotropic-full",
        "isotropic-block-diagonal",
        "isotropic-block-tridiagonal",
        "test-response-full",
        "linear-training-full",
        "damping-linear",
        "gradient-descent-linear",
        "tridiagonal-damped-test",
        "kfac-leverage",
        "kfac-forster",
        "kfac-low-rank-alpha",
    ):
        assert outcomes[claim] == "supported", claim
    assert outcomes["isotropic-ekfac"] == "refuted"
    published = next(verdict for verdict in table if verdict["claim"] == "kfac-published-alpha")
    assert published["estimate"] == pytest.approx((2 * 81 / 120 + 161 / 200) / 3)
    assert "supported" not in {outcome for claim, outcome in outcomes.items() if claim == "unit-wise-alpha"}


def test_measurements_are_one_row_an_observation(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    table = pd.read_parquet(run[1] / "measurements.parquet")
    assert {"experiment", "structure", "width", "depth", "seed", "quantity", "value"} <= set(table.columns)
    assert set(table["experiment"]) == {experiment.name for experiment in ANALYSIS.experiments}
    alphas = table[
        (table["quantity"] == "alpha") & (table["structure"] == "block-diagonal") & (table["kind"] == "exact")
    ]
    assert alphas["value"].to_numpy() == pytest.approx(alphas["depth"].to_numpy(), rel=1e-6)


def verdicts_of(config: Config) -> dict[str, Verdict]:
    """Verdicts of the claims of a configuration, measured here."""
    plan = Plan.of(ANALYSIS, config)
    task = plan.task()
    return {v.claim: v for v in judge(plan.claims, tabulate({cell: task.observe(cell) for cell in plan.cells}))}


def test_a_wrong_structure_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An isotropy claim must fail where the structure is not what it claims to be."""
    crooked = [[1.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 1.0]]
    monkeypatch.setattr("analyses.ntk_isotropy.experiments.response.make", lambda *_: LayerWise(crooked))
    claims = ("isotropic-block-diagonal",)
    config = Config(widths=(64,), seeds=2, other_depths=(), other_activations=(), other_outputs=(), claims=claims)
    assert verdicts_of(config)["isotropic-block-diagonal"].outcome == "refuted"


def test_a_published_loss_agrees_if_one_more_run_could_have_it() -> None:
    config = Config(problem="karakida-osawa")
    claims = [claim for claim in ANALYSIS.claims(config) if claim.id.startswith("published-numpy-train_loss")]
    losses = pd.DataFrame({"seed": range(12), "value": np.linspace(1.6e-4, 2.1e-4, 12), "run": "network", "step": 1})
    table = losses.assign(quantity="train_loss")
    assert len(claims) == 3
    assert judge([claims[1]], table)[0].outcome == "supported"
    assert judge([claims[1]], table.assign(value=2 * losses["value"]))[0].outcome == "refuted"


@pytest.mark.parametrize("structure", [*SIGMAS, "kfac", "unit-wise"])
def test_the_measured_response_is_the_dense_one(structure: str) -> None:
    config = Config(widths=(12,), seeds=1)
    cell = Cell({"width": 12, "depth": 3, "activation": "erf", "outputs": 1, "seed": 0})
    setting = Setting.of(cell, config)
    built = make(structure).update(setting.rows)
    directions = probes(setting, 0)
    shares, tested = measured_response(built, setting, directions)
    J, test = setting.jacobian.dense(), setting.test_jacobian.dense()
    inverse = torch.linalg.pinv(built.to_dense(), rtol=1e-13, hermitian=True)
    expected = directions @ J @ inverse @ J.T / setting.samples
    assert torch.allclose(shares.sum(0), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    expected = directions @ J @ inverse @ test.T / setting.samples
    assert torch.allclose(tested, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_networks_short_of_rank_do_not_count_against_kfac() -> None:
    """At width 16 fewer units than samples leave a factor of every hidden layer short of rank."""
    claims = ("linear-training-kfac", "kfac-leverage", "kfac-forster")
    verdicts = verdicts_of(Config(widths=(16,), seeds=1, structures=("kfac",), step_scales=(), claims=claims))
    assert set(verdicts) == set(claims)
    for verdict in verdicts.values():
        assert verdict.outcome == "outside the assumptions", verdict
        assert "short of rank" in verdict.note


def test_a_run_that_diverges_has_no_outputs_from_there_on_and_says_so() -> None:
    setting = Setting.of(Cell({"width": 8, "depth": 3, "activation": "relu", "outputs": 1, "seed": 0}), Config())
    model = copy.deepcopy(setting.problem.model)
    away = {name: torch.full_like(p, -1e60) for name, p in model.named_parameters()}
    trained, tested, ended = train(model, setting, 1e60, 3, lambda _: away)
    assert ended == {"status": "diverged at step 1"}
    for outputs in (trained, tested):
        assert len(outputs) == 3
        assert np.isnan(outputs).all()


def test_steps_are_taken_up_where_they_were_left() -> None:
    def halving() -> Descent:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        half = lambda model: {"weight": model.weight / 2}  # noqa: E731
        return Descent(layer, half, 1.0, lambda model: {"weight": model.weight.item()})

    first, second = halving(), halving()
    trace = follow(first, 2)
    assert trace.series("weight", 3).tolist() == [1.0, 0.5, 0.25]
    assert trace.ended == {}
    second.load_state_dict(first.state_dict())
    assert follow(second, 1).series("weight").tolist() == [0.25, 0.125]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="Did you mean 'kfac'"):
        Config(structures=("kfacs",))
    with pytest.raises(ValueError, match="--other-depths"):
        Config(other_depths=(1,))
    with pytest.raises(ValueError, match="Did you mean 'tanh'"):
        Config(activation="tanhh")


def test_the_papers_own_width_is_kept() -> None:
    assert Config(problem="karakida-osawa").swept_widths == (4096,)
    assert Config().swept_widths == (128, 512, 2048)
    assert Config(problem="karakida-osawa", widths=(64,)).swept_widths == (64,)


def test_a_network_whose_last_trained_layer_is_hidden_is_not_taken_for_a_plain_one() -> None:
    """K-FAC's and the units' scales hold for layers up to the outputs."""
    config = Config(problem="two-layer", seeds=1)
    setting = Setting.of(Cell({"width": 16, "activation": "relu", "seed": 0}), config)
    assert not setting.plain
    assert setting.alpha("kfac") is None
    assert setting.alpha("full") == pytest.approx(1.0)
    plain = Setting.of(Cell({"width": 16, "depth": 3, "activation": "relu", "outputs": 3, "seed": 0}), Config())
    assert plain.plain
