"""The block-structure analysis: measurements against dense matrices and optimisers, claims that can fail, a run by command."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses.block_structure import ANALYSIS, partitions, quadratics, spectra
from analyses.block_structure.config import GGN, HESSIAN, Config
from analyses.block_structure.differences import Differences
from analyses.block_structure.experiments import kernels, one_rate, races
from analyses.block_structure.measure import measure
from analyses.block_structure.optimiser import AdamMini
from analyses.block_structure.points import START
from analyses.block_structure.setting import Point, loss_in_testing, problem_of, times, train
from analyses.block_structure.steps import Blocks, best, cosine, full_solver
from analyses.gnn_natural_gradient.experiments import kronecker
from curvlab.problems.short_text import short_text_problem
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import Partition, by_layer, by_tensor
from curvlab.study import Cell, Context, judge, main
from curvlab.study.cache import CellCache

SMALL = Config(width=4, steps=5, terms=16, seeds=2, beside=(), directions=16, permutations=3, classes=(2, 4))
TINY = Config(width=2, steps=2, terms=8, beside=(), directions=16, permutations=2)
FIRST = {
    "experiment": "curvature",
    "problem": "short-text",
    "width": 0,
    "depth": 0,
    "dense": True,
    "first": True,
    "seed": 0,
}


def context(cell: Cell, config: Config = SMALL) -> Context[Config]:
    return Context(config, cell, CellCache(Path(), {}), {})


def observed(function, coordinates: dict[str, object], config: Config = SMALL) -> pd.DataFrame:  # type: ignore[no-untyped-def]
    cell = Cell(coordinates)
    return pd.DataFrame(function(cell, context(cell, config)))


@pytest.fixture(scope="module")
def point() -> Point:
    """The small transformer before training."""
    return Point.of(problem_of(SMALL, "short-text", 0), 16, 0)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """What is measured of it at all times."""
    return observed(measure, FIRST, TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    options = ["--width", "2", "--steps", "4", "--terms", "8", "--seeds", "1", "--beside", "short-text-mlp"]
    options += ["--directions", "8", "--permutations", "2", "--classes", "2", "4"]
    options += ["--structures", "full", "kfac", "diagonal", "unit-wise", "ekfac"]
    assert main(ANALYSIS, [*options, "--workers", "1", "--results", str(results)]) == 0
    return results / "block_structure" / "latest"


def test_the_command_ends_with_verdicts_and_files(folder: Path) -> None:
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(ANALYSIS.figures)
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in verdicts}
    identities = (
        "row-side",
        "undamped-cosine",
        "canonical-correlations",
        "classes-softmax",
        "quadratic-gd",
        "quadratic-newton",
    )
    assert [outcomes[identity] for identity in identities] == ["supported"] * len(identities)
    unmeasured = {claim for claim, outcome in outcomes.items() if outcome == "not measured"}
    assert unmeasured == {
        "share-depth", "share-width", "js-predicts-gap", "share-predicts-gap", "anisotropy-predicts-gap", "traces-predicts-gap",
        "sgd-loses", "adam-mini-tuned",
    }  # fmt: skip


def test_what_is_not_measured_names_its_option() -> None:
    claims = {claim.id: claim for claim in ANALYSIS.claims(Config())}
    assert "--depths" in claims["share-depth"].statement
    for name in ("js-predicts-gap", "sgd-loses", "adam-mini-tuned"):
        assert "--races" in claims[name].statement


def test_shares_and_errors_are_those_of_the_dense_matrix(rows: pd.DataFrame) -> None:
    point = Point.of(problem_of(TINY, "short-text", 0), TINY.terms, 0)
    H = _hessian(point, point.parameters)
    labels = by_layer(point.space).labels
    kept = H * (labels[:, None] == labels)
    here = rows[(rows["matrix"] == HESSIAN) & (rows["time"] == START)]
    share = here[(here["quantity"] == "share") & (here["partition"] == "layer")]["value"].item()
    assert share == pytest.approx(float(1 - kept.square().sum() / H.square().sum()), rel=1e-6)
    error = here[(here["quantity"] == "product_error") & (here["vectors"] == "gradient")]["value"].item()
    g = point.gradient
    assert error == pytest.approx(float(((H - kept) @ g).norm() / (H @ g).norm()), rel=1e-6)


def _hessian(point: Point, theta: torch.Tensor) -> torch.Tensor:
    """By reverse mode over reverse mode, which the operators do not use."""
    theta = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(point, theta), theta, create_graph=True)
    columns = torch.autograd.grad(gradient, theta, torch.eye(len(theta), dtype=theta.dtype), is_grads_batched=True)
    return columns[0]


def _loss(point: Point, theta: torch.Tensor) -> torch.Tensor:
    moved = point.space.unflatten(theta)
    loss: torch.Tensor = point.loss(torch.func.functional_call(point.model, moved, (point.inputs,)), point.targets)
    return loss


def test_products_without_matrices_give_the_same_errors(rows: pd.DataFrame) -> None:
    by_products = observed(measure, FIRST | {"dense": False}, TINY)
    columns = ["quantity", "matrix", "time", "vectors"]

    def errors(table: pd.DataFrame) -> pd.Series:
        kept = table[(table["quantity"] == "product_error") & (table["vectors"] == "gradient")]
        return kept.set_index(columns)["value"].sort_index()

    pd.testing.assert_series_equal(errors(by_products), errors(rows), rtol=1e-5)
    assert "distance" not in set(by_products["quantity"])


def test_the_anisotropy_is_that_of_the_response(point: Point) -> None:
    operator = point.dense(GGN)
    blocks = Blocks.of(operator, by_layer(point.space))
    labels = by_layer(point.space).labels
    BD = operator.matrix * (labels[:, None] == labels)
    S = point.rows.dense()
    M = S @ torch.linalg.solve(BD + 0.1 * torch.eye(len(BD), dtype=BD.dtype), S.T)
    mean = float(M.trace()) / len(M)
    expected = float((M - mean * torch.eye(len(M), dtype=M.dtype)).norm()) / (mean * len(M) ** 0.5)
    assert blocks.anisotropy(0.1, point.rows.R) == pytest.approx(expected, rel=1e-6)


def test_the_best_step_lowers_the_loss_most(point: Point) -> None:
    matrix = point.dense(GGN)
    solve = full_solver(matrix, point.gradient)
    found = best(point, solve, 1.0)
    before = float(point.loss(point.model(point.inputs), point.targets).detach())
    gains = [before - point.loss_at(solve(rho)) for rho in (1e-5, 1e-3, 1e-2, 1.0)]
    assert found.gain >= max(gains) - 1e-12
    assert torch.allclose(
        (matrix.matrix + found.damping * torch.eye(matrix.size).double()) @ found.step, point.gradient
    )


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_rescaled_queries_and_keys_leave_the_function(point: Point, ratio: float) -> None:
    factors = partitions.balanced_queries(point.model, point.space, ratio)
    assert factors is not None
    moved = point.parameters * factors
    assert not torch.allclose(moved, point.parameters)
    assert float(_loss(point, moved)) == pytest.approx(float(_loss(point, point.parameters)))
    named = point.space.unflatten(moved)
    query, key = (named[f"1.branch.1.{name}.weight"].reshape(2, -1).norm(dim=1) for name in ("query", "key"))
    torch.testing.assert_close(query, ratio * key)
    linear = nn.Linear(2, 3)
    assert (
        partitions.balanced_queries(linear, ParameterSpace({n: p.shape for n, p in linear.named_parameters()}), 1.0)
        is None
    )


def test_the_hessian_changes_with_the_parameters_that_are_rescaled(point: Point) -> None:
    factors = partitions.balanced_queries(point.model, point.space, 16.0)
    H, moved = (_hessian(point, at) for at in (point.parameters, point.parameters * factors))
    torch.testing.assert_close(moved, H / factors[:, None] / factors, rtol=1e-6, atol=1e-10)


def test_adam_minis_blocks_are_heads_rows_and_tokens(point: Point) -> None:
    kinds = partitions.kinds(point.model)
    assert kinds["1.branch.1.query.weight"] == ("head", 2)
    assert kinds["0.characters.weight"] == ("token", 28)
    assert kinds["6.weight"] == ("token", 28)
    assert kinds["2.branch.1.0.weight"] == ("neuron", 8)
    assert kinds["6.bias"] == ("bias", 28)
    assert kinds["5.weight"] == ("other", 1)
    named = {
        name: len(labels.unique())
        for name, labels in point.space.unflatten(
            partitions.adam_mini(point.model, point.space).labels.double()
        ).items()
    }
    assert named["1.branch.1.value.weight"] == 1
    assert named["1.branch.1.merge.weight"] == 4
    assert named["1.branch.1.key.bias"] == 4


def test_cuts_along_inputs_are_those_of_the_transpose() -> None:
    shape = torch.Size([4, 6])
    across = partitions.columns_of(shape, 3).reshape(shape)
    assert torch.equal(across.T.flatten(), partitions.rows_of(torch.Size([6, 4]), 3))
    assert len(partitions.columns_of(torch.Size([8, 6]), 4).unique()) == 3, "the nearest divisor below"


def test_one_second_moment_an_entry_is_adamw() -> None:
    losses = []
    for own in (True, False):
        problem = short_text_problem("mlp", width=4, samples=100, seed=1)
        model = problem.model
        optimiser: torch.optim.Optimizer = (
            AdamMini(model, one_rate.partition_of("adamw", model, 0), 0.01)
            if own
            else torch.optim.AdamW(model.parameters(), lr=0.01)
        )
        train(problem, optimiser, range(6), 16, 0)
        losses.append(loss_in_testing(problem))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_block_moves_by_its_mean_square() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    before = model.weight.detach().clone()
    optimiser = AdamMini(model, Partition(("a", "b"), torch.tensor([0, 0, 1])), 0.1, decay=0.0)
    model.weight.grad = torch.tensor([[3.0, 4.0, -2.0]]).double()
    optimiser.step()
    moved = (before - model.weight.detach()) / 0.1
    torch.testing.assert_close(moved, torch.tensor([[3.0, 4.0, -(12.5**0.5)]]).double() / 12.5**0.5)
    assert optimiser.numbers == 5
    with pytest.raises(ValueError, match="closure"):
        optimiser.step(lambda: 0.0)


def test_random_blocks_have_the_same_sizes(point: Point) -> None:
    own = partitions.adam_mini(point.model, point.space)
    other = partitions.shuffled(own, torch.Generator().manual_seed(0))
    assert torch.equal(own.labels.bincount(), other.labels.bincount())
    assert not torch.equal(own.labels, other.labels)


def test_distances_tell_scale_from_shape() -> None:
    values = np.logspace(-3, 0, 12)
    alike, scaled, other = values, 100 * values, np.full(12, 0.5)
    for normalised in spectra.NORMALISATIONS:
        assert spectra.logarithmic_distance([alike, alike], normalised, 0.3) == pytest.approx(0, abs=1e-6)
    assert spectra.logarithmic_distance([alike, scaled], "raw", 0.1) > 0.5
    for normalised in ("trace", "top", "tenth"):
        assert spectra.logarithmic_distance([alike, scaled], normalised, 0.3) == pytest.approx(0, abs=0.05)
        assert spectra.logarithmic_distance([alike, other], normalised, 0.3) > 0.3
    assert spectra.linear_distance([np.zeros(4), np.ones(4)]) == pytest.approx(1, abs=1e-6)
    assert spectra.linear_distance([np.zeros(4), np.full(4, 1e-5)]) < 0.01, "below the smoothing all are alike"
    assert set(spectra.log_places([alike, 1e-15 * alike], "raw")) == {0}, "a block that is zero has none"


def test_spectra_are_those_of_the_diagonal_blocks(point: Point) -> None:
    operator = point.dense(HESSIAN)
    partition = by_tensor(point.space)
    found = spectra.spectra_of(operator.matrix, partition)
    at = partition.indices(3)
    expected = np.linalg.eigvalsh(operator.matrix.numpy()[np.ix_(at, at)])
    assert found[3] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", [*quadratics.FIXED, "block-newton"])
def test_steps_on_a_quadratic_are_those_of_the_iteration(method: str) -> None:
    """One step fewer does not reach the loss at the best rate."""
    H, x = quadratics.quadratic(quadratics.UNLIKE, np.random.default_rng(3))
    found = quadratics.steps(method, H, x)
    rates = np.diag(quadratics.FIXED[method](H, x)) if method in quadratics.FIXED else _block_inverse(H)
    values = np.linalg.eigvals(rates @ H).real
    eta = 2 / (values.min() + values.max())
    at, aim = x.copy(), quadratics.REDUCTION * float(x @ H @ x)
    for count in range(1, found + 1):
        at = at - eta * rates @ (H @ at)
        assert at @ H @ at <= aim * (1 + 1e-6) if count == found else at @ H @ at > aim * (1 - 1e-6)


@pytest.mark.parametrize("method", quadratics.MOVING_METHODS)
def test_moving_steps_on_a_quadratic_are_those_of_the_optimiser(method: str) -> None:
    """At one of the rates the optimiser gets there in as many steps, at none in fewer."""
    H, x = quadratics.quadratic(quadratics.UNLIKE, np.random.default_rng(3))
    found = quadratics.steps(method, H, x)
    labels = torch.arange(9) if method == "adam" else torch.arange(9) // 3
    partition = Partition(tuple(map(str, range(int(labels.max()) + 1))), labels)
    aim, reached = quadratics.REDUCTION * float(x @ H @ x), []
    for power in range(quadratics.RATES):
        model = nn.Linear(9, 1, bias=False).double()
        model.weight.data = torch.tensor(x)[None]
        rate = 2 * float(np.abs(x).max()) * 10 ** (-power / 2)
        optimiser = AdamMini(model, partition, rate, betas=(0.0, quadratics.SECOND), eps=1e-12, decay=0.0)
        for count in range(1, found + 1):
            model.weight.grad = model.weight.data @ torch.tensor(H)
            optimiser.step()
            if float((model.weight.data @ torch.tensor(H) * model.weight.data).sum()) <= aim:
                reached.append(count)
                break
    assert min(reached) == found


def _block_inverse(H: np.ndarray) -> np.ndarray:
    inverse = np.zeros_like(H)
    for start in range(0, len(H), quadratics.SIZE):
        part = slice(start, start + quadratics.SIZE)
        inverse[part, part] = np.linalg.inv(H[part, part])
    return inverse


def test_quadratics_have_the_same_eigenvalues_and_loss_at_the_start() -> None:
    made = {name: quadratics.quadratic(name, np.random.default_rng(0)) for name in ("unlike", "alike", "mixed")}
    values = [np.linalg.eigvalsh(H) for H, _ in made.values()]
    assert values[0] == pytest.approx(values[1])
    assert values[0] == pytest.approx(values[2])
    losses = [float(x @ H @ x) for H, x in made.values()]
    assert losses == pytest.approx([losses[0]] * 3)
    assert np.abs(made["alike"][0][:3, 3:]).max() < 1e-9 < np.abs(made["mixed"][0][:3, 3:]).max()


def test_differences_of_gradients_are_hessian_products(point: Point) -> None:
    H = point.dense(HESSIAN)
    block = torch.randn(2, H.size, dtype=torch.float64)
    block[1] = 0
    found = Differences(point, 1e-5).matmat(block)
    torch.testing.assert_close(found[0], H.matmat(block)[0], rtol=1e-5, atol=1e-7)
    assert not bool(found[1].any())


def test_samples_with_the_same_inputs_count_once_in_the_undamped_limit() -> None:
    rows = observed(kernels.measure, {"experiment": "kernels", "problem": "short-text", "seed": 3})
    found = rows.set_index("quantity")
    assert abs(found.loc["cosine_error", "value"]) <= found.loc["cosine_error", "tolerance"] < 0.01
    assert abs(found.loc["share_error", "value"]) <= found.loc["share_error", "tolerance"] < 1e-6


def test_the_middle_of_training_is_on_the_way() -> None:
    config = Config(width=4, steps=40, terms=8, beside=())
    losses = {}
    for time, one in times(config, problem_of(config, "short-text-mlp", 0), 0):
        losses[time] = one.loss_at(torch.zeros_like(one.parameters))
    assert losses["end"] < losses["middle"] < losses["start"]


def claims(*names: str) -> list:  # type: ignore[type-arg]
    known = {claim.id: claim for claim in ANALYSIS.claims(Config())}
    return [known[name] for name in names]


def outcomes(table: pd.DataFrame, *names: str) -> list[str]:
    return [verdict.outcome for verdict in judge(claims(*names), table)]


@pytest.mark.parametrize(("level", "outcome"), [(0.9, "supported"), (0.1, "refuted")])
def test_that_layers_fail_can_fail(level: float, outcome: str) -> None:
    columns = {"quantity": "product_error", "matrix": HESSIAN, "vectors": "gradient", "time": "end"}
    table = pd.DataFrame([{**columns, "seed": seed, "value": level + 0.01 * (seed % 3)} for seed in range(12)])
    assert outcomes(table, "hessian-error-gradient") == [outcome]


@pytest.mark.parametrize(("sign", "outcome"), [(1.0, "supported"), (-1.0, "refuted")])
def test_heterogeneity_can_be_the_other_way_round(sign: float, outcome: str) -> None:
    columns = {"quantity": "distance", "matrix": HESSIAN, "time": START, "scale": "linear", "normalised": "raw"}
    table = pd.DataFrame([
        {**columns, "seed": seed, "problem": name, "value": 0.5 + by * sign * 0.1}
        for seed in range(12) for name, by in (("short-text", 1), ("short-text-cnn", -1))
    ])  # fmt: skip
    assert outcomes(table, "heterogeneity-hessian-short-text-cnn") == [outcome]


@pytest.mark.parametrize(("sign", "outcome"), [(-1.0, "supported"), (1.0, "refuted")])
def test_that_the_share_predicts_the_step_can_fail(sign: float, outcome: str) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame([
        {"quantity": quantity, "seed": seed, "problem": problem, "time": time, "value": by * (place + 0.1 * rng.standard_normal())}
        for seed in range(12)
        for place, (problem, time) in enumerate((p, t) for p in "ab" for t in ("start", "middle", "end"))
        for quantity, by in (("matrix_share", 1.0), ("step_cosine", sign))
    ])  # fmt: skip
    assert outcomes(table, "share-predicts-step") == [outcome]


@pytest.mark.parametrize(("sign", "outcome"), [(1.0, "supported"), (-1.0, "refuted")])
def test_that_the_distance_predicts_the_gap_can_fail(sign: float, outcome: str) -> None:
    rows = []
    for seed in range(6):
        for place, (problem, width) in enumerate((p, w) for p in "abc" for w in (6, 8, 12)):
            at = {"seed": seed, "problem": problem, "width": width}
            gap = place + 0.3 * ((seed + place) % 3)
            rows += [{**at, "quantity": "test_loss", "method": "sgd", "value": 3 + gap}]
            rows += [{**at, "quantity": "test_loss", "method": "adamw", "value": 3.0}]
            rows += [
                {
                    **at,
                    "quantity": "distance",
                    "matrix": HESSIAN,
                    "scale": "linear",
                    "time": START,
                    "value": sign * place,
                }
            ]
    assert outcomes(pd.DataFrame(rows), "js-predicts-gap") == [outcome]


def test_identities_are_refuted_by_one_observation() -> None:
    table = pd.DataFrame([
        {"quantity": "share_error", "seed": seed, "value": 1e-3 * (seed == 4), "tolerance": 1e-9} for seed in range(6)
    ])  # fmt: skip
    assert outcomes(table, "row-side") == ["refuted"]


def test_races_choose_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(cell: Cell, config: Config, rate: float, role: str) -> float:
        seen.append((rate, role))
        return float("nan") if rate > 1 else abs(rate - 0.3)

    monkeypatch.setattr(races, "_run", run)
    coordinates = {"experiment": "races", "problem": "short-text", "width": 4, "method": "sgd", "seed": 0}
    table = observed(races.measure, coordinates)
    assert table["rate"].item() == 0.3
    assert seen[-1] == (0.3, "batches")
    assert {role for _, role in seen[:-1]} == {"tuning"}


@pytest.mark.parametrize("method", races.RATES)
def test_every_method_of_a_race_trains(method: str) -> None:
    coordinates = {"experiment": "races", "problem": "short-text-mlp", "width": 4, "method": method, "seed": 0}
    table = observed(races.measure, coordinates, Config(steps=12, beside=()))
    untrained = problem_of(Config(), "short-text-mlp", 0, width=4)
    assert table["value"].item() < loss_in_testing(untrained) - 0.5


def test_large_networks_have_maps_of_layers_alone() -> None:
    config = Config(problem="short-text", beside=(), largest=100)
    cells = ANALYSIS.cells(config)
    assert {cell["experiment"] for cell in cells} == {"curvature", "classes", "quadratics", "one-rate"}
    assert not any(cell["dense"] for cell in cells if cell["experiment"] == "curvature")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("kfacc",)}, "Did you mean 'kfac'"),
        ({"classes": (1,)}, "--classes"),
        ({"rate": 0.0}, "--rate"),
        ({"steps": 1}, "--steps"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)  # type: ignore[arg-type]


def test_no_cosine_is_above_one():
    vectors = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    assert all(kronecker._cosine(v, v) <= 1 and cosine(v, v) <= 1 for v in vectors)
    assert cosine(vectors[0], -vectors[0]) >= -1
