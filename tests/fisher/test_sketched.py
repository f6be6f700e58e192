"""Low rank blocks with sketched products: against dense matrices, on average over selections, and what a selection depends on."""

import copy
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from fisher_cases import Case, batches, case, draw
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab.errors import StateError
from curvlab.fisher import BlockDiagonal, Sketched
from curvlab.fisher.sketch import Sketch
from curvlab.fisher.sketched import separate_product
from curvlab.rows import Rows, sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.testing import check_structure
from curvlab.testing.oracle import assert_close

NETWORKS = ("mlp", "cnn", "sequence")
LOSSES = {"mlp": "ce", "cnn": "mse", "sequence": "ce-all"}
FORMED, FACTORED = {"sketch": 3, "threshold": 10_000}, {"sketch": 2, "threshold": 0}
SKETCHES = {
    "formed": FORMED,
    "factored": FACTORED,
    "published scaling": {**FACTORED, "scaling": "published"},
    "truncated": {"sketch": None, "threshold": 0, "rank": 1},
    "truncated and selected": {**FACTORED, "rank": 1},
}


class Tied(nn.Module):
    """A table that is the weight of the output layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens))).mT


def tied_rows() -> Rows:
    x = torch.tensor([[0, 1, 1], [4, 2, 0]])
    return sqrt_fisher(Tied().double(), nn.CrossEntropyLoss(), x, x.flip(1))


def data_of(network: str, kind: str = "exact") -> Case:
    return case(network, LOSSES[network], kind=kind)


def layer_parts(structure: Sketched | BlockDiagonal, named: Any) -> list[Tensor]:
    """Return a vector's pieces by layer, flat."""
    return [block.join(named) for block in structure._blocks]


def weights(structure: Sketched) -> Tensor:
    """Return the diagonal of W, flat, from the entries that were drawn."""
    named: dict[str, Tensor] = {}
    for block in structure._blocks:
        (layer,) = block.of(structure.rows)
        selection = getattr(block.root, "selection", None)
        block.put(
            torch.ones(1, block.size, dtype=DOUBLE) if selection is None else selection.diagonal(layer)[None], named
        )
    return structure.space.flatten(named)[0]


