"""K-FAC and EKFAC: damping on the factors, what is not factored, and which layers are."""

from dataclasses import replace

import pytest
import torch
from fisher_cases import case, draw, rows_of
from fisher_oracle import build, dense_structure, positions, reference
from oracle import DOUBLE, architecture, loss_case
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.fisher import moment
from curvlab.fisher.factors import LinearBlock
from curvlab.fisher.lasting import LastingBlock
from curvlab.fisher.moment import Moment, inverses
from curvlab.nn import HalfSquaredError, Scaled
from curvlab.rows import Rows, jacobian, sqrt_fisher
from curvlab.testing.oracle import assert_close, outputs


def factored_inverse(network: str, sharing: str, rho: float) -> Tensor:
    """Return `(B + √ρ/π)⁻¹ ⊗ (A + √ρ·π)⁻¹`, and exact blocks damped as they are."""
    ref = case(network, "mse").reference
    inverse = torch.zeros(ref.P, ref.P, dtype=DOUBLE)
    for layer in ref.layers:
        at = layer.at.flatten()
        if layer.a is None:
            block = torch.linalg.inv(ref.F[at[:, None], at[None, :]] + rho * torch.eye(len(at), dtype=DOUBLE))
        else:
            B, A = ref.factors(layer, sharing)
            A = A / ref.omega.sum()
            units, width = (A, B) if layer.table else (B, A)
            parts = []
            for left, right in zip(units, width, strict=True):
                pi = ((right.trace() / len(right)) / (left.trace() / len(left))).sqrt()
                damped = [
                    m + rho**0.5 * split * torch.eye(len(m), dtype=DOUBLE) for m, split in ((left, 1 / pi), (right, pi))
                ]
                parts.append(torch.kron(*(torch.linalg.inv(m).contiguous() for m in damped)))
            block = torch.block_diag(*parts)
        inverse[at[:, None], at[None, :]] = block
    return inverse


