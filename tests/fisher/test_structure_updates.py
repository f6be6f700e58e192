"""Batches, decays, windows and sides: what a structure's state is after several updates."""

import pytest
import torch
from fisher_cases import Case, batches, case, draw, rows_and_references, rows_of
from fisher_oracle import (
    PARAMETER_SPECS,
    PLAIN_SPECS,
    SPECS,
    Reference,
    build,
    dense_structure,
    kronecker_block,
    positions,
)
from oracle import DOUBLE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab.fisher as cf
from curvlab.errors import StateError
from curvlab.rows import merge, sqrt_fisher
from curvlab.testing.oracle import assert_close


def averaged(spec: str, data: Case, references: list[Reference], weights: list[float]) -> Tensor:
    """Return Σ w F / Σ w of a spec's matrices, or B ⊗ A of averaged factors, with weights relative to the terms.

    A weight is the decay since the batch; sums of losses are averaged with it alone, means with it times their terms.
    """
    place = positions(data.model)
    terms = [ref.count if data.loss.reduction == "mean" else 1.0 for ref in references]
    shares = torch.tensor([w * t for w, t in zip(weights, terms, strict=True)], dtype=DOUBLE)
    shares = shares / shares.sum()
    mean = sum(share * dense_structure(spec, ref, place) for share, ref in zip(shares, references, strict=True))
    if not spec.startswith("kfac"):
        return mean
    sharing = SPECS[spec][1].get("sharing", "expand")
    mass = sum(w * float(ref.omega.sum()) for w, ref in zip(weights, references, strict=True))
    for k, layer in enumerate(references[0].layers):
        if layer.a is not None:
            factors = [ref.factors(ref.layers[k], sharing) for ref in references]
            B = sum(share * B for share, (B, _) in zip(shares, factors, strict=True))
            A = sum(w * A for w, (_, A) in zip(weights, factors, strict=True)) / mass
            at = layer.at.flatten()
            mean[at[:, None], at[None, :]] = kronecker_block(layer, B, A)
    return mean


# --- one batch and many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "ekfac"])
def test_many_batches_are_one(spec: str, reduction: str) -> None:
    data = case("cnn", "ce-weights", reduction, N=6)
    names, v = list(positions(data.model)), draw(2, data.reference.P)
    whole, cut = build(spec, names).update(data.rows), build(spec, names)
    for rows in rows_and_references(data)[0]:
        cut.update(rows, 1.0)
    assert_close(cut.to_dense(), whole.to_dense(), 1e-9)
    assert_close(cut.solve(v, "rel:0.1"), whole.solve(v, "rel:0.1"), 1e-8)
    assert cut.count == pytest.approx(whole.count)
    assert cut.trace() == pytest.approx(whole.trace())
    jacobian = data.rows.jacobian()
    assert_close(cut.response(jacobian, "rel:0.1"), whole.response(jacobian, "rel:0.1"), 1e-8)


@pytest.mark.parametrize("loss", ["ce-all", "bce"])
@pytest.mark.parametrize("key", PLAIN_SPECS)
def test_fit_on_batches_is_fit_on_all(key: str, loss: str) -> None:
    data = case("mlp", loss, N=6)
    whole = cf.STRUCTURES[key].fit(data.model, data.loss, (data.inputs, data.targets))
    cut = cf.STRUCTURES[key].fit(data.model, data.loss, batches(data))
    assert_close(whole.to_dense(), dense_structure(key.replace("layer-wise", "block-diagonal"), data.reference, {}))
    assert_close(cut.to_dense(), whole.to_dense(), 1e-9)
    assert cut.count == pytest.approx(whole.count)


@pytest.mark.parametrize("key", PLAIN_SPECS)
def test_a_loader_that_drops_the_last_batch_covers_what_it_covers(key: str) -> None:
    data = case("mlp", "ce-weights", N=7)
    loader = DataLoader(TensorDataset(data.inputs, data.targets), batch_size=3, drop_last=True)
    got = cf.STRUCTURES[key].fit(data.model, data.loss, loader)
    expected = cf.STRUCTURES[key].fit(data.model, data.loss, (data.inputs[:6], data.targets[:6]))
    assert_close(got.to_dense(), expected.to_dense())
    assert got.count == pytest.approx(float(data.loss.weight[data.targets[:6]].sum()))