# --- entries of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [*NETWORKS, "tied"])
def test_entries_of_rows_are_those_of_the_formed_rows(network: str) -> None:
    rows = tied_rows() if network == "tied" else data_of(network).rows
    for layer in rows.layers:
        per_group, width = layer.layout.units // layer.groups, layer.layout.width
        units = torch.arange(per_group)[1 - per_group % 2 :: 2]
        columns = torch.arange(width)[width // 3 :]
        formed = layer.dense().view(layer.count, layer.groups, per_group, width)
        expected = formed[:, :, units][..., columns].flatten(1)
        part = layer.at(units, columns)
        assert type(part) is type(layer)
        assert_close(part.dense(), expected, 1e-14)
        out = torch.zeros(layer.count, layer.count, dtype=DOUBLE)
        part.add_gram(out, part)
        assert_close(out.triu(), (expected @ expected.T).triu(), 1e-12)
        v = draw(2, part.size)
        assert_close(part.matvec(v), v @ expected.T, 1e-12)
        index = torch.tensor([layer.size - 1, 0])
        assert_close(layer.entries(index).dense(), layer.dense()[:, index], 1e-14)


@pytest.mark.parametrize("network", ["cnn", "sequence"])
def test_truncated_rows_are_the_nearest_in_the_output_gradients(network: str) -> None:
    for layer in data_of(network).rows.layers:
        if not isinstance(layer, KroneckerRows) or layer.positions == 1:
            continue
        for rank in (1, 2, 100):
            expected = []
            for v in range(layer.shape[0]):
                for n in range(layer.shape[1]):
                    groups = []
                    for q in range(layer.groups):
                        u, s, w = torch.linalg.svd(layer.g[v, n, :, q])
                        k = min(rank, len(s))
                        groups.append(((u[:, :k] * s[:k]) @ w[:k]).T @ layer.a[n, :, q])
                    expected.append(torch.stack(groups).flatten())
            assert_close(layer.truncated(rank).dense(), torch.stack(expected), 1e-12)


# --- claims of Yang et al. 2022 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_with_all_entries_it_is_block_diagonal_on_the_row_side(network: str, kind: str) -> None:
    data = data_of(network, kind)
    plain = BlockDiagonal(side="rows").update(data.rows)
    v = draw(2, data.reference.P)
    for options in ({}, {"sketch": None, "threshold": 0}):
        structure = Sketched(**options).update(data.rows)
        assert_close(structure.to_dense(), plain.to_dense(), 1e-12)
        assert_close(structure.solve(v, 0.1), plain.solve(v, 0.1), 1e-12)
        J = data.rows.jacobian() if kind == "exact" else data.separate
        assert_close(structure.response(J, 0.1), plain.response(J, 0.1), 1e-12)


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_direction_is_a_dense_solve_and_stays_in_the_span_of_the_rows_if_the_gradient_does(network: str) -> None:
    """Claims 1 and 2."""
    data, rho = data_of(network, "empirical"), 0.3
    structure = Sketched().update(data.rows)
    inside = data.rows.rmatvec(torch.ones(1, data.rows.R, dtype=DOUBLE))
    outside = structure.space.unflatten(draw(1, data.reference.P))
    for gradient, spans in ((inside, True), (outside, False)):
        step = structure.solve(gradient, rho)
        for block, g, d in zip(
            structure._blocks, layer_parts(structure, gradient), layer_parts(structure, step), strict=True
        ):
            X = block.of(data.rows)[0].dense()
            F = X.T @ X
            assert_close(block.system.matrix[0], X @ X.T, 1e-10)
            assert_close(d[0], torch.linalg.solve(F + rho * torch.eye(len(F), dtype=DOUBLE), g[0]), 1e-10)
            missed = d[0] - torch.linalg.pinv(X) @ (X @ d[0])
            if len(X) < block.size:
                assert (float(missed.norm()) < 1e-10 * float(d.norm())) is spans
    c = torch.ones(data.rows.R, dtype=DOUBLE)
    assert_close(
        structure.space.flatten(structure.lift(c, rho)), structure.space.flatten(structure.solve(inside, rho))[0]
    )


@pytest.mark.parametrize("form", [FORMED, FACTORED], ids=["formed", "factored"])
@pytest.mark.parametrize("scaling", ["unbiased", "published"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_sketched_products_are_those_of_all_entries_on_average(
    network: str, scaling: str, form: dict[str, Any]
) -> None:
    """Claim 3: the published scaling multiplies both with n/q."""
    selections = 400
    layer = data_of(network).rows.layers[0 if network == "mlp" else 1]
    sketch = Sketch(form["sketch"], form["threshold"], scaling)  # type: ignore[arg-type]
    X, x = layer.dense(), draw(layer.size)
    n, q = layer.size, sketch.selected(layer)
    assert q < n
    factor = 1.0 if scaling == "unbiased" else n / q
    grams, products = [], []
    for k in range(selections):
        selection = sketch.select(layer, sketch.generator("a layer", k))
        seen = selection.of(layer).dense()[0]
        assert seen.shape[1] == len(set(selection.index.tolist())) == q
        grams.append(selection.weight * seen @ seen.T)
        products.append(selection.weight * seen @ x[selection.index])
    for found, expected in ((grams, X @ X.T), (products, X @ x)):
        values = torch.stack(found)
        error = float((values.mean(0) - factor * expected).norm())
        spread = float((values - values.mean(0)).square().sum().sqrt()) / selections
        assert error < 4 * spread
        assert spread < 0.2 * factor * float(expected.norm())


@pytest.mark.parametrize("form", [FORMED, FACTORED], ids=["formed", "factored"])
def test_the_published_scaling_is_another_damping_of_the_small_system(form: dict[str, Any]) -> None:
    """Claim 3, traps: ρq/n inside, ρ outside."""
    data, rho = data_of("cnn"), 0.4
    published, unbiased = (Sketched(**form, scaling=s).update(data.rows) for s in ("published", "unbiased"))  # type: ignore[arg-type]
    v = draw(2, data.reference.P)
    named = published.space.unflatten(v)
    for block, other in zip(published._blocks, unbiased._blocks, strict=True):
        share = block.cut.sketch.selected(block.layers[0]) / block.size
        x = block.join(named)
        assert_close(block.solve(x, rho)[0], share * other.solve(x, rho * share)[0], 1e-10)


def test_large_damping_is_gradient_descent_and_so_is_what_the_rows_do_not_span() -> None:
    """Claim 5."""
    data = data_of("mlp", "empirical")
    v = draw(1, data.reference.P)
    for options in ({}, FACTORED):
        structure = Sketched(**options).update(data.rows)
        rho = 1e9 * structure.largest_eigenvalue()
        assert_close(rho * structure.solve(v, rho), v, 1e-8)
    structure = Sketched().update(data.rows)
    named = structure.space.unflatten(v)
    for block, x in zip(structure._blocks, layer_parts(structure, named), strict=True):
        X = block.layers[0].dense()
        free = x - x @ torch.linalg.pinv(X) @ X
        for rho in (0.01, 2.0):
            assert_close(block.solve(free, rho)[0], free / rho, 1e-10)


def test_stale_curvature_shrinks_a_later_gradient_along_singular_vectors() -> None:
    """Claim 6."""
    data, rho = data_of("cnn", "empirical"), 0.05
    structure = Sketched().update(data.rows)
    later = structure.space.unflatten(draw(1, data.reference.P, seed=5))
    for block, g in zip(structure._blocks, layer_parts(structure, later), strict=True):
        _, s, u = torch.linalg.svd(block.layers[0].dense(), full_matrices=False)
        along = g @ u.T
        expected = (g - along @ u + (along * rho / (rho + s.square())) @ u) / rho
        assert_close(block.solve(g, rho)[0], expected, 1e-10)


# --- what the verbs speak of ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", SKETCHES.values(), ids=SKETCHES)
def test_every_verb_is_that_of_f_w(options: dict[str, Any], network: str, kind: str) -> None:
    data = data_of(network, kind)
    structure = Sketched(**options).update(data.rows)
    P, dense, W = data.reference.P, structure.to_dense(), weights(structure)
    identity, v, rho = torch.eye(P, dtype=DOUBLE), draw(2, P), 0.2
    if "rank" not in options:
        exact = BlockDiagonal(side="rows").update(data.rows).to_dense()
        assert_close(dense, exact * W, 1e-10)
        assert ((W == 0).any() and (W > 1).any()) or network == "sequence"
    inverse = torch.linalg.inv(dense + rho * identity)

    assert_close(structure.matvec(v), v @ dense.T, 1e-10)
    solved = structure.solve(v, rho)
    assert_close(solved, v @ inverse.T, 1e-9)
    assert_close(structure.solve(structure.matvec(v) + rho * v, rho), v, 1e-9)
    assert_close(structure.solve(v, rho, power=2.0), v @ (inverse @ inverse).T, 1e-8)
    values = torch.linalg.eigvals(dense)
    assert float(values.imag.abs().max()) < 1e-6 * float(values.real.max())
    assert_close(structure.eigvalsh(), values.real.sort().values, 1e-7)
    root = W.sqrt()
    if "rank" not in options:
        assert_close(structure.eigvalsh(), torch.linalg.eigvalsh(root[:, None] * exact * root), 1e-9)
    assert structure.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
    assert structure.logdet(rho) == pytest.approx(
        float(torch.linalg.slogdet(dense + rho * identity).logabsdet), rel=1e-9
    )
    c = draw(2, data.rows.R)
    assert_close(structure.space.flatten(structure.lift(c, rho)), c @ data.rows.dense() @ inverse.T, 1e-9)
    J, (elsewhere, other) = data.reference.rows_of_J(), data.elsewhere
    count = structure.count
    assert_close(structure.response(data.separate, rho), J @ inverse @ J.T / count, 1e-9)
    assert_close(structure.response(data.separate, rho, test=elsewhere), other @ inverse @ J.T / count, 1e-9)
    if kind == "exact":
        assert_close(structure.response(data.rows.jacobian(), rho), J @ inverse @ J.T / count, 1e-9)


def test_undamped_solves_are_inverses_on_the_range() -> None:
    data = data_of("mlp", "empirical")
    structure = Sketched(**FORMED).update(data.rows)
    v = structure.matvec(draw(2, data.reference.P))
    solution, info = structure.solve(v, 0.0, info=True)
    assert_close(structure.matvec(solution), v, 1e-9)
    assert float(info.outside.max()) < 1e-6
    c = draw(data.rows.R)
    lifted = structure.space.flatten(structure.lift(c, 0.0))
    assert_close(lifted, structure.solve(structure.space.flatten(data.rows.rmatvec(c)), 0.0), 1e-9)


def test_ranks_that_leave_nothing_out_are_exact() -> None:
    data = data_of("cnn")
    exact = BlockDiagonal().update(data.rows)
    structure = Sketched(sketch=None, threshold=0, rank=3).update(data.rows)
    assert any(layer.positions > 3 for layer in data.rows.layers if isinstance(layer, KroneckerRows))
    assert_close(structure.to_dense(), exact.to_dense(), 1e-10)
    v = draw(1, data.reference.P)
    assert_close(structure.solve(v, 0.1), exact.solve(v, 0.1), 1e-8)


# --- the published product --------------------------------------------------------------------------------------------


def _combined(layer: LayerRows, c: Tensor) -> Tensor:
    """Return the authors' product, term by term."""
    assert isinstance(layer, KroneckerRows)
    (V, N), c = layer.shape, c.view(layer.shape)
    pairs = [(v, n) for v in range(V) for n in range(N)]
    G = sum(c[v, n].abs().sqrt() * layer.g[v, n] for v, n in pairs)
    A = sum(c[v, n] * layer.a[n] for v, n in pairs) / c.abs().sqrt().sum()
    return torch.einsum("tqo,tqi->qoi", G, A).flatten()


def test_the_published_product_is_its_formula_and_exact_where_all_output_gradients_are_alike() -> None:
    data, rho = data_of("cnn"), 0.1
    structure = Sketched(sketch=None, threshold=0, product="published").update(data.rows)
    v = structure.space.unflatten(draw(1, data.reference.P))
    errors = []
    for block, x in zip(structure._blocks, layer_parts(structure, v), strict=True):
        layer = block.layers[0]
        X = layer.dense()
        b = torch.linalg.solve(X @ X.T + rho * torch.eye(len(X), dtype=DOUBLE), X @ x[0])
        exact = b @ X
        if not isinstance(layer, KroneckerRows):
            assert_close(block.solve(x, rho)[0][0], (x[0] - exact) / rho, 1e-9)
            continue
        assert_close(block.solve(x, rho)[0][0], (x[0] - _combined(layer, b)) / rho, 1e-9)
        assert_close(block.solve(-x, rho)[0], -block.solve(x, rho)[0], 1e-12)
        c = draw(2, layer.count)
        assert_close(separate_product(layer, c)[1], _combined(layer, c[1]), 1e-12)
        errors.append(float((separate_product(layer, c) - layer.rmatvec(c)).norm() / layer.rmatvec(c).norm()))
        alike = KroneckerRows(layer.name, layer.layout, layer.a, layer.g[:1, :1].expand_as(layer.g))
        assert_close(separate_product(alike, c), alike.rmatvec(c), 1e-12)
        one = layer.map_rows(lambda g: g[:1]).select(slice(1))
        assert_close(separate_product(one, c[:, :1]), one.rmatvec(c[:, :1]), 1e-12)
        assert not separate_product(layer, torch.zeros_like(c)).any()
        c = draw(1, layer.count)
        assert_close(block.lift(c, (layer,), 0.0), c @ torch.linalg.pinv(X).T, 1e-6)
    assert min(errors) > 0.5  # it is no product of these rows
    assert_close(
        structure.matvec(structure.space.flatten(v)),
        BlockDiagonal().update(data.rows).matvec(structure.space.flatten(v)),
    )


# --- selections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FORMED, FACTORED], ids=["formed", "factored"])
def test_a_selection_depends_on_the_seed_and_on_how_often_the_state_was_replaced(options: dict[str, Any]) -> None:
    data = data_of("mlp")
    first, again, other = (Sketched(**options, seed=seed).update(data.rows) for seed in (0, 0, 1))
    W = weights(first)
    assert_close(weights(again), W)
    assert (weights(other) != W).any()
    stored = Sketched(**options)
    stored.load_state_dict(first.update(data.rows).state_dict())
    assert (weights(first) != W).any()
    for same in (stored, copy.deepcopy(first)):
        assert_close(same.to_dense(), first.to_dense())
        assert_close(
            same.update(data.rows).to_dense(),
            Sketched(**options).update(data.rows).update(data.rows).update(data.rows).to_dense(),
        )
    halves = Sketched(**options).update(data.rows)
    before = weights(halves)
    assert_close(weights(halves.update(data.rows, 1.0)), before)
    window = Sketched(**options, window=2).update(data.rows)
    assert (weights(window.update(data.rows, 0.5)) != before).any()


@pytest.mark.parametrize("options", [FORMED, FACTORED], ids=["formed", "factored"])
def test_a_fit_on_batches_is_a_fit_on_all(options: dict[str, Any]) -> None:
    data = case("cnn", "ce-all", N=6)
    whole = Sketched.fit(data.model, data.loss, (data.inputs, data.targets), **options)
    cut = Sketched.fit(data.model, data.loss, batches(data), **options)
    v = draw(2, data.reference.P)
    assert_close(cut.to_dense(), whole.to_dense(), 1e-9)
    assert_close(cut.solve(v, 0.1), whole.solve(v, 0.1), 1e-9)


def test_large_layers_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of("sequence")

    sizes = {layer.name: layer.size for layer in data.rows.layers if not isinstance(layer, DenseRows)}

    def watched(self: LayerRows, form: Callable[[LayerRows], Tensor]) -> Tensor:
        assert self.size < sizes[self.name], "all entries of the rows are formed"
        return form(self)

    for kind in {type(layer) for layer in data.rows.layers if layer.name in sizes}:
        monkeypatch.setattr(kind, "dense", partialmethod(watched, kind.dense))
    structure = Sketched(**FACTORED, rank=1).update(data.rows)
    structure.solve(draw(structure.space.size), 0.1)
    with pytest.raises(AssertionError, match="are formed"):
        Sketched(**FORMED).update(data.rows).solve(draw(structure.space.size), 0.1)


# --- errors, precision ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_options_are_checked() -> None:
    for options, message in (
        ({"sketch": 0}, r"sketch is a whole number ≥ 1, got 0"),
        ({"threshold": -1}, r"threshold is a whole number ≥ 0, got -1"),
        ({"rank": 0}, r"rank is a whole number ≥ 1, got 0"),
        ({"scaling": "publish"}, r"Unknown scaling 'publish'\. Did you mean 'published'"),
        ({"product": "exactly"}, r"Unknown product 'exactly'\. Did you mean 'exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            Sketched(**options)
    structure = Sketched().update(data_of("mlp").rows)
    with pytest.raises(StateError, match=r"Set window=k to keep the last k batches\.$"):
        structure.update(data_of("mlp").rows, 0.5)


def test_float32_is_near_float64() -> None:
    data = data_of("cnn")
    for options in SKETCHES.values():
        wide, narrow = Sketched(**options).update(data.rows), Sketched(**options).update(data.rows.to(torch.float32))
        v = draw(2, data.reference.P)
        assert_close(narrow.solve(v.float(), 0.1).double(), wide.solve(v, 0.1), 1e-3)
        assert narrow.solve(v.float(), 0.1).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"sketch": None, "threshold": 0, "window": 2}])
def test_the_unsketched_structure_keeps_the_promises_of_all(options: dict[str, Any]) -> None:
    check_structure(Sketched, **options)