def test_damping_is_split_where_a_loss_has_all_but_vanished() -> None:
    """The ratio of the factors' mean eigenvalues, 10³⁹ here, is beyond single precision; its root is not."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
    loss, v = Scaled(HalfSquaredError(), 1e-39), torch.randn(15)
    found = cf.KFAC(factored_damping=True).update(sqrt_fisher(model, loss, x, y)).solve(v, 1e-3)
    rows = sqrt_fisher(model.double(), loss, x.double(), y.double())
    expected = cf.KFAC(factored_damping=True).update(rows).solve(v.double(), 1e-3)
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "sequence"])
def test_factored_damping(network: str, sharing: str) -> None:
    data, rho = case(network, "mse"), 0.05
    structure = cf.KFAC(factored_damping=True, sharing=sharing).update(data.rows)
    inverse = factored_inverse(network, sharing, rho)
    v, c = draw(2, len(inverse)), draw(data.rows.R)
    assert_close(structure.solve(v, rho), v @ inverse)
    assert_close(structure.space.flatten(structure.lift(c, rho)), inverse @ data.rows.dense().T @ c)
    J, (elsewhere, other), count = data.reference.rows_of_J(), data.elsewhere, data.reference.count
    assert_close(structure.response(data.rows.jacobian(), rho), J @ inverse @ J.T / count)
    assert_close(structure.response(data.separate, rho, test=elsewhere), other @ inverse @ J.T / count)
    assert_close(structure.response(elsewhere, rho), other @ inverse @ other.T / count)
    plain = cf.KFAC(sharing=sharing).update(data.rows)
    assert_close(structure.to_dense(), plain.to_dense())
    assert_close(structure.solve(v, 0.0), plain.solve(v, 0.0), 1e-13 * plain.condition_number())


def test_factored_damping_of_a_zero_factor_is_plain() -> None:
    """Where a factor is zero, π is 1 and the damped block is ρI."""
    data = case("mlp", "ce")
    loss = nn.CrossEntropyLoss(ignore_index=-1, reduction="sum")
    rows = sqrt_fisher(data.model, loss, data.inputs, torch.full((4,), -1))
    v = draw(data.reference.P)
    assert_close(cf.KFAC(factored_damping=True).update(rows).solve(v, 0.25), v / 0.25)


@pytest.mark.parametrize(
    "name",
    [
        "frozen-weight",
        "frozen-bias",
        "frozen-first",
        "ntk",
        "conv1d-stride",
        "conv2d-uneven",
        "conv2d-groups",
        "conv2d-circular",
        "leading-axes",
        "attention",
        "residual",
        "one-output",
    ],
)
def test_every_kind_of_layer(name: str) -> None:
    model, inputs = architecture(name).make(3)
    if name == "attention":
        model.embedding.padding_idx = None
    loss, targets = loss_case("mse").make(outputs(model, inputs), "mean")
    rows, ref = rows_of(model, loss, inputs, targets), reference(model, loss, inputs, targets)
    for spec in ("block-diagonal", "unit-wise", "kfac", "kfac-reduce", "ekfac"):
        assert_close(build(spec, []).update(rows).to_dense(), dense_structure(spec, ref, {}), 1e-9)


def test_layers_without_factors_keep_exact_blocks_up_to_a_size_and_the_repr_names_them() -> None:
    data = case("cnn", "mse")
    exact, cut = cf.KFAC(max_block=4).update(data.rows), cf.KFAC(max_block=3).update(data.rows)
    names = list(positions(data.model))
    assert_close(cut.to_dense(), dense_structure("kfac-no-exact", data.reference, positions(data.model)))
    assert "exact blocks: gain; diagonal: norm.weight, norm.bias)" in repr(exact)
    assert "diagonal: gain, norm.weight, norm.bias)" in repr(cut)
    assert repr(cf.EKFAC().update(data.rows)).endswith("exact blocks: gain, norm.weight, norm.bias)")
    at = positions(data.model)["gain"]
    assert_close(exact.to_dense()[at[:, None], at], data.reference.F[at[:, None], at])
    assert repr(cf.KFAC(sharing="reduce")) == "KFAC(sharing='reduce'; not updated yet)"
    assert "P=" + str(data.rows.P) in repr(exact)
    assert len(names) == 7


def test_factors_are_kept_on_their_smaller_side() -> None:
    """Few samples keep roots `[n, d]`, many the moment `[d, d]`, and both are the same matrix."""
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    pieces = [sqrt_fisher(model, HalfSquaredError(), draw(4, 20, seed=s), draw(4, 2)) for s in range(6)]
    structure = cf.KFAC()
    for count, rows in enumerate(pieces, start=1):
        structure.update(rows, 1.0)
        first = structure._blocks[0]
        assert (first.width.root is not None) == (4 * count < 21)
        assert (first.units.root is not None) == (8 * count < 12)
    x = torch.cat([draw(4, 20, seed=s) for s in range(6)])
    whole = cf.KFAC().update(sqrt_fisher(model, HalfSquaredError(), x, draw(24, 2)))
    assert_close(structure.to_dense(), whole.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("rho", [10.0, 1e-2, 1e-6, 1e-14])
@pytest.mark.parametrize("rows", [1, 4, 10])
def test_inverses_of_factors_kept_as_roots(rows: int, rho: float, dtype: torch.dtype) -> None:
    """Two groups, one of them zero, at any condition number."""
    moment, X = Moment(None), draw(2, rows, 1, 11) * torch.tensor([1.0, 0.0], dtype=DOUBLE)[:, None, None, None]
    moment.update(X.to(dtype), 3.0, 0.0, scale=0.5)
    assert moment.root is not None
    damping = torch.tensor([rho, 2 * rho], dtype=DOUBLE)
    (inverse,) = inverses([(moment, damping.to(dtype))], 1)
    found = inverse.dense()
    # An inverse of the dense sum would lose the digits of small ρ.
    _, singular, V = torch.linalg.svd(X[:, :, 0] / 6**0.5, full_matrices=False)
    shrunk = singular.square() / (singular.square() + damping[:, None])
    exact = (torch.eye(11, dtype=DOUBLE) - (V.mT * shrunk[:, None]) @ V) / damping[:, None, None]
    error = (found.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert float(error.max()) < 1000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("uses", [1, 100])
def test_factors_of_one_width_are_inverted_beside_singular_ones(uses: int) -> None:
    """Factors of 258 to 264 columns share memory's width; one has no Cholesky factor, and the others keep theirs."""
    wanted = []
    for d, rho, rank in ((258, 0.1, 300), (261, 1e-17, 40), (258, 0.2, 300), (264, 0.3, 300)):
        moment = Moment(None)
        root = draw(1, 300, 1, min(rank, d), seed=d)
        moment.update(root if rank > d else root @ draw(rank, d, seed=d + 1), 300.0, 0.0)
        wanted.append((moment, torch.tensor([rho], dtype=DOUBLE)))
    kinds = []
    for (moment, rho), inverse in zip(wanted, inverses(wanted, uses), strict=True):
        (alone,) = inverses([(moment, rho)], uses)
        assert_close(inverse.dense(), alone.dense())
        if rho > 1e-9:
            M = moment.dense()[0]
            assert_close(inverse.dense()[0], torch.linalg.inv(M + rho * torch.eye(len(M), dtype=DOUBLE)))
        kinds.append(type(inverse).__name__)
    assert kinds == ["CholeskyInverse", "MatrixInverse", "CholeskyInverse", "CholeskyInverse"]


