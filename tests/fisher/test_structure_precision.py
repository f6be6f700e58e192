"""What is left of the digits: float32, small damping, singular and ill-conditioned systems."""

import re
import warnings

import pytest
import torch
from fisher_cases import draw
from fisher_oracle import DOUBLE, build, sigma_of
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.errors import IllConditioned
from curvlab.nn import HalfSquaredError, ntk_mlp
from curvlab.rows import Rows, sqrt_fisher
from curvlab.testing.oracle import assert_close

ROW_SIDE = ("full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise")
SMALL = ("unit-wise", "kfac", "ekfac")


def almost_equal_inputs(N: int = 12, features: int = 16) -> Tensor:
    """Return inputs in close pairs, so that Gram matrices have eigenvalues of all sizes."""
    x = draw(N, features)
    gaps = torch.logspace(-1, -4, N // 2, dtype=DOUBLE)[:, None]
    x[1::2] = x[::2] + gaps * draw(N // 2, features, seed=1)
    return x / x.norm(dim=1, keepdim=True)


def ill_conditioned_rows(dtype: torch.dtype, width: int = 40, classes: int | None = None) -> Rows:
    """Return rows of a squared error, or of a cross-entropy if there are classes."""
    generator = torch.Generator().manual_seed(0)
    model = ntk_mlp((16, width, width, classes or 1), "tanh", bias_std=0.1, generator=generator, dtype=dtype)
    x = almost_equal_inputs().to(dtype)
    if classes:
        return sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.arange(len(x)) % classes)
    return sqrt_fisher(model, HalfSquaredError(), x, torch.zeros(len(x), 1, dtype=dtype))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::curvlab.errors.IllConditioned")
@pytest.mark.parametrize("spec", [*ROW_SIDE, "kfac", "ekfac"])
def test_lift_keeps_the_digits_in_float32_that_a_solve_on_the_gradient_loses(spec: str) -> None:
    """At ρ/λ_max = 1e-8 the push-through form subtracts nearly equal vectors and divides by ρ; lift does not.

    All digits go where blocks hold many rows; small blocks and Kronecker factors lose some.
    """
    single = ill_conditioned_rows(torch.float32)
    exact = single.to(torch.float64)
    c = draw(single.R)
    in_single, in_double = build(spec, []).update(single), build(spec, []).update(exact)
    rho = 1e-8 * in_double.largest_eigenvalue()
    if spec == "block-tridiagonal":
        assert in_double.eigvalsh().min() < -100 * rho
    expected = in_double.space.flatten(in_double.lift(c, rho))
    lifted = in_single.space.flatten(in_single.lift(c.float(), rho))
    assert lifted.dtype == torch.float32
    assert relative_error(lifted, expected) < 5e-3
    pushed = in_single.space.flatten(in_single.solve(single.rmatvec(c.float()), rho))
    assert relative_error(pushed, expected) > (5 * relative_error(lifted, expected) if spec in SMALL else 0.5)
    in_float64 = in_double.space.flatten(in_double.solve(exact.rmatvec(c), rho))
    assert relative_error(in_float64, expected) < 1e-4


@pytest.mark.parametrize("spec", ["full", "block-diagonal", "unit-wise"])
def test_an_ill_conditioned_system_warns_with_its_condition_number(spec: str) -> None:
    structure = build(spec, []).update(ill_conditioned_rows(torch.float32))
    c = torch.ones(12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        structure.lift(c, "rel:1e-8")
        structure.lift(c, "rel:1e-8")
    mine = [w for w in caught if issubclass(w.category, IllConditioned)]
    assert 1 <= len(mine) <= 3, "one warning a system, once"
    found = re.search(
        r"condition number about (\S+) at damping \S+ is too large .* float32; solved in float64", str(mine[0].message)
    )
    assert found is not None
    assert float(found[1]) <= 1.1e8 * (1 if spec == "full" else 10)
    assert float(found[1]) > 1e6


@pytest.mark.parametrize("key", ["full", "block-diagonal"])
def test_an_ill_conditioned_response_keeps_its_digits(key: str) -> None:
    """It is made from float64 factors, not from products whose small eigenvalues float32 has lost."""

    def response(rows: Rows) -> Tensor:
        return cf.make(key).update(rows).response(rows.jacobian(), rho)

    single = ill_conditioned_rows(torch.float32, classes=3)
    exact = single.to(torch.float64)
    rho = 1e-8 * cf.make(key).update(exact).largest_eigenvalue()
    with pytest.warns(IllConditioned, match="solved by an eigendecomposition"):
        found = response(single)
    assert relative_error(found, response(exact)) < 1e-4


def test_float64_falls_back_to_an_eigendecomposition() -> None:
    """Duplicated samples without damping to speak of."""
    x = draw(4, 16)[[0, 0, 1, 2]]
    model = ntk_mlp((16, 30, 1), "tanh", dtype=DOUBLE)
    rows = sqrt_fisher(model, HalfSquaredError(), x, torch.zeros(4, 1, dtype=DOUBLE))
    structure = cf.Full().update(rows)
    c = torch.tensor([1.0, 1.0, 2.0, -1.0], dtype=DOUBLE)
    rho = 1e-17 * structure.largest_eigenvalue()
    with pytest.warns(IllConditioned, match=r"about 1\.0e\+17 .*float64; solved by an eigendecomposition"):
        lifted = structure.space.flatten(structure.lift(c, rho))
    expected = torch.linalg.pinv(rows.dense(), rtol=1e-10) @ c
    assert_close(lifted, expected, 1e-9)


def test_the_parameter_side_in_float32_warns_that_its_digits_are_gone() -> None:
    rows = ill_conditioned_rows(torch.float32, width=10)
    with pytest.warns(IllConditioned, match="solved"):
        cf.Full(side="parameters").update(rows).lift(torch.ones(12), "rel:1e-8")
    tridiagonal = cf.BlockTridiagonal(side="parameters").update(rows)
    with pytest.warns(IllConditioned, match="Use another damping"):
        tridiagonal.lift(torch.ones(12), "rel:1e-8")
    fine = cf.Full(side="parameters").update(rows)
    fine.lift(torch.ones(12), "rel:1e-3")


@pytest.mark.parametrize("spec", [*ROW_SIDE, "kfac", "ekfac", "diagonal"])
def test_float32_agrees_with_float64_where_it_can(spec: str) -> None:
    single = ill_conditioned_rows(torch.float32)
    exact = single.to(torch.float64)
    one, two = build(spec, []).update(single), build(spec, []).update(exact)
    v, rho = draw(one.space.size), 0.6 * two.largest_eigenvalue()
    assert relative_error(one.matvec(v.float()), two.matvec(v)) < 1e-5
    assert relative_error(one.solve(v.float(), rho), two.solve(v, rho)) < 1e-5
    J = single.jacobian()
    assert relative_error(one.response(J, rho), two.response(exact.jacobian(), rho)) < 1e-5
    assert relative_error(one.response(J, rho, test=J), two.response(exact.jacobian(), rho)) < 1e-5
    assert one.trace() == pytest.approx(two.trace(), rel=1e-5)
    assert one.logdet(rho) == pytest.approx(two.logdet(rho), rel=1e-6)
    assert relative_error(one.eigvalsh()[-3:], two.eigvalsh()[-3:]) < 1e-5


@pytest.mark.parametrize("spec", ["full", "block-diagonal", "layer-wise", "unit-wise"])
@pytest.mark.parametrize("rho", ["rel:1e-6", "rel:1e-9", 0.0])
def test_ill_conditioned_layers_cost_digits_in_proportion(spec: str, rho: float | str) -> None:
    """One layer's Gram matrix reaches down to 1e-9 of its largest eigenvalue.

    The response of the rows is compared with the definition in exact-enough arithmetic: the same solve by a singular
    value decomposition of the dense rows, which sees the square root of the condition number.
    """
    rows = ill_conditioned_rows(DOUBLE)
    structure = build(spec, []).update(rows)
    absolute = structure.solve(torch.zeros(rows.P, dtype=DOUBLE), rho, info=True)[1].damping
    expected = response_by_svd(spec, rows, absolute)
    got = structure.response(rows, rho) * structure.count
    digits = structure.condition_number() if rho == 0 else structure.largest_eigenvalue() / absolute
    assert 1e5 < digits < 1e13
    assert_close(got, expected, 1e-14 * digits)


@pytest.mark.parametrize("spec", ["full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise"])
def test_singular_layers_lose_no_digits(spec: str) -> None:
    """More samples than a layer's width: its Gram matrix has null directions, and Σ couples them to others."""
    generator = torch.Generator().manual_seed(0)
    model = ntk_mlp((16, 12, 12, 1), "erf", generator=generator, dtype=DOUBLE)
    x = draw(30, 16)
    rows = sqrt_fisher(model, HalfSquaredError(), x, torch.zeros(30, 1, dtype=DOUBLE))
    structure = build(spec, [], side="rows").update(rows)
    dense, c, S = structure.to_dense(), draw(30), rows.dense()
    rho = 1.1 * float(torch.linalg.eigvalsh(dense).abs().max())
    lifted = structure.space.flatten(structure.lift(c, rho))
    assert_close(lifted, torch.linalg.solve(dense + rho * torch.eye(rows.P, dtype=DOUBLE), S.T @ c), 1e-12)
    inverse = torch.linalg.pinv(dense, rtol=1e-13, hermitian=True)
    assert structure.condition_number() < 1e9
    lifted = structure.space.flatten(structure.lift(c, 0.0))
    assert_close(lifted, inverse @ S.T @ c, 1e-14 * structure.condition_number())
    assert_close(structure.response(rows, 0.0) * 30, S @ inverse @ S.T, 1e-14 * structure.condition_number())


@pytest.mark.parametrize("spec", ["full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise"])
def test_directions_within_round_off_of_a_gram_matrix_count_in_damped_solves(spec: str) -> None:
    """Two samples at a distance of 1e-8 give an eigenvalue of 1e-16 and a part of Sᵀc of 1e-8."""
    generator = torch.Generator().manual_seed(0)
    model = ntk_mlp((16, 20, 20, 1), "erf", generator=generator, dtype=DOUBLE)
    x = draw(6, 16)
    x[1] = x[0] + 1e-8 * draw(16, seed=1)
    rows = sqrt_fisher(model, HalfSquaredError(), x, torch.zeros(6, 1, dtype=DOUBLE))
    structure = build(spec, [], side="rows").update(rows)
    dense, S = structure.to_dense(), rows.dense()
    c = torch.tensor([1.0, -1.0, 0, 0, 0, 0], dtype=DOUBLE)
    rho = 1.1 * float(torch.linalg.eigvalsh(dense).abs().max())
    expected = torch.linalg.solve(dense + rho * torch.eye(rows.P, dtype=DOUBLE), S.T @ c)
    assert_close(structure.space.flatten(structure.lift(c, rho)), expected, 1e-6)


def response_by_svd(spec: str, rows: Rows, rho: float) -> Tensor:
    """Return S (F + ρI)⁻¹Sᵀ from dense rows."""
    blocks = [layer.dense() for layer in rows.layers]
    if spec == "layer-wise":
        # S̃ᵀ(Σ ⊗ I)S̃ = XᵀX with X = (Σ^{1/2} ⊗ I)S̃
        values, vectors = torch.linalg.eigh(sigma_of(len(blocks)))
        root = vectors @ (values.sqrt()[:, None] * vectors.T)
        X = torch.kron(root.contiguous(), torch.eye(rows.R, dtype=DOUBLE)) @ torch.block_diag(*blocks)
        pairs = [(torch.cat(blocks, dim=1), X)]
    elif spec == "full":
        pairs = [(torch.cat(blocks, dim=1),) * 2]
    elif spec == "block-diagonal":
        pairs = [(block, block) for block in blocks]
    else:
        pairs = [(unit, unit) for layer in rows.layers for unit in layer.unit_stack()]
    total = torch.zeros(rows.R, rows.R, dtype=DOUBLE)
    for S, X in pairs:
        _, s, V = torch.linalg.svd(X, full_matrices=False)
        y = S @ V.T
        inverse = 1 / (s.square() + rho) if rho else torch.where(s > 1e-14 * s.max(), s.square().reciprocal(), 0)
        total += (y * inverse) @ y.T
    return total


@pytest.mark.parametrize("spec", [*ROW_SIDE, "kfac", "ekfac", "diagonal"])
def test_duplicated_samples_and_dead_units_are_no_obstacle(spec: str) -> None:
    """ReLU units that no sample excites, duplicated samples: undamped verbs are the pseudo-inverse's."""
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    model[0].weight.data[0], model[0].bias.data[0] = 0.0, -1.0
    x = draw(4, 3)[[0, 0, 1, 2, 3]]
    rows = sqrt_fisher(model, HalfSquaredError(), x, draw(5, 2))
    structure = build(spec, []).update(rows)
    dense = structure.to_dense()
    c = draw(rows.R)
    g = rows.dense().T @ c
    lifted = structure.space.flatten(structure.lift(c, 0.0))
    assert bool(torch.isfinite(lifted).all())
    within = dense @ lifted
    if spec not in ("block-tridiagonal", "kfac", "ekfac"):
        assert_close(within, g, 1e-8)
    assert_close(dense @ (torch.linalg.pinv(dense, rtol=1e-10, hermitian=True) @ g), within, 1e-7)
    dead = structure.space.unflatten(lifted)["0.weight"][0]
    assert float(dead.abs().max()) == 0 or spec == "block-tridiagonal"
    if spec != "block-tridiagonal":
        assert structure.logdet(0.0) == -torch.inf
    rank = int(torch.linalg.matrix_rank(dense, rtol=1e-12, hermitian=True))
    if "kfac" not in spec:
        assert int(structure.eigvalsh().count_nonzero()) == rank


def test_samples_that_hardly_excite_a_unit_still_count() -> None:
    """With independent inputs a unit's undamped response is 1 for every sample that it sees, however faintly."""
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)).double()
    x = draw(4, 8) * torch.tensor([[0.1], [3.0], [9.0], [14.0]], dtype=DOUBLE)
    rows = sqrt_fisher(model, HalfSquaredError(reduction="sum"), x, draw(4, 1))
    strength = rows.layers[0].factors[1].abs()
    assert float(strength.min()) < 1e-9 * float(strength.max())
    structure = cf.UnitWise(side="rows").update(rows)
    lifted = structure.lift(torch.eye(4, dtype=DOUBLE), 0.0)
    response = rows.matvec({"0.weight": lifted["0.weight"], "2.weight": torch.zeros_like(lifted["2.weight"])})
    assert_close(response.diagonal(), torch.full((4,), 5.0, dtype=DOUBLE), 1e-9)
    assert_close(response, 5 * torch.eye(4, dtype=DOUBLE), 1e-6)


