"""Batches, decays, windows, sides and saved states: what a structure's state is after several updates."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from fisher_cases import Case, case, draw, rows_of
from fisher_oracle import (
    PLAIN_SPECS,
    SPECS,
    Reference,
    build,
    dense_structure,
    kronecker_block,
    positions,
    reference,
    sigma_of,
)
from oracle import DOUBLE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab.fisher as cf
from curvlab.errors import StateError
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.testing.oracle import assert_close

CUTS = ((0, 1), (1, 4), (4, 6))
PARAMETER_SPECS = (
    "full-parameters",
    "block-diagonal-parameters",
    "block-tridiagonal-parameters",
    "unit-wise-parameters",
    "component-wise-parameters",
    "diagonal",
    "kfac",
    "kfac-reduce",
)
"""Specs that take any decay."""


def batches(data: Case, cuts: Sequence[tuple[int, int]] = CUTS) -> list[tuple[Tensor, Tensor]]:
    return [(data.inputs[a:b], data.targets[a:b]) for a, b in cuts]


@cache
def rows_and_references(data: Case, cuts: Sequence[tuple[int, int]] = CUTS) -> tuple[list[Rows], list[Reference]]:
    pairs = batches(data, cuts)
    return (
        [rows_of(data.model, data.loss, x, y, data.kind) for x, y in pairs],
        [reference(data.model, data.loss, x, y, data.kind) for x, y in pairs],
    )


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
        with pytest.raises(ValueError, match="kind 'empirical' cannot be added to a state of kind 'exact'"):
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


# --- saved states -----------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("network", "spec"),
    [*(("cnn", spec) for spec in (*SPECS, "full-window")), ("sequence", "kfac"), ("sequence", "ekfac")],
)
def test_a_saved_state_continues_bit_for_bit(spec: str, network: str) -> None:
    data = case(network, "mse", N=6)
    rows, _ = rows_and_references(data)
    names = list(positions(data.model))
    decay = 0.5 if spec in (*PARAMETER_SPECS, "ekfac", "full-window") else 1.0

    def fresh() -> cf.Structure:
        return cf.Full(window=2) if spec == "full-window" else build(spec, names)

    structure = fresh().update(rows[0]).update(rows[1], decay)
    restored = fresh()
    restored.load_state_dict(through_a_file(structure.state_dict()))
    assert repr(restored) == repr(structure)
    structure.forget_batch()
    for _ in range(2):
        assert torch.equal(restored.to_dense(), structure.to_dense())
        v = draw(structure.space.size)
        assert torch.equal(restored.solve(v, "rel:0.1"), structure.solve(v, "rel:0.1"))
        if any(block.keeps_rows for block in structure._blocks):
            c = draw(structure.rows.R)
            lifted, expected = restored.lift(c, 0.1), structure.lift(c, 0.1)
            assert all(torch.equal(lifted[name], value) for name, value in expected.items())
        J = rows[1].jacobian()
        assert torch.equal(restored.response(J, 0.1), structure.response(J, 0.1))
        assert restored.count == structure.count
        assert restored.trace() == structure.trace()
        for target in (structure, restored):
            target.update(rows[2], decay)


def stored(saved: Any) -> int:
    """Return the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.tell()


