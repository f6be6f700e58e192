"""Different structures for different layers: the blocks are those of each structure, every verb acts on all of them."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from fisher_cases import case, draw
from oracle import DOUBLE
from torch import Tensor

import curvlab.fisher as cf
from curvlab.errors import PartitionError
from curvlab.fisher.row_block import RowBlock
from curvlab.optim import NaturalGradient
from curvlab.testing.oracle import assert_close

BY_KEY = {"norm": "block-diagonal", "table": "diagonal", "last": "ekfac", "mix": "kfac"}


def choices() -> dict[str, Any]:
    return {"*.norm": cf.BlockDiagonal(), "table": "diagonal", "last": "ekfac", "*": "kfac"}


def test_every_layer_is_in_its_structure() -> None:
    data = case("sequence", "ce")
    structure = cf.PerLayer(choices()).update(data.rows)
    expected = torch.zeros(data.rows.P, data.rows.P, dtype=DOUBLE)
    at = data.rows.space.unflatten(torch.arange(data.rows.P, dtype=DOUBLE)[None])
    for layer in data.rows.layers:
        own = layer.layout.join(at)[0].long()
        alone = cf.make(BY_KEY[layer.name]).update(data.rows).to_dense()
        expected[own[:, None], own] = alone[own[:, None], own]
    assert_close(structure.to_dense(), expected)
    rho, v, c = 0.1, draw(2, data.rows.P), draw(2, data.rows.R)
    inverse = torch.linalg.inv(expected + rho * torch.eye(len(expected), dtype=DOUBLE))
    assert_close(structure.solve(v, rho), v @ inverse)
    assert_close(structure.space.flatten(structure.lift(c, rho)), c @ data.rows.dense() @ inverse)
    J = data.rows.jacobian()
    assert_close(structure.response(J, rho), J.dense() @ inverse @ J.dense().T / data.rows.count)
    assert "kfac: mix" in repr(structure)
    assert "ekfac: last" in repr(structure)


def test_a_structure_that_couples_layers_couples_those_of_its_pattern() -> None:
    data = case("mlp", "ce")
    structure = cf.PerLayer({"[02]": cf.Full(), "*": "kfac"}).update(data.rows)
    S = torch.cat([layer.dense() for layer in data.rows.layers[:2]], dim=1)
    (coupled, _) = structure._blocks
    assert isinstance(coupled, RowBlock)
    assert_close(coupled.to_dense(), S.T @ S)


@pytest.mark.parametrize("mixed", [{"norm": "diagonal", "*": "ekfac"}, {"norm": "full", "last": "ekfac", "*": "kfac"}])
def test_a_fit_of_many_batches_is_that_of_one(mixed: dict[str, str]) -> None:
    """Layer by layer where all structures allow it; an EKFAC goes over the data twice, beside others, too."""
    data = case("sequence", "ce")
    model, loss, x, y = data.model, data.loss, data.inputs, data.targets
    expected = cf.PerLayer(mixed).update(data.rows).to_dense()
    for batches in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        assert_close(cf.PerLayer.fit(model, loss, batches, kind="exact", choices=mixed).to_dense(), expected)


def test_inverses_are_kept_as_long_as_each_structure_says() -> None:
    data, v = case("mlp", "ce"), draw(1, case("mlp", "ce").rows.P)
    lazy, plain = (cf.KFAC(factored_damping=True, invert_every=every) for every in (3, 1))
    structure = cf.PerLayer({"0": copy.deepcopy(lazy), "*": copy.deepcopy(plain)})
    for scale in (1.0, 2.0, 3.0, 4.0):
        rows = replace(data.rows, layers=tuple(layer.scale(scale) for layer in data.rows.layers))
        for updated in (structure, lazy, plain):
            updated.update(rows, 0.5)
        found = structure.space.unflatten(structure.solve(v, 0.1))
        for alone, names in ((lazy, ("0.weight", "0.bias")), (plain, ("2.weight", "4.bias"))):
            expected = alone.space.unflatten(alone.solve(v, 0.1))
            for name in names:
                assert_close(found[name], expected[name])


def test_states_are_kept() -> None:
    data = case("sequence", "ce")
    structure, other = cf.PerLayer(choices()).update(data.rows), cf.PerLayer(choices())
    other.load_state_dict(structure.state_dict())
    assert_close(other.to_dense(), structure.to_dense())


def test_training() -> None:
    data = case("sequence", "ce")
    model = copy.deepcopy(data.model)  # other tests share the case
    optimizer = NaturalGradient(model, data.loss, 0.1, structure=cf.PerLayer(choices()), damping=0.1, kl_clip=None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = data.loss(model(data.inputs), data.targets)
        loss.backward()
        return loss

    before = closure()
    for _ in range(20):
        optimizer.step(closure)
    assert closure() < before


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        (
            {"mix": "kfac", "last": "kfac", "table": "kfac"},
            "No pattern fits 'norm'; .*Add one for these layers, or '\\*'",
        ),
        ({"*": "kfac", "*.mix": "diagonal"}, "No layer is left for '\\*.mix': the layers are 'table', 'norm'"),
        ({"mixx": "kfac", "*": "diagonal"}, "No layer is left for 'mixx'"),
    ],
)
def test_every_layer_needs_a_pattern_and_every_pattern_a_layer(mixed: dict[str, str], message: str) -> None:
    data = case("sequence", "ce")
    with pytest.raises(PartitionError, match=message):
        cf.PerLayer(mixed).update(data.rows)
    with pytest.raises(PartitionError, match=message):
        cf.PerLayer.fit(data.model, data.loss, (data.inputs, data.targets), kind="exact", choices=mixed)


def test_what_is_no_choice_is_refused() -> None:
    data = case("mlp", "ce")
    with pytest.raises(ValueError, match="choices has no pattern"):
        cf.PerLayer({})
    with pytest.raises(ValueError, match="has a state already"):
        cf.PerLayer({"*": cf.KFAC().update(data.rows)})
    with pytest.raises(ValueError, match="windows"):
        cf.PerLayer({"0": cf.Full(window=2), "*": cf.Full()})
    with pytest.raises(ValueError, match="Did you mean 'kfac'"):
        cf.PerLayer({"*": "kfacc"})
