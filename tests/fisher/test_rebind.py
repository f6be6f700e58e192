"""Structures of networks that grow: what goes on, what starts anew."""

import copy
from dataclasses import replace

import pytest
import torch
from fisher_cases import draw
from fisher_oracle import PLAIN_SPECS, build
from oracle import DOUBLE
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.errors import StateError
from curvlab.rows import Rows, sqrt_fisher
from curvlab.rows.parameters import ParameterSpace
from curvlab.testing.oracle import assert_close, dense_ggn, dense_jacobian, outputs

LOSS = nn.CrossEntropyLoss()
AVERAGES = (
    "kfac",
    "ekfac",
    "diagonal",
    "block-diagonal-parameters",
    "unit-wise-parameters",
    "component-wise-parameters",
    "partial-traces",
    "output-side",
    "rank-one",
    "partial-traces-diagonal",
    "input-side",
)


def perceptron(hidden: int) -> nn.Sequential:
    torch.manual_seed(hidden)
    layers = [nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def rows_of(model: nn.Module, seed: int, N: int = 12) -> Rows:
    return sqrt_fisher(model, LOSS, draw(N, 4, seed=seed), torch.arange(N) % 3)


def of_layer(rows: Rows, name: str) -> Rows:
    """Return the rows of a network of which nothing but one layer is trained."""
    layer = next(layer for layer in rows.layers if layer.name == name)
    shapes = {parameter: rows.space.shapes[parameter] for parameter in layer.layout.names}
    return replace(rows, layers=(layer,), space=ParameterSpace(shapes), _jacobian=None)


def part(structure: cf.Structure, name: str) -> Tensor:
    """Return the block of a layer."""
    index = structure.space.unflatten(torch.arange(float(structure.space.size), dtype=DOUBLE))
    at = torch.cat([index[f"{name}.{kind}"].flatten() for kind in ("weight", "bias")]).long()
    return structure.to_dense()[at[:, None], at]


@pytest.mark.parametrize("spec", AVERAGES)
def test_averages_of_layers_that_kept_their_shapes_go_on(spec: str) -> None:
    before, after = rows_of(perceptron(6), 1), rows_of(perceptron(8), 2)
    structure = build(spec, []).update(before).rebind(after).update(after, 0.5)
    fresh = build(spec, []).update(after)
    for name in ("0", "2"):
        assert_close(part(structure, name), part(fresh, name))
    alone = build(spec, []).update(of_layer(before, "4")).update(of_layer(after, "4"), 0.5)
    assert_close(part(structure, "4"), part(alone, "4"))
    assert float((part(structure, "4") - part(fresh, "4")).norm()) > 1e-3 * float(part(fresh, "4").norm())
    v = draw(structure.space.size)
    damped = structure.to_dense() + 0.1 * torch.eye(len(v), dtype=DOUBLE)
    assert_close(structure.solve(v, 0.1), torch.linalg.solve(damped, v), 1e-9)


@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_a_structure_bound_anew_and_updated_is_that_of_the_grown_network(spec: str) -> None:
    before, after = rows_of(perceptron(6), 1, N=2), rows_of(perceptron(8), 2, N=2)
    structure = build(spec, []).update(before).rebind(after).update(after)
    fresh, v, c = build(spec, []).update(after), draw(after.P), draw(after.R)
    assert_close(structure.to_dense(), fresh.to_dense())
    rho = 1.5 * structure.largest_eigenvalue()
    assert_close(structure.solve(v, rho), fresh.solve(v, rho))
    assert_close(structure.space.flatten(structure.lift(c, rho)), fresh.space.flatten(fresh.lift(c, rho)))
    restored = build(spec, [])
    restored.load_state_dict(copy.deepcopy(structure.state_dict()))
    assert torch.equal(restored.solve(v, rho), structure.solve(v, rho))


def test_layers_are_known_by_the_names_that_are_given() -> None:
    """A layer that moves up keeps its average, and another that takes its name and shape does not get it."""
    before = rows_of(model := perceptron(5), 1)
    torch.manual_seed(0)
    grown = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 5).double(), nn.Tanh(), *model[2:])
    after = rows_of(grown, 2)
    names = {
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in (("0", "0"), ("2", "4"), ("4", "6"))
        for kind in ("weight", "bias")
    }
    structure = cf.KFAC().update(before).rebind(after, names).update(after, 0.5)
    fresh = cf.KFAC().update(after)
    assert_close(part(structure, "2"), part(fresh, "2"))
    first = cf.KFAC().update(of_layer(before, "0")).update(of_layer(after, "0"), 0.5)
    assert_close(part(structure, "0"), part(first, "0"))
    for name in ("4", "6"):
        assert float((part(structure, name) - part(fresh, name)).norm()) > 1e-3 * float(part(fresh, name).norm())