@pytest.mark.parametrize("key", PLAIN_SPECS)
def test_fit_repeats_the_draws_of_every_pass(key: str) -> None:
    data = case("mlp", "ce", kind="mc", seed=3)
    got = cf.STRUCTURES[key].fit(
        data.model, data.loss, (data.inputs, data.targets), kind="mc", generator=torch.Generator().manual_seed(3)
    )
    assert_close(got.to_dense(), cf.make(key).update(data.rows).to_dense(), 1e-12)


def test_fit_refuses_no_data_and_a_single_pass_where_it_needs_two() -> None:
    data = case("mlp", "mse")
    for key in ("full", "ekfac"):
        with pytest.raises(ValueError, match="no batch"):
            cf.STRUCTURES[key].fit(data.model, data.loss, [])
    once = iter(batches(data, ((0, 2), (2, 4))))
    with pytest.raises(ValueError, match="over the data twice"):
        cf.EKFAC.fit(data.model, data.loss, once)
    assert cf.KFAC.fit(data.model, data.loss, iter(batches(data, ((0, 2), (2, 4))))).count == 12


@pytest.mark.parametrize("side", ["rows", "parameters"])
def test_response_and_lift_of_several_batches(side: str) -> None:
    """Rows of all batches are the state's on the row side; the last batch's on the parameter side."""
    data = case("mlp", "mse", N=6)
    rows, _ = rows_and_references(data)
    structure = cf.BlockDiagonal(side=side)
    for part in rows:
        structure.update(part, 1.0)
    whole, rho = merge(rows), 0.1
    dense = structure.to_dense() + rho * torch.eye(structure.space.size, dtype=DOUBLE)
    assert_close(structure.to_dense(), cf.BlockDiagonal().update(data.rows).to_dense())
    J = data.reference.rows_of_J()
    expected = J @ torch.linalg.solve(dense, J.T) / data.reference.count
    for jacobian in (whole.jacobian(), data.rows.jacobian()):
        assert_close(structure.response(jacobian, rho), expected)
    assert structure.rows.shape == (whole if side == "rows" else rows[-1]).shape
    c = draw(structure.rows.R)
    lifted = torch.linalg.solve(dense, structure.rows.dense().T @ c)
    assert_close(structure.space.flatten(structure.lift(c, rho)), lifted)


# --- running averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spec", PARAMETER_SPECS)
def test_a_running_average_is_its_formula(spec: str, reduction: str) -> None:
    data = case("cnn", "ce-weights", reduction, N=6)
    rows, references = rows_and_references(data)
    structure = build(spec, [])
    for part in rows:
        structure.update(part, 0.7)
    assert_close(structure.to_dense(), averaged(spec, data, references, [0.49, 0.7, 1.0]))
    counts = torch.tensor([ref.count for ref in references])
    expected = float((counts * torch.tensor([0.49, 0.7, 1.0])).sum() / 2.19) if reduction == "mean" else 1.0
    assert structure.count == pytest.approx(expected)
    structure.update(rows[0], 0.0)
    assert_close(structure.to_dense(), averaged(spec, data, references[:1], [1.0]))
    assert structure.count == pytest.approx(references[0].count)


