"""Saved states, pickles and copies of structures: what they hold, and that they go on as the original does."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fisher_cases import batches, case, draw, rows_and_references
from fisher_oracle import OPTIMISERS, PARAMETER_SPECS, SPECS, build, positions, sigma_of
from torch import nn

import curvlab.fisher as cf
from curvlab.errors import StateError
from curvlab.rows import sqrt_fisher
from curvlab.testing.oracle import assert_close


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("network", "spec"),
    [
        *(("cnn", spec) for spec in (*SPECS, *OPTIMISERS, "full-window")),
        *(("sequence", spec) for spec in ("kfac", "ekfac", "partial-traces", "partial-traces-diagonal")),
    ],
)
def test_a_saved_state_continues_bit_for_bit(spec: str, network: str) -> None:
    data = case(network, "mse", N=6)
    rows, _ = rows_and_references(data)
    names = list(positions(data.model))
    decay = 0.5 if spec in (*PARAMETER_SPECS, *OPTIMISERS, "ekfac", "full-window") else 1.0

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


@pytest.mark.parametrize("spec", [*PARAMETER_SPECS, *OPTIMISERS, "ekfac"])
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
    with pytest.raises(ValueError, match=r"DiagonalBlock.*LastingBlock|LastingBlock.*DiagonalBlock"):
        cf.KFAC(max_block=0).load_state_dict(cf.KFAC().update(data.rows).state_dict())


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