@pytest.mark.parametrize("spec", [*PARAMETER_SPECS, "ekfac"])
def test_averages_store_nothing_of_the_batches(spec: str) -> None:
    """A state made of 4000 samples takes no more memory than one of 40, in checkpoints, pickles and copies."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    checkpoints, pickles = [], []
    for N in (40, 4000):
        structure = build(spec, []).update(sqrt_fisher(model, nn.MSELoss(), draw(N, 4), draw(N, 3)))
        checkpoints.append(stored(structure.state_dict()))
        pickles.append(len(pickle.dumps(structure)))
        with pytest.raises(StateError, match=r"keeps no rows.*solve\(S\.rmatvec\(coefficients\), damping\)"):
            _ = copy.deepcopy(structure).rows
    assert checkpoints[1] < checkpoints[0] + 500
    assert pickles[1] < pickles[0] + 500


def test_a_fitted_average_keeps_no_rows_and_a_row_side_keeps_all() -> None:
    data = case("mlp", "mse", N=6)
    kfac = cf.KFAC.fit(data.model, data.loss, batches(data))
    with pytest.raises(StateError, match="its last batch is forgotten"):
        kfac.lift(draw(6), 0.1)
    full = cf.Full.fit(data.model, data.loss, batches(data), side="rows")
    assert full.rows.R == 18
    assert_close(
        full.space.flatten(full.lift(draw(18), 0.1)), full.solve(full.space.flatten(full.rows.rmatvec(draw(18))), 0.1)
    )


def test_reading_changes_nothing() -> None:
    data = case("mlp", "mse", N=6)
    rows, _ = rows_and_references(data)
    structure = cf.BlockDiagonal(side="rows")
    for part in rows:
        structure.update(part, 1.0)
    before = {name: value for name, value in vars(structure).items() if name != "_blocks"}
    assert structure.rows is structure.rows
    assert structure.count == 18
    assert repr(structure)
    assert all(vars(structure)[name] is value for name, value in before.items())
    assert all(block.layers for block in structure._blocks)


def test_a_saved_state_is_not_touched_by_later_updates() -> None:
    data = case("mlp", "mse", N=6)
    rows, _ = rows_and_references(data)
    for spec in ("full-parameters", "unit-wise", "kfac", "ekfac", "diagonal"):
        structure = build(spec, []).update(rows[0])
        state, before = structure.state_dict(), structure.to_dense()
        structure.update(rows[1], 1.0).update(rows[2], 1.0)
        restored = build(spec, [])
        restored.load_state_dict(state)
        assert torch.equal(restored.to_dense(), before)


def test_states_of_other_structures_and_configurations_are_refused() -> None:
    data = case("cnn", "mse")
    state = cf.BlockDiagonal().update(data.rows).state_dict()
    with pytest.raises(ValueError, match="state of a 'block-diagonal' structure, not of 'full'"):
        cf.Full().load_state_dict(state)
    other = cf.BlockDiagonal(partition=[list(positions(data.model))]).update(data.rows)
    before = other.to_dense()
    with pytest.raises(ValueError, match="but this configuration makes"):
        other.load_state_dict(state)
    assert torch.equal(other.to_dense(), before)
    with pytest.raises(ValueError, match=r"DiagonalBlock.*RowBlock|RowBlock.*DiagonalBlock"):
        cf.KFAC(max_block=0).load_state_dict(cf.KFAC().update(data.rows).state_dict())


# --- no weight at all -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")
@pytest.mark.parametrize("key", PLAIN_SPECS)
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
    if key != "ekfac":
        assert_close(structure.update(something, 1.0).to_dense(), expected)


def test_rows_may_change_their_samples_only() -> None:
    data, other = case("mlp", "mse"), case("cnn", "mse")
    structure = cf.Full().update(data.rows)
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match="other parameters"):
            structure.update(other.rows, decay)


class TestCopies:
    """Pickles and deep copies, at every stage, go on as the original does and leave it alone."""

    COPIES: tuple[Callable[[cf.Structure], cf.Structure], ...] = (
        copy.deepcopy,
        lambda made: pickle.loads(pickle.dumps(made)),
    )

    def check(self, made: cf.Structure) -> None:
        data = case("mlp", "ce-all")
        fresh = [copied(made) for copied in self.COPIES]
        v = made.update(data.rows).matvec(draw(data.reference.P))
        for rho in (0.1, 0.0, 0.01):
            unused = [copied(made) for copied in self.COPIES]
            expected = made.solve(v, rho)
            used = [copied(made) for copied in self.COPIES]
            for other in (*unused, *used, *(one.update(data.rows) for one in fresh)):
                assert torch.equal(other.solve(v, rho), expected)
            fresh = []

    @pytest.mark.parametrize("spec", SPECS)
    def test_every_structure(self, spec: str) -> None:
        self.check(build(spec, list(positions(case("mlp", "ce-all").model))))

    @pytest.mark.parametrize("given", [False, True])
    @pytest.mark.parametrize("side", ["rows", "parameters"])
    def test_every_sigma(self, side: str, *, given: bool) -> None:
        groups = len(cf.LayerWise().update(case("mlp", "ce-all").rows).rows.layers)
        self.check(cf.LayerWise(sigma_of(groups).tolist() if given else None, side=side))
