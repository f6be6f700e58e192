"""Products, restrictions and Kronecker moments of rows, each against the dense rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import CLASSES, architecture, chain, freeze, mlp, vectors
from torch import Tensor, nn

import curvlab.rows
from curvlab.fisher.moment import Moment
from curvlab.rows import products
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.parameters import Layout
from curvlab.rows.rows import Rows, gram
from curvlab.testing.oracle import assert_close, dense_jacobian

NAMES = ["mlp", "one-output", "leading-axes", "grid-vectors", "conv2d-groups", "conv1d-grid", "batchnorm2d"]
NAMES += ["layernorm-long", "embedding-padding", "attention", "bare", "tied", "reused", "frozen-weight", "oddities"]


def two(name: str) -> tuple[Rows, Rows, Tensor, Tensor]:
    """Return rows of 4 and of 3 samples of one model, and their dense references."""
    case = architecture(name)
    model, inputs = case.make(N=7)
    first, second = inputs[:4], inputs[4:]
    return (
        curvlab.rows.jacobian(model, first),
        curvlab.rows.jacobian(model, second),
        dense_jacobian(model, first),
        dense_jacobian(model, second),
    )


@pytest.mark.parametrize("name", NAMES)
def test_products(name: str) -> None:
    rows, other, J, K = two(name)
    assert_close(rows.gram(other), J @ K.T)
    assert_close(rows.gram(), J @ J.T)
    assert_close(rows.gram(rows), J @ J.T)
    block = torch.randn(2, rows.P, dtype=J.dtype)
    named = rows.space.unflatten(block)
    assert_close(rows.matvec(block), block @ J.T)
    assert_close(rows.matvec(named), block @ J.T)
    assert_close(rows.matvec(block[0]), J @ block[0])
    assert_close(rows.matvec({name: value[0] for name, value in named.items()}), J @ block[0])
    c = torch.randn(2, rows.R, dtype=J.dtype)
    assert_close(rows.space.flatten(rows.rmatvec(c)), c @ J)
    assert_close(rows.space.flatten(rows.rmatvec(c[0])), c[0] @ J)
    assert {k: v.shape for k, v in rows.rmatvec(c[0]).items()} == dict(rows.space.shapes)


@pytest.mark.parametrize("name", NAMES)
def test_layers(name: str) -> None:
    rows, other, _, _ = two(name)
    for layer, second in zip(rows.layers, other.layers, strict=True):
        dense = layer.dense()
        assert dense.shape == (layer.count, layer.size) == (rows.R, layer.layout.size)
        assert_close(layer.diagonal(), dense.square().sum(0))
        stack = layer.unit_stack()
        assert stack.shape == (layer.layout.units, layer.count, layer.layout.width)
        assert_close(stack.transpose(0, 1).reshape(layer.count, -1), dense)
        joined = layer.concatenate([second])
        V, N = layer.shape
        both = torch.cat([dense.view(V, N, -1), second.dense().view(V, second.shape[1], -1)], dim=1)
        assert_close(joined.dense(), both.flatten(0, 1))
        assert joined.select(slice(N, None)).same_as(second)
        assert_close(layer.select(slice(1, 3)).dense(), dense.view(V, N, -1)[:, 1:3].flatten(0, 1))
        assert_close(layer.scale(3.0).dense(), 3 * dense)
        assert_close(layer.map_rows(lambda rows: rows.flip(0)).dense(), dense.view(V, N, -1).flip(0).flatten(0, 1))
        assert layer.to(torch.float32).dtype == torch.float32
        assert layer.same_as(replace(layer))
        assert not layer.same_as(layer.map_rows(lambda rows: rows + 1))


@pytest.mark.parametrize("name", NAMES)
def test_restrict_keeps_the_columns_of_some_parameters(name: str) -> None:
    rows, _, J, _ = two(name)
    named = rows.space.unflatten(J)
    for layer in rows.layers:
        for parameter in layer.layout.names:
            kept = layer.restrict([parameter])
            assert kept.layout.names == (parameter,)
            assert_close(kept.layout.split(kept.dense())[parameter], named[parameter])
        assert_close(layer.restrict(layer.layout.names).dense(), layer.dense())


ROUTES: dict[str, Callable[[Any, Tensor, Any], None]] = {
    "formed": lambda left, out, right: left._add_formed_gram(out, right),
    "pairwise": lambda left, out, right: left._add_pairwise_gram(out, right),
    "dense": lambda left, out, right: left._add_dense_gram(out, right),
}


@pytest.mark.parametrize("elements", [products.CACHE_ELEMENTS, 50])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["leading-axes", "conv2d-groups", "conv1d-grid", "mlp", "embedding"])
def test_routes_of_the_gram_matrix(name: str, route: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(products, "CACHE_ELEMENTS", elements)
    rows, other, _, _ = two(name)
    for left, right in zip(rows.layers, other.layers, strict=True):
        if route == "formed" and isinstance(left, EmbeddingRows):
            continue
        for partner in (left, right, replace(left)):
            out = left.factors[-1].new_ones(left.count, partner.count)
            ROUTES[route](left, out, partner)
            if partner is left:
                products.mirror(out)
            assert_close(out, 1 + left.dense() @ partner.dense().T)


def random_kronecker(V: int, N: int, T: int, Q: int, O: int, I: int) -> KroneckerRows:  # noqa: E741
    layout = Layout.of(Q * O, {"weight": torch.Size([Q * O, I])})
    a, g = torch.randn(N, T, Q, I, dtype=torch.float64), torch.randn(V, N, T, Q, O, dtype=torch.float64)
    return KroneckerRows("layer", layout, a, g)


@pytest.mark.parametrize(("T", "width", "route"), [(3, 40, "_add_pairwise_gram"), (40, 3, "_add_formed_gram")])
def test_the_cheaper_route_is_taken(T: int, width: int, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_add_pairwise_gram", "_add_formed_gram"):
        method = getattr(KroneckerRows, name)

        def note(self: KroneckerRows, out: Tensor, other: KroneckerRows, name: str = name, run: Any = method) -> None:
            taken.append(name)
            run(self, out, other)

        monkeypatch.setattr(KroneckerRows, name, note)
    rows = random_kronecker(4, 5, T, 1, 6, width)
    assert_close(gram([rows], [rows]), rows.dense() @ rows.dense().T)
    assert taken == [route]


def test_embedding_takes_the_cheaper_route(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    pairwise = EmbeddingRows._add_pairwise_gram

    def note(self: EmbeddingRows, out: Tensor, other: EmbeddingRows) -> None:
        taken.append(self.name)
        pairwise(self, out, other)

    monkeypatch.setattr(EmbeddingRows, "_add_pairwise_gram", note)
    for vocabulary in (3, 500):
        layout = Layout.of(vocabulary, {"table": torch.Size([vocabulary, 2])})
        index, g = torch.randint(vocabulary, (4, 6)), torch.randn(3, 4, 6, 2, dtype=torch.float64)
        rows = EmbeddingRows(f"vocabulary {vocabulary}", layout, index, g)
        assert_close(gram([rows], [rows]), rows.dense() @ rows.dense().T)
    assert taken == ["vocabulary 500"]


@pytest.mark.parametrize("elements", [products.CHUNK_ELEMENTS, 5000])
@pytest.mark.parametrize(("V", "N"), [(1, 1), (1, 700), (2, 300), (3, 200), (4, 33), (5, 120), (40, 20), (300, 1)])
def test_symmetric_products_visit_every_pair_once(
    V: int, N: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", elements)
    rows = random_kronecker(V, N, 1, 2, 3, 4)
    dense = rows.dense()
    G = gram([rows], [rows])
    assert_close(G, dense @ dense.T)
    assert torch.equal(G, G.T)
    covered = torch.zeros(V, N, V, N, dtype=torch.int64)
    for pair in products.triangle(V, N):
        for left, right in products.within_memory(*pair):
            covered[left + right] += 1
            assert covered[left + right].numel() <= max(elements, V * N)
    R = V * N
    covered = covered.view(R, R)
    assert int(covered.max()) == 1
    assert bool(((covered + covered.T) > 0).all())
    assert int(covered.sum()) <= R * (R + 2 * products.STRIP) / 2


@pytest.mark.parametrize("weighted", [True, False])
def test_rows_that_all_samples_share_are_multiplied_once(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.randn(5, 1, 3, dtype=torch.float64).expand(5, 90, 3)
    own = torch.randn(5, 90, 3, dtype=torch.float64)
    weight = torch.randn(90, 90, dtype=torch.float64)
    weight = weight + weight.T if weighted else torch.ones_like(weight)
    for left, right in [(shared, shared), (shared, own), (own, shared)]:
        out = torch.ones(450, 450, dtype=torch.float64)
        symmetric = left is right
        products.add_product(out, left, right, weight if weighted else None, symmetric=symmetric)
        if symmetric:
            products.mirror(out)
        flat = left.reshape(450, 3) @ right.reshape(450, 3).T
        assert_close(out, 1 + flat * weight.repeat(5, 5))


@pytest.mark.parametrize("size", [1, 128, 300])
def test_mirror_completes_either_triangle_of_every_matrix(size: int) -> None:
    x = torch.randn(2, size, size, dtype=torch.float64)
    upper, lower = x.clone(), x.clone()
    products.mirror(upper)
    products.mirror(lower.mT)
    assert torch.equal(upper, x.triu() + x.triu(1).mT)
    assert torch.equal(lower, x.tril() + x.tril(-1).mT)


def test_a_layer_that_two_row_sets_share_is_complete() -> None:
    shared, one, two_ = (random_kronecker(6, 100, 1, 1, 2, 3) for _ in range(3))
    expected = shared.dense() @ shared.dense().T + one.dense() @ two_.dense().T
    assert_close(gram([shared, one], [shared, two_]), expected)


def test_rows_of_different_kinds_multiply() -> None:
    model, x = architecture("leading-axes").make()
    rows = curvlab.rows.jacobian(model, x)
    formed = [
        DenseRows(layer.name, layer.layout, layer.dense().view(*layer.shape, layer.layout.units, -1))
        for layer in rows.layers
    ]
    assert_close(gram(rows.layers, formed), rows.gram())
    assert_close(gram(formed, rows.layers), rows.gram())
    model, index = architecture("embedding").make()
    layer = curvlab.rows.jacobian(model, index).layers[0]
    dense = DenseRows(layer.name, layer.layout, layer.dense().view(*layer.shape, layer.layout.units, -1))
    assert_close(gram([layer], [dense]), layer.dense() @ layer.dense().T)


@pytest.mark.parametrize("reduce", [False, True])
def test_kronecker_moments(reduce: bool) -> None:
    rows = random_kronecker(2, 3, 4, 2, 3, 5)
    weights = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    A, B = torch.zeros(2, 5, 5, dtype=torch.float64), torch.zeros(2, 3, 3, dtype=torch.float64)
    for q in range(2):
        for n in range(3):
            a = rows.a[n, :, q]
            vectors_in = [a.mean(0)] if reduce else list(a)
            A[q] += weights[n] * sum(torch.outer(u, u) for u in vectors_in) / len(vectors_in)
            for v in range(2):
                g = rows.g[v, n, :, q]
                for u in [g.sum(0)] if reduce else list(g):
                    B[q] += torch.outer(u, u)
    (X, scale), Y = rows.input_root(weights, reduce=reduce), rows.output_root(reduce=reduce)
    assert_close(scale * torch.einsum("qmti,qmtj->qij", X, X), A)
    assert_close(torch.einsum("qmti,qmtj->qij", Y, Y), B)
    (X, scale), (Z, one) = (
        rows.input_root(w, reduce=reduce) for w in (torch.full((3,), 0.7), torch.tensor([0.7, 0.7, 0.8]))
    )
    assert X.shape == Z.shape
    assert (scale != 1, one) == (True, 1.0), "equal weights take no pass over the inputs"


def test_embedding_moments() -> None:
    model, index = architecture("embedding-padding").make(N=3)
    rows = curvlab.rows.jacobian(model, index).layers[0]
    assert isinstance(rows, EmbeddingRows)
    weights = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    expected = torch.zeros(5, dtype=torch.float64)
    for n in range(3):
        for u in index[n].tolist():
            expected[u] += weights[n] / 4
    assert_close(rows.frequency(weights), expected)
    root = rows.output_root()
    assert_close(torch.einsum("mti,mtj->ij", root, root), torch.einsum("vnti,vntj->ij", rows.g, rows.g))


def test_diagonals_moments_and_units_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 10)
    monkeypatch.setattr(products, "CACHE_ELEMENTS", 10)
    for name in ("conv2d", "conv2d-groups", "embedding", "layernorm"):
        rows, _, J, _ = two(name)
        diagonal: dict[str, Tensor] = {}
        for layer in rows.layers:
            diagonal.update(layer.layout.split(layer.diagonal()))
            units = layer.dense().view(layer.count, layer.layout.units, -1).transpose(0, 1)
            assert_close(layer.unit_stack(), units)
            if isinstance(layer, KroneckerRows):
                moment = Moment(None)
                moment.update(layer.output_root(reduce=False), 2.0, 0.0)
                assert_close(moment.dense(), torch.einsum("vntqo,vntqp->qop", layer.g, layer.g) / 2)
        assert_close(rows.space.flatten(diagonal), J.square().sum(0))


def test_conversion_keeps_everything_together() -> None:
    model, x = architecture("mlp").make()
    y = torch.tensor([0, 1, 2, 0])
    rows = curvlab.rows.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)
    single = rows.to(torch.float32)
    assert single.dtype == single.jacobian().dtype == single.sample_weights.dtype == torch.float32
    assert_close(single.dense().double(), rows.dense(), 1e-6)
    assert (single.count, single.terms, single.kind, single.shape) == (rows.count, rows.terms, rows.kind, rows.shape)
    assert rows.device == torch.device("cpu")


def test_index_layers_survive_conversion() -> None:
    model, index = architecture("embedding").make()
    rows = curvlab.rows.jacobian(model, index)
    assert_close(rows.to(torch.float32).dense().double(), rows.dense(), 1e-6)
    assert not rows.to(torch.float32).layers[0].factors[0].is_floating_point()


def test_repr_names_what_matters() -> None:
    model, x = architecture("mlp").make()
    rows = curvlab.rows.sqrt_fisher(model, nn.MSELoss(), x, torch.zeros(4, CLASSES, dtype=torch.float64))
    text = "Rows(kind='exact', per='term', P=43, count=12, terms=12, V=3, N=4, dtype=torch.float64; layers 0, 2)"
    assert repr(rows) == text


class TestParameterSpace:
    def rows(self) -> Rows:
        return curvlab.rows.jacobian(freeze(mlp(), "0.bias").double(), vectors(4)(2))

    def test_flat_vectors_of_the_wrong_length(self) -> None:
        rows = self.rows()
        with pytest.raises(ValueError, match=r"needs 38 entries .* got 43"):
            rows.matvec(torch.zeros(43, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"\[P\] or \[K, P\], got shape \(1, 1, 38\)"):
            rows.matvec(torch.zeros(1, 1, 38, dtype=torch.float64))

    def test_names(self) -> None:
        rows = self.rows()
        vector = rows.space.unflatten(torch.zeros(38, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"Unknown parameter '0\.weigth'. Did you mean '0\.weight'\?"):
            rows.matvec({**vector, "0.weigth": vector["0.weight"]})
        del vector["2.bias"]
        with pytest.raises(ValueError, match=r"lacks the parameters 2\.bias"):
            rows.matvec(vector)

    def test_shapes(self) -> None:
        rows = self.rows()
        vector = rows.space.unflatten(torch.zeros(38, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"'2\.bias' has shape \(3,\), got \(4,\)"):
            rows.matvec({**vector, "2.bias": torch.zeros(4, dtype=torch.float64)})
        with pytest.raises(ValueError, match="one leading axis common to all"):
            rows.matvec({**vector, "2.bias": torch.zeros(2, 3, dtype=torch.float64)})
        with pytest.raises(ValueError, match="one leading axis common to all"):
            rows.matvec({name: value[None, None] for name, value in vector.items()})

    def test_coefficients_of_the_wrong_length(self) -> None:
        rows = self.rows()
        with pytest.raises(ValueError, match=r"\[R\] or \[K, R\] with R = 6, got \(5,\)"):
            rows.rmatvec(torch.zeros(5, dtype=torch.float64))

    def test_a_single_scalar_parameter(self) -> None:
        class Scale(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return self.factor * x

        x = vectors(2)(3)
        rows = curvlab.rows.jacobian(Scale(), x)
        assert_close(rows.dense(), x.T.reshape(-1, 1))
        assert_close(rows.matvec({"factor": torch.tensor(3.0, dtype=x.dtype)}), 3 * x.T.flatten())
        assert rows.matvec({"factor": torch.ones(2, dtype=x.dtype)}).shape == (2, 6)
        assert rows.rmatvec(torch.ones(6, dtype=x.dtype))["factor"].shape == ()
        assert rows.space.unflatten(torch.ones(1))["factor"].shape == ()
        assert rows.layers[0].layout.split(torch.ones(1))["factor"].shape == ()
        assert rows.rmatvec(torch.ones(2, 6, dtype=x.dtype))["factor"].shape == (2,)


def test_wide_output_layers_are_formed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ELEMENTS", 200)
    model, x = chain(nn.Conv1d(2, 9, 2), nn.Flatten()).double(), vectors(2, 30)(2)
    rows = curvlab.rows.jacobian(model, x)
    J = dense_jacobian(model, x)
    assert_close(rows.gram(), J @ J.T)
    layer: LayerRows = rows.layers[0]
    assert_close(layer.diagonal(), layer.dense().square().sum(0))