@pytest.mark.parametrize("spec", PARAMETER_SPECS)
def test_small_batches_of_a_sum_add_up_within_a_running_average(spec: str) -> None:
    """Decay 1 within a step, less between steps: the average is over steps."""
    data = case("mlp", "mse", "sum", N=6)
    rows, references = rows_and_references(data)
    structure = build(spec, [])
    for part, decay in zip([*rows, rows[0]], [0.0, 1.0, 0.6, 1.0], strict=True):
        structure.update(part, decay)
    if spec.startswith("kfac"):
        return
    dense = [dense_structure(spec, ref, {}) for ref in references]
    expected = (0.6 * (dense[0] + dense[1]) + dense[2] + dense[0]) / 1.6
    assert_close(structure.to_dense(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("spec", ["full", "block-diagonal", "block-tridiagonal", "unit-wise"])
def test_a_window_keeps_the_last_batches_with_their_weights(spec: str, decay: float, reduction: str) -> None:
    data = case("mlp", "ce-weights", reduction, N=6)
    rows, references = rows_and_references(data)
    structure = build(spec, [], window=2)
    for part in rows:
        structure.update(part, decay)
    kept, weights = references[1:], [decay, 1.0]
    expected = averaged(spec, data, kept, weights)
    if reduction == "sum" and decay == 1:
        expected = expected * 2
    assert_close(structure.to_dense(), expected)
    rho = 0.3 * structure.largest_eigenvalue() + 1
    # The rows are the batches', each times √weight, however the loss is reduced.
    counts = [ref.count if reduction == "mean" else 1.0 for ref in kept]
    divisor = sum(w * n for w, n in zip(weights, counts, strict=True))
    divisor = 1.0 if reduction == "sum" and decay == 1 else divisor
    S = merge(rows[1:], weights).dense()
    if reduction == "sum":
        S = S / divisor**0.5
    assert_close(structure.rows.dense(), S)
    c = draw(len(S))
    lifted = torch.linalg.solve(expected + rho * torch.eye(len(expected), dtype=DOUBLE), S.T @ c)
    assert_close(structure.space.flatten(structure.lift(c, rho)), lifted)
    J = merge([part.jacobian() for part in rows[1:]])
    dense = J.dense() @ torch.linalg.solve(expected + rho * torch.eye(len(expected), dtype=DOUBLE), J.dense().T)
    assert_close(structure.response(J, rho) * structure.count, dense)
    groups = 1.0 if decay == 1 else sum(weights)
    mean_count = sum(w * n for w, n in zip(weights, counts, strict=True)) / groups
    assert structure.count == pytest.approx(1.0 if reduction == "sum" else mean_count)


def test_a_window_is_the_running_average_while_it_holds_all() -> None:
    for reduction in ("mean", "sum"):
        data = case("mlp", "ce-weights", reduction, N=6)
        rows, _ = rows_and_references(data)
        window, average = cf.Full(window=3), cf.Full(side="parameters")
        for part, decay in zip(rows, (0.0, 1.0, 0.8), strict=True):
            window.update(part, decay)
            average.update(part, decay)
        assert_close(window.to_dense(), average.to_dense())
        assert window.count == pytest.approx(average.count)


# --- sides ------------------------------------------------------------------------------------------------------------


def test_rows_move_to_the_parameter_side_when_they_outgrow_it() -> None:
    data = case("mlp", "mse", N=4)
    structure, reference_ = cf.BlockDiagonal(), cf.BlockDiagonal(side="parameters")
    held = []
    for seed in range(8):
        x, y = draw(2, 4, seed=seed), draw(2, 3, seed=seed + 100)
        rows = sqrt_fisher(data.model, data.loss, x, y)
        structure.update(rows, 1.0)
        reference_.update(rows, 1.0)
        held.append([block.keeps_rows for block in structure._blocks])
        assert_close(structure.to_dense(), reference_.to_dense())
        v = draw(structure.space.size)
        assert_close(structure.solve(v, 0.1), reference_.solve(v, 0.1))
        assert structure.count == reference_.count
    sizes = [block.size for block in structure._blocks]
    assert sizes == [25, 24, 15]
    assert held == [[6 * (k + 1) < size for size in sizes] for k in range(8)]


def test_a_running_average_takes_over_rows_that_came_before() -> None:
    """Rows that the parameter side outgrows are averaged, not dropped."""
    data = case("mlp", "mse", N=6)
    rows, references = rows_and_references(data, ((0, 1), (1, 6)))
    structure = cf.UnitWise()
    structure.update(rows[0])
    assert any(block.keeps_rows for block in structure._blocks)
    structure.update(rows[1], 0.5)
    assert not any(block.keeps_rows for block in structure._blocks)
    assert_close(structure.to_dense(), averaged("unit-wise", data, references, [0.5, 1.0]))


@pytest.mark.parametrize("key", ["full", "block-diagonal", "block-tridiagonal", "unit-wise"])
def test_rows_do_not_fade_and_the_error_states_the_other_side(key: str) -> None:
    data = case("mlp", "mse", N=2)
    structure = cf.make(key, side="rows").update(data.rows)
    before = structure.to_dense()
    side = {"full": "64 × 64", "block-diagonal": "25 × 25", "block-tridiagonal": "64 × 64", "unit-wise": "5 × 5"}[key]
    copies = r"\(5 of them, " if key == "unit-wise" else r"\("
    with pytest.raises(StateError, match=rf"decay 0 or 1, not 0.5.*window=k.*{side} {copies}.*GiB"):
        structure.update(data.rows, 0.5)
    assert_close(structure.to_dense(), before, 1e-15)
    assert structure.count == data.rows.count
    structure.update(data.rows, 1.0)
    assert_close(structure.to_dense(), before)


def test_batches_that_cannot_be_stacked_are_refused_before_anything_changes() -> None:
    data = case("sequence", "ce", N=4)
    short = sqrt_fisher(data.model, data.loss, data.inputs[:, :3], data.targets[:, :3])
    structure = cf.Full(side="rows").update(data.rows)
    with pytest.raises(ValueError, match=r"as many rows a sample.*side='parameters'"):
        structure.update(short, 1.0)
    assert_close(structure.to_dense(), data.reference.F)
    both = cf.Full(side="parameters").update(data.rows).update(short, 1.0)
    total = data.rows.terms + short.terms
    S, T = data.rows.dense(), short.dense()
    assert_close(both.to_dense(), (data.rows.terms * S.T @ S + short.terms * T.T @ T) / total)
    empirical = sqrt_fisher(data.model, data.loss, data.inputs, data.targets, "empirical")
    for target in (structure, both, cf.KFAC().update(data.rows)):
        with pytest.raises(ValueError, match="others: kind is 'empirical', and was 'exact'"):
            target.update(empirical, 1.0)
    assert structure.update(empirical, 0.0).rows.kind == "empirical"


# --- EKFAC ------------------------------------------------------------------------------------------------------------


def test_ekfac_reprojects_its_corrections_when_the_basis_turns() -> None:
    data = case("mlp", "mse", N=6)
    rows, references = rows_and_references(data, ((0, 3), (3, 6)))
    structure = cf.EKFAC().update(rows[0]).update(rows[1], 0.5)
    dense = structure.to_dense()
    weights = [0.5 * references[0].count, references[1].count]
    for k, layer in enumerate(references[0].layers):
        at = layer.at.flatten()
        block = dense[at[:, None], at[None, :]]
        F = [ref.F[at[:, None], at[None, :]] for ref in references]
        pairs = [ref.factors(ref.layers[k]) for ref in references]
        before = kronecker_block(layer, pairs[0][0], pairs[0][1], F[0])
        B = weights[0] * pairs[0][0] + weights[1] * pairs[1][0]
        A = 0.5 * pairs[0][1] + pairs[1][1]
        mixed = (weights[0] * before + weights[1] * F[1]) / sum(weights)
        assert_close(block, kronecker_block(layer, B, A, mixed), 1e-9)


def test_ekfac_fit_is_exact_where_updates_only_reproject() -> None:
    data = case("cnn", "ce", N=6)
    whole = cf.EKFAC().update(data.rows).to_dense()
    fitted = cf.EKFAC.fit(data.model, data.loss, batches(data))
    updated = cf.EKFAC()
    for x, y in batches(data):
        updated.update(rows_of(data.model, data.loss, x, y), 1.0)
    assert_close(fitted.to_dense(), whole, 1e-9)
    assert float((updated.to_dense() - whole).norm()) > 1e-3 * float(whole.norm())
    assert updated.trace() == pytest.approx(fitted.trace())
    again = fitted.update(data.rows, 0.5)
    assert again.trace() == pytest.approx(updated.trace())


# --- no weight at all -------------------------------------------------------------------------------------------------


WEIGHED = [
    key
    for key in (*PLAIN_SPECS, *(k for k, cls in cf.STRUCTURES.items() if cls.of_optimiser))
    if key != "adaptive-inverse"
]


@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")
@pytest.mark.parametrize("key", dict.fromkeys(WEIGHED))
def test_a_batch_without_weight_is_a_zero_matrix(key: str) -> None:
    data = case("mlp", "ce", N=4)
    loss = nn.CrossEntropyLoss(ignore_index=-1, reduction="sum")
    nothing = sqrt_fisher(data.model, loss, data.inputs, torch.full((4,), -1))
    something = sqrt_fisher(data.model, loss, data.inputs, data.targets)
    structure = cf.make(key).update(nothing)
    v = draw(structure.space.size)
    assert_close(structure.to_dense(), torch.zeros(len(v), len(v), dtype=DOUBLE))
    assert_close(structure.solve(v, 0.5), v / 0.5)
    assert_close(structure.solve(v, 0.0), torch.zeros_like(v))
    assert structure.logdet(0.0) == -torch.inf
    assert structure.largest_eigenvalue() == structure.trace() == 0
    expected = cf.make(key).update(something).to_dense()
    if structure.passes == 1:
        assert_close(structure.update(something, 1.0).to_dense(), expected)


def test_rows_may_change_their_samples_only() -> None:
    data, other = case("mlp", "mse"), case("cnn", "mse")
    structure = cf.Full().update(data.rows)
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match="other parameters"):
            structure.update(other.rows, decay)