def test_eigenvectors_where_single_precision_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.linalg.eigh

    def only_in_double_precision(matrix: Tensor) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("The algorithm failed to converge.")  # type: ignore[attr-defined]
        return found(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_in_double_precision)
    moment = Moment(None)
    moment.update(draw(1, 20, 1, 7).float(), 20.0, 0.0)
    basis = moment.basis
    assert basis.vectors is not None
    assert basis.values.dtype == basis.vectors.dtype == torch.float32
    torch.testing.assert_close(basis.back(basis.values[..., None] * basis.vectors.mT), moment.dense())


@pytest.mark.parametrize("key", ["kfac", "ekfac"])
@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_wide_layers_never_leave_the_span_of_their_rows(key: str, rho: float) -> None:
    """More units than rows: the factored inverse against the dense one."""
    model = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 2)).double()
    x, y = draw(3, 9), draw(3, 2)
    rows, ref = sqrt_fisher(model, HalfSquaredError(), x, y), reference(model, HalfSquaredError(), x, y)
    structure = cf.make(key).update(rows)
    if rho:
        inverse = torch.linalg.inv(dense_structure(key, ref, {}) + rho * torch.eye(ref.P, dtype=DOUBLE))
    elif key == "kfac":
        inverse = ref.kronecker(undamped_inverse=True)
    else:
        inverse = torch.linalg.pinv(dense_structure(key, ref, {}), rtol=1e-13, hermitian=True)
    tolerance = 1e-10 if rho else 1e-12 * structure.condition_number()
    J, c = ref.rows_of_J(), draw(rows.R)
    assert_close(structure.response(rows.jacobian(), rho), J @ inverse @ J.T / 3, tolerance)
    assert_close(structure.space.flatten(structure.lift(c, rho)), inverse @ rows.dense().T @ c, tolerance)
    other = jacobian(model, draw(4, 9, seed=5))
    K = other.dense()
    assert_close(structure.response(other, rho), K @ inverse @ K.T / 3, tolerance)


def test_rank_tolerance_cuts_factors() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 1e-3], dtype=DOUBLE))
    rows = sqrt_fisher(model, HalfSquaredError(), x, draw(2, 1))
    v = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    for make in (cf.KFAC, cf.EKFAC, cf.Full, cf.UnitWise, cf.Diagonal):
        assert_close(make(rtol=1e-9).update(rows).solve(v, 0.0), torch.tensor([2.0, 2e6], dtype=DOUBLE))
        with pytest.warns(UserWarning, match="outside the range"):
            solution = make(rtol=1e-5).update(rows).solve(v, 0.0)
        assert_close(solution, torch.tensor([2.0, 0.0], dtype=DOUBLE))
        assert make(rtol=1e-5).update(rows).eigvalsh().count_nonzero() == 1