def test_the_window_for_rounding_does_not_hide_small_diagonal_entries() -> None:
    """The diagonal is never decomposed, so entries of 1e-13 of the largest are not null, whatever the size."""
    model = nn.Linear(500, 1, bias=False).double()
    x = torch.ones(1, 500, dtype=DOUBLE)
    x[0, 1:] = 1e-7
    rows = sqrt_fisher(model, HalfSquaredError(), x, draw(1, 1))
    structure = cf.Diagonal().update(rows)
    assert_close(structure.lift(torch.ones(1, dtype=DOUBLE), 0.0)["weight"], 1 / x)
    assert structure.eigvalsh().count_nonzero() == 500


@pytest.mark.filterwarnings("ignore::curvlab.errors.IllConditioned")
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("key", ROW_SIDE)
def test_a_solve_does_not_depend_on_earlier_ones(key: str, dtype: torch.dtype) -> None:
    rows = ill_conditioned_rows(dtype)

    def made() -> cf.Structure:
        structure = cf.LayerWise(sigma_of(3).tolist()) if key == "layer-wise" else cf.make(key)
        return structure.update(rows)

    used, v = made(), torch.randn(rows.P, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for damping in (1e-2, "rel:1e-12", 1.0, 1e-2):
        assert torch.equal(used.solve(v, damping), made().solve(v, damping))


@pytest.mark.filterwarnings("ignore::curvlab.errors.IllConditioned")
@pytest.mark.parametrize("spec", ["full", "block-diagonal"])
def test_rows_that_are_finite_although_a_part_of_their_products_is_not(spec: str) -> None:
    """In float32 `⟨g, g⟩⟨a, a⟩` is ∞·0 here; in float64 it is 0."""
    model = nn.Linear(4, 3, bias=False)
    rows = sqrt_fisher(model, nn.MSELoss(), torch.zeros(9, 4), torch.full((9, 3), 1e25), kind="empirical")
    structure = build(spec, []).update(rows)
    (solution,) = structure.solve({"weight": torch.ones(3, 4)}, 0.1).values()
    assert_close(solution, torch.full((3, 4), 10.0), 1e-6)
    assert structure.largest_eigenvalue() == 0


@pytest.mark.filterwarnings("ignore::curvlab.errors.IllConditioned")
@pytest.mark.parametrize("spec", ["block-diagonal", "unit-wise", "kfac", "ekfac"])
def test_rows_whose_products_overflow_are_named(spec: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    rows = sqrt_fisher(model, nn.MSELoss(), torch.randn(9, 4) * 1e22, torch.zeros(9, 3))
    gradient = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="inner products of rows overflow"):
        build(spec, []).update(rows).solve(gradient, 1e-3)