def test_there_is_no_matrix_until_all_blocks_have_curvature() -> None:
    before, after = rows_of(perceptron(6), 1), rows_of(perceptron(8), 2)
    structure = cf.KFAC().update(before).rebind(after)
    assert not structure.updated
    v = draw(after.P)
    for verb in (
        lambda: structure.matvec(v), lambda: structure.solve(v, 0.1), structure.trace, structure.to_dense,
        structure.state_dict, lambda: structure.rows, structure.eigvalsh,
    ):  # fmt: skip
        with pytest.raises(StateError, match=r"Since rebind, there is no curvature of 0, 2: call update\(rows\)"):
            verb()
    with pytest.raises(ValueError, match="others: kind is 'empirical', and was 'exact'"):
        structure.update(sqrt_fisher(perceptron(8), LOSS, draw(3, 4), torch.arange(3), "empirical"), 0.5)
    same = cf.Diagonal().update(before)
    expected = same.to_dense()
    assert_close(same.rebind(before).to_dense(), expected)
    assert cf.KFAC().rebind(after).updated is False


def dense_mean(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the Fisher matrix of the mean cross-entropy over batches."""
    inputs, targets = map(torch.cat, zip(*batches, strict=True))
    return dense_ggn(dense_jacobian(model, inputs), LOSS, outputs(model, inputs), targets)


def test_at_decay_1_rows_averages_and_count_are_those_of_all_their_batches() -> None:
    """Layers that have grown keep rows, those of the batches since; the last one's average and the count are of all."""
    before, after = perceptron(30), perceptron(40)
    batches = [(draw(N, 4, seed=N), torch.arange(N) % 3) for N in (12, 7, 9)]
    rows = [sqrt_fisher(model, LOSS, *batch) for model, batch in zip((before, after, after), batches, strict=True)]
    structure = cf.BlockDiagonal().update(rows[0]).rebind(rows[1])
    seen = [structure.update(more, 1.0).count for more in rows[1:]]
    assert [block.keeps_rows for block in structure._blocks] == [True, True, False]
    assert seen == [19, 28]
    since = dense_mean(after, batches[1:])
    at = {name: part(structure, name) for name in ("0", "2", "4")}
    sizes = [len(block) for block in at.values()]
    blocks = [since[start : start + n, start : start + n] for start, n in zip((0, 200, 405), sizes, strict=True)]
    last = (12 * dense_mean(before, batches[:1])[-18:, -18:] + 16 * blocks[2]) / 28
    for found, expected in zip(at.values(), (*blocks[:2], last), strict=True):
        assert_close(found, expected)
    restored = cf.BlockDiagonal()
    restored.load_state_dict(structure.state_dict())
    assert restored.update(rows[1], 1.0).count == 35


@pytest.mark.parametrize("key", ["full", "kfac", "diagonal"])
def test_where_no_layer_has_kept_its_shape_the_count_starts_anew(key: str) -> None:
    before, after = (
        sqrt_fisher(nn.Linear(4, 3).double(), LOSS, draw(5, 4), torch.arange(5) % 3),
        rows_of(perceptron(6), 1),
    )
    structure = cf.make(key).update(before).rebind(after).update(after, 1.0)
    assert structure.count == 12
    assert_close(structure.to_dense(), cf.make(key).update(after).to_dense())