def test_wide_layers_in_padded_memory() -> None:
    """Factors of 521 and 300 columns, done in strips and inverted in wider memory, are what they are without."""
    samples, rho = 640, 0.03
    model = nn.Linear(520, 300).double()
    x, y = draw(samples, 520), draw(samples, 300)
    generator = torch.Generator().manual_seed(0)

    def rows_of_some(k: slice) -> Rows:
        return sqrt_fisher(model, HalfSquaredError(), x[k], y[k], kind="mc", generator=generator)

    rows = rows_of_some(slice(None))
    for parts in ([rows], [rows_of_some(k) for k in (slice(0, 600), slice(600, None))]):
        structure = cf.KFAC(factored_damping=True)
        for k, part in enumerate(parts):
            structure.update(part, decay=float(k > 0))
        a = torch.cat([x, torch.ones(samples, 1, dtype=DOUBLE)], dim=1)
        g = torch.cat([part.layers[0].factors[-1][0, :, 0, 0] * part.count**0.5 for part in parts])
        A, B = a.T @ a / samples, g.T @ g / samples
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        left = torch.linalg.inv(B + rho**0.5 / pi * torch.eye(len(B), dtype=DOUBLE))
        right = torch.linalg.inv(A + rho**0.5 * pi * torch.eye(len(A), dtype=DOUBLE))
        gradient = {name: draw(*p.shape) for name, p in model.named_parameters()}
        joined = torch.cat([gradient["weight"], gradient["bias"][:, None]], dim=1)
        found = structure.direction(gradient, rho)
        assert_close(torch.cat([found["weight"], found["bias"][:, None]], dim=1), left @ joined @ right)
    few = rows.layers[0].select(slice(0, 40))
    direction = structure.direction(few.layout.split(few.total()), rho, lambda _: few)
    expected = left @ few.dense().sum(0).view(300, 521) @ right
    assert_close(torch.cat([direction["weight"], direction["bias"][:, None]], dim=1), expected)


def basis_of(factor: Tensor) -> Tensor:
    return torch.linalg.eigh(factor).eigenvectors.contiguous()


def with_long_sides(network: str, max_factor: int, *, corrected: bool = False) -> Tensor:
    """Return the matrix with factors of more than so many rows replaced by their diagonals."""
    ref = case(network, "mse").reference
    matrix = ref.kronecker(corrected=corrected)
    for layer in ref.layers:
        if layer.a is None or layer.table:
            continue
        at = layer.at.flatten()
        B, A = ref.factors(layer)
        pairs = [
            [m.diagonal().diag() if len(m) > max_factor else m for m in pair]
            for pair in zip(B, A / ref.omega.sum(), strict=True)
        ]
        block = torch.block_diag(*(torch.kron(left.contiguous(), right.contiguous()) for left, right in pairs))
        if corrected:
            U = torch.block_diag(*(torch.kron(*(basis_of(m) for m in pair)) for pair in pairs))
            block = U @ (U.T @ ref.F[at[:, None], at[None, :]] @ U).diagonal().diag() @ U.T
        matrix[at[:, None], at[None, :]] = block
    return matrix


@pytest.mark.parametrize("max_factor", [1, 4])
@pytest.mark.parametrize("network", ["mlp", "cnn", "sequence"])
def test_factors_with_many_rows_are_diagonal(network: str, max_factor: int) -> None:
    data, rho = case(network, "mse"), 0.05
    structure = cf.KFAC(max_factor=max_factor).update(data.rows)
    expected = with_long_sides(network, max_factor)
    assert_close(structure.to_dense(), expected)
    v, c = draw(2, len(expected)), draw(data.rows.R)
    damped = expected + rho * torch.eye(len(expected), dtype=DOUBLE)
    assert_close(structure.solve(v, rho), torch.linalg.solve(damped, v.T).T)
    S, J = data.rows.dense(), data.reference.rows_of_J()
    assert_close(structure.space.flatten(structure.lift(c, rho)), torch.linalg.solve(damped, S.T @ c))
    assert_close(
        structure.response(data.rows.jacobian(), rho), J @ torch.linalg.solve(damped, J.T) / data.reference.count
    )
    names = [b.name for b in structure._blocks if isinstance(b, LinearBlock) and b.diagonal_sides]
    assert names or max_factor == 4
    assert not names or f"diagonal factors: {names[0]} (" in repr(structure)
    restored = cf.KFAC(max_factor=max_factor)
    restored.load_state_dict(structure.state_dict())
    assert torch.equal(restored.to_dense(), structure.to_dense())


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_basis_of_factors_with_many_rows_is_the_units(network: str) -> None:
    data = case(network, "mse")
    structure = cf.EKFAC(max_factor=4).update(data.rows)
    assert_close(structure.to_dense(), with_long_sides(network, 4, corrected=True), 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_factors_with_many_rows_add_up(reduction: str) -> None:
    model, x = architecture("mlp").make(6)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    parts = [(x[n], y[n]) for n in (slice(0, 1), slice(1, 6))]
    whole, cut = (cf.KFAC.fit(model, loss, data, max_factor=3).to_dense() for data in ((x, y), parts))
    assert_close(cut, whole)


def test_the_longest_side_of_a_factor_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match="max_factor is a number of rows ≥ 1, got 0"):
        cf.KFAC(max_factor=0)


@pytest.mark.parametrize("rank", [300, 40])
def test_long_roots_in_single_precision_are_decomposed_by_their_squares(rank: int) -> None:
    """Values and span agree with a singular value decomposition in double precision, to single precision."""
    torch.manual_seed(0)
    root = torch.randn(300, rank) @ torch.diag(torch.logspace(0, -2, rank)) @ torch.randn(rank, 400)
    moment = Moment(None)
    moment.update(root[None, :, None], 2.0, 0.0)
    assert moment.root is not None
    basis, exact = moment.basis, torch.linalg.svd(root.double(), full_matrices=False)
    assert basis.vectors is not None
    r = basis.values.shape[1]
    assert rank - 2 <= r <= rank
    V, wanted = basis.vectors[0].double(), exact.Vh[:r].mT
    assert_close(basis.values[0].double().flip(0), exact.S[:r].square() / 2, 1e-5)
    assert_close(V.mT @ V, torch.eye(r, dtype=DOUBLE), 1e-5)
    assert_close(V @ V.mT, wanted @ wanted.mT, 1e-4)
    assert not basis.null.any()


def test_a_long_root_of_zeros_has_null_directions_only() -> None:
    """As where a softmax is saturated, so that every draw is what the model predicts."""
    moment = Moment(None)
    moment.update(torch.zeros(1, 300, 1, 400), 2.0, 0.0)
    assert moment.root is not None
    assert moment.basis.null.all()
    assert not moment.basis.values.any()


def test_factorisations_of_exact_blocks_last_as_long_as_inverses_of_factors() -> None:
    """A solve uses the matrix of up to `invert_every` updates ago; the matrix itself goes on."""
    data, damping = case("sequence", "ce"), 0.1
    structure, v = cf.KFAC(factored_damping=True, invert_every=3), draw(2, case("sequence", "ce").rows.P)
    before: list[Tensor] = []
    for scale in (1.0, 2.0, 3.0, 4.0):
        layers = tuple(layer.scale(scale) for layer in data.rows.layers)
        structure.update(replace(data.rows, layers=layers))
        (block,) = (block for block in structure._blocks if isinstance(block, LastingBlock))
        x = block.join(structure.space.unflatten(v))
        other = cf.KFAC(factored_damping=True, invert_every=3)
        structure.solve(v, damping)
        other.load_state_dict(structure.state_dict())
        assert_close(other.solve(v, damping), structure.solve(v, damping))
        before.append(block.to_dense())
        eye = torch.eye(block.size, dtype=DOUBLE)
        used = before[0] if len(before) < 3 else before[2]
        assert_close(block.solve(x, damping)[0], x @ torch.linalg.inv(used + damping * eye))
        assert_close(block.to_dense(), scale**2 * before[0])
    assert_close(block.solve(x, 0.2)[0], x @ torch.linalg.inv(before[3] + 0.2 * eye))


def test_eigenvectors_of_factors_of_one_width_come_from_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in an update, in a fit that goes twice over the data, and beside other structures."""
    data = case("sequence", "ce")
    mixed = {"mix": "ekfac", "*": "kfac"}
    batches = [(data.inputs[:1], data.targets[:1]), (data.inputs[1:], data.targets[1:])]

    def found() -> list[Tensor]:
        fitted = cf.EKFAC.fit(data.model, data.loss, batches, kind="exact")
        made = [cf.EKFAC().update(data.rows), fitted, cf.PerLayer(mixed).update(data.rows)]
        return [structure.to_dense() for structure in made]

    expected, calls = found(), []
    eigh = moment._eigh
    monkeypatch.setattr(moment, "_eigh", lambda matrix: (calls.append(len(matrix)), eigh(matrix))[1])
    monkeypatch.setattr(moment, "_faster_together", lambda _: True)
    for one, other in zip(found(), expected, strict=True):
        assert_close(one, other)
    assert max(calls) > 1
