"""Structures of optimisers: partial traces of F, their diagonal, the inputs' moment, and block means, against dense definitions."""

import pytest
import torch
from fisher_cases import CUTS, NETWORKS, batches, case, draw, rows_and_references
from fisher_oracle import OPTIMISERS, build, partial_traces, pinv, positions
from oracle import ARCHITECTURES, DOUBLE, Architecture, architecture, loss_case
from sklearn.datasets import load_digits
from test_powers import damped, function
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.errors import UnsupportedModel
from curvlab.fisher.kronecker import KroneckerBlock
from curvlab.fisher.kronecker_structure import KroneckerStructure
from curvlab.optim import Preconditioner
from curvlab.rows import Rows, products, sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.parameters import Layout
from curvlab.testing.oracle import assert_close, outputs

LOSS = {"mlp": "ce-weights", "cnn": "mse", "sequence": "ce-ignore"}
PICKED = [a for a in ARCHITECTURES if a.output is None]


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=DOUBLE)


# --- definitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", OPTIMISERS)
def test_verbs_and_powers_are_those_of_the_dense_definition(spec: str, network: str) -> None:
    for kind in ("exact", "empirical"):
        data = case(network, LOSS[network], kind=kind)
        structure, dense = build(spec, []).update(data.rows), data.reference.of_optimiser(spec)
        assert_close(structure.to_dense(), dense)
        assert structure.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
    v, c, rho = draw(2, data.reference.P), draw(2, data.rows.R), 0.01 * structure.largest_eigenvalue()
    S, whole = data.rows.dense(), dense + rho * eye(len(dense))
    assert_close(structure.matvec(v), v @ dense)
    assert_close(structure.solve(v, rho), torch.linalg.solve(whole, v.T).T, 1e-9)
    assert_close(structure.space.flatten(structure.lift(c, rho)), torch.linalg.solve(whole, S.T @ c.T).T, 1e-9)
    assert_close(structure.response(data.rows, rho), S @ torch.linalg.solve(whole, S.T) / structure.count, 1e-9)
    for p in (0.25, 0.5):
        assert_close(structure.matvec(v, power=p), v @ function(dense, lambda x, p=p: x**p), 1e-7)
        matrix = damped(dense, lambda x, p=p: (x + rho) ** -p)
        assert_close(structure.solve(v, rho, power=p), v @ matrix, 1e-8)
        assert_close(
            structure.solve(v, rho, power=p, damps="power"), v @ damped(dense, lambda x, p=p: 1 / (x**p + rho)), 1e-7
        )


@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")
@pytest.mark.parametrize("spec", ["partial-traces", "output-side", "rank-one", "input-side"])
def test_undamped_solves_are_those_of_the_pseudo_inverse(spec: str) -> None:
    data = case("cnn", "mse", N=2)
    structure = build(spec, []).update(data.rows)
    inverse = pinv(structure.to_dense())
    v = draw(2, data.reference.P)
    assert_close(structure.solve(v, 0.0), v @ inverse, 1e-6)
    assert_close(
        structure.response(data.rows, 0.0) * structure.count, data.rows.dense() @ inverse @ data.rows.dense().T, 1e-6
    )


@pytest.mark.parametrize("name", ["partial-traces", "output-side", "input-side"])
def test_split_damping_is_on_the_factors(name: str) -> None:
    """In the convolution, both of whose groups have factors of their own."""
    data = case("cnn", "mse")
    for how in (True, "equal"):
        structure = cf.make(name, factored_damping=how).update(data.rows)
        (block,) = (block for block in structure._blocks if block.name == "conv")
        assert isinstance(block, KroneckerBlock)
        layer = next(layer for layer in data.reference.layers if len(layer.at) == 4 and layer.at.shape[1] == 10)
        at, rho = layer.at.flatten(), 0.3
        exact, A = data.reference.F[at[:, None], at], data.reference.factors(layer)[1] / data.reference.omega.sum()
        solved = []
        for q, (_, L, R) in enumerate(partial_traces(exact, 2, 10)):
            left, right = {
                "partial-traces": (L / L.trace(), R), "output-side": (L, eye(10)), "input-side": (eye(2), A[q]),
            }[name]  # fmt: skip
            pi = 1.0 if how == "equal" else float(((right.trace() / 10) / (left.trace() / 2)).sqrt())
            solved.append(torch.kron(left + rho**0.5 / pi * eye(2), right + rho**0.5 * pi * eye(10)))
        v = draw(3, 40)
        assert_close(block.solve(v, rho)[0], torch.linalg.solve(torch.block_diag(*solved), v.T).T, 1e-9)


@pytest.mark.parametrize("spec", ["partial-traces", "output-side", "rank-one"])
def test_long_sides_are_diagonal_and_named(spec: str) -> None:
    key, options = OPTIMISERS[spec]
    data = case("mlp", "ce")
    limited = cf.make(key, **options | ({} if spec == "rank-one" else {"max_factor": 4})).update(data.rows)
    sides = {"partial-traces": "0 (L, R), 2 (R), 4 (R)", "output-side": "0 (L)", "rank-one": ""}[spec]
    assert (f"diagonal factors: {sides}" in repr(limited)) == bool(sides)
    F, places = data.reference.F, positions(data.model)
    at = torch.cat([places["0.weight"].view(5, 4), places["0.bias"][:, None]], 1).flatten()
    ((_, L, R),) = partial_traces(F[at[:, None], at], 1, 5)
    L, R = L.diagonal().diag(), R.diagonal().diag()
    expected = torch.kron(L, eye(5)) if spec == "output-side" else torch.kron(L, R) / L.trace()
    assert_close(limited.to_dense()[at[:, None], at], expected)


@pytest.mark.parametrize("how", [cf.PartialTraces, cf.RankOne, cf.OutputSide], ids=lambda cls: cls.key)
@pytest.mark.parametrize("picked", PICKED, ids=lambda a: a.name)
def test_traces_are_those_of_the_formed_rows(picked: Architecture, how: type[KroneckerStructure]) -> None:
    """Over reused, tied, transposed, grouped and recurrent layers; products of two sides have the trace of F."""
    model, x = picked.make(4)
    loss, y = loss_case("half").make(outputs(model, x), "mean")
    for rows in (
        sqrt_fisher(model, loss, x, y),
        sqrt_fisher(model, loss, x, y, "empirical", rows="batch"),
    ):
        structure = how().update(rows)
        if how is not cf.OutputSide:
            assert structure.trace() == pytest.approx(float(rows.dense().square().sum()), rel=1e-9)
        for layer, block in zip(rows.layers, structure._blocks, strict=True):
            if isinstance(block, KroneckerBlock):
                assert_close(block.to_dense(), of_formed(layer, how), 1e-9)


def of_formed(layer: LayerRows, how: type[KroneckerStructure]) -> Tensor:
    """Return the product of the traces of the block of formed rows, those of tables diagonal over their rows."""
    S, Q = layer.dense(), layer.g.shape[3] if isinstance(layer, KroneckerRows) else 1
    blocks = []
    for _, L, R in partial_traces(S.T @ S, Q, layer.layout.width):
        left, right = L, R
        if how is cf.RankOne or not isinstance(layer, KroneckerRows):
            left = L.diagonal().diag()
        if how is cf.RankOne:
            right = R.diagonal().diag()
        if how is cf.OutputSide:
            left, right = (left, eye(len(R))) if isinstance(layer, KroneckerRows) else (eye(len(L)), right)
        trace = 1.0 if how is cf.OutputSide else float(L.trace()) or 1.0
        blocks.append(torch.kron(left.contiguous(), right.contiguous()) / trace)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1, 1, 4, 5), (1, 3, 2, 2, 9, 8), (2, 3, 2, 1, 3, 40), (3, 2, 7, 2, 2, 3), (4, 2, 3, 1, 9, 2)],
)
def test_roots_of_traces_form_rows_only_where_that_is_less_work(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    V, N, T, Q, O, I = shape  # noqa: E741
    layout = Layout.of(Q * O, {"w": torch.Size((Q * O, I))})
    rows = KroneckerRows("w", layout, draw(N, T, Q, I), draw(V, N, T, Q, O, seed=1))
    X = rows.dense().view(V * N, Q, O, I)
    expected = torch.einsum("rqoi,rqpi->qop", X, X), torch.einsum("rqoi,rqoj->qij", X, X)
    for chunk in (None, 2 * V * Q * O * I):
        if chunk is not None:
            monkeypatch.setattr(products, "CHUNK_ELEMENTS", chunk)
        for units, width in ((True, True), (True, False), (False, True)):
            found = list(rows.trace_roots(units=units, width=width))
            for side, wanted, moment in zip((0, 1), (units, width), expected, strict=True):
                roots = [pair[side] for pair in found]
                if not wanted:
                    assert roots == [None] * len(found)
                    continue
                assert_close(sum(torch.einsum("qmtd,qmte->qde", root, root) for root in roots), moment)  # type: ignore[arg-type]
    if T == 1:
        ((left, right),) = rows.trace_roots(in_pieces=False)
        assert (left.shape, right.shape) == ((Q, V * N, 1, O), (Q, N, 1, I))  # type: ignore[union-attr]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("network", ["cnn", "sequence"])
@pytest.mark.parametrize("spec", [spec for spec in OPTIMISERS if "traces-diagonal" not in spec])
def test_a_running_average_is_that_of_traces(spec: str, network: str, reduction: str) -> None:
    """Of F, as traces are linear in it; of inputs, by the weights of samples."""
    data = case(network, "ce-weights" if network == "cnn" else "ce-ignore", reduction, N=6)
    rows, references = rows_and_references(data)
    for decay in (0.7, 1.0):
        structure = build(spec, [])
        for part in rows:
            structure.update(part, decay)
        weights = [decay**2, decay, 1.0]
        terms = [ref.count if reduction == "mean" else 1.0 for ref in references]
        shares = torch.tensor([w * t for w, t in zip(weights, terms, strict=True)], dtype=DOUBLE)
        shares = shares if reduction == "sum" and decay == 1 else shares / shares.sum()
        F = sum(share * ref.F for share, ref in zip(shares, references, strict=True))
        sharing = OPTIMISERS[spec][1].get("sharing", "expand")
        mass = sum(w * float(ref.omega.sum()) for w, ref in zip(weights, references, strict=True))
        moments = [
            torch.zeros(0) if layer.a is None
            else sum(w * ref.factors(ref.layers[k], sharing)[1] for w, ref in zip(weights, references, strict=True)) / mass
            for k, layer in enumerate(references[0].layers)
        ]  # fmt: skip
        assert_close(structure.to_dense(), references[0].of_optimiser(spec, F, moments), 1e-9)


@pytest.mark.parametrize("spec", [*OPTIMISERS, "block-means"])
def test_a_fit_to_batches_is_a_fit_to_all(spec: str) -> None:
    key, options = OPTIMISERS.get(spec, (spec, {}))
    data = case("cnn", "ce-weights", N=6)
    whole = cf.STRUCTURES[key].fit(data.model, data.loss, (data.inputs, data.targets), **options)
    cut = cf.STRUCTURES[key].fit(data.model, data.loss, batches(data, CUTS), **options)
    assert_close(cut.to_dense(), whole.to_dense(), 1e-9)
    assert_close(whole.to_dense(), cf.make(key, **options).update(data.rows).to_dense(), 1e-9)


# --- block means ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["units", "parameters"])
@pytest.mark.parametrize("network", NETWORKS)
def test_block_means_are_those_of_the_diagonal(network: str, blocks: str) -> None:
    """Over an output of a weight, or a row of a table; a vector is one block, and so is a bare parameter."""
    data = case(network, LOSS[network])
    structure = cf.BlockMeans(blocks=blocks).update(data.rows)  # type: ignore[arg-type]
    diagonal, count = data.reference.F.diagonal(), 0
    expected = torch.empty_like(diagonal)
    for (name, parameter), at in zip(data.model.named_parameters(), positions(data.model).values(), strict=True):
        by_unit = blocks == "units" and parameter.ndim > 1 and "." in name
        rows = at.view(len(parameter) if by_unit else 1, -1)
        expected[rows] = diagonal[rows].mean(1, keepdim=True).expand(rows.shape)
        count += len(rows)
    assert_close(structure.to_dense(), expected.diag())
    assert structure.trace() == pytest.approx(data.reference.F.trace().item())
    assert sum(len(block.average.total) for block in structure._blocks) == count  # type: ignore[attr-defined]


# --- what the papers say ----------------------------------------------------------------------------------------------


def one_layer(N: int = 12, bias: bool = False, inputs: int = 4) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(inputs, 3, bias=bias).double(), nn.MSELoss(), draw(N, inputs), draw(N, 3, seed=1)


def empirical(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, rows: str = "sample") -> Rows:
    return sqrt_fisher(model, loss, x, y, "empirical", rows=rows)  # type: ignore[arg-type]


def test_the_product_is_exact_where_the_gradients_have_a_kronecker_second_moment() -> None:
    """In a deep linear network with squared error."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double()
    rows = sqrt_fisher(model, nn.MSELoss(), draw(6, 3), draw(6, 2, seed=1))
    exact = cf.BlockDiagonal().update(rows)
    for key in ("partial-traces", "partial-traces-diagonal"):
        structure, v = cf.make(key).update(rows), draw(exact.space.size)
        assert_close(structure.to_dense(), exact.to_dense())
        assert_close(structure.solve(v, 1e-3, power=0.5), exact.solve(v, 1e-3, power=0.5), 1e-7)


def normalised() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Inputs and residuals of norm 1."""
    model, loss, x, r = one_layer()
    x, r = (nn.functional.normalize(part) for part in (x, r))
    return model, loss, x, model(x).detach() - r


def test_shampoo_with_exponent_one_half_is_empirical_kfac_where_norms_are_constant() -> None:
    rows = empirical(*normalised())
    assert_close(cf.PartialTraces().update(rows).to_dense(), cf.KFAC().update(rows).to_dense())
    assert_close(cf.PartialTracesDiagonal().update(rows).to_dense(), cf.EKFAC().update(rows).to_dense())
    other = empirical(*one_layer())
    distance = (cf.PartialTraces().update(other).to_dense() - cf.KFAC().update(other).to_dense()).norm()
    assert float(distance) > 1e-3


def test_adafactor_in_the_eigenbasis_of_shampoo_is_shampoo_with_exponent_one_half() -> None:
    """Row and column sums of SOAP's second moments are the eigenvalues of L and R."""
    rows = empirical(*one_layer())
    (soap,), (shampoo,) = cf.PartialTracesDiagonal().update(rows)._blocks, cf.PartialTraces().update(rows)._blocks
    assert isinstance(soap, KroneckerBlock)
    assert isinstance(shampoo, KroneckerBlock)
    v = soap.entries()[0]
    assert_close(torch.outer(v.sum(1), v.sum(0)) / v.sum(), shampoo.entries()[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_diagonal_in_the_eigenbasis_is_the_nearest_one(network: str) -> None:
    data = case(network, LOSS[network], kind="empirical")
    soap, exact = cf.PartialTracesDiagonal().update(data.rows), cf.BlockDiagonal().update(data.rows).to_dense()
    shampoo = cf.PartialTraces(max_block=0).update(data.rows).to_dense()
    least = float((exact - soap.to_dense()).norm())
    assert least < float((exact - shampoo).norm())
    for block in soap._blocks:
        if isinstance(block, KroneckerBlock):
            block.corrections.total *= 1 + 0.1 * draw(*block.corrections.total.shape).abs()  # type: ignore[attr-defined]
    assert least < float((exact - soap.to_dense()).norm())


def test_column_scaling_maps_the_norms_of_columns_of_the_gradient() -> None:
    """A column of norm t becomes one of norm t/(t² + ρ) in the same direction, the bias as well (D-NGD)."""
    model, loss, x, y = one_layer(bias=True)
    rows, rho = empirical(model, loss, x, y, "batch"), 0.1
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    named = dict(zip(("weight", "bias"), gradient, strict=True))
    step = cf.ColumnScaled().update(rows).solve(named, rho)
    for name, g in named.items():
        t = g.norm(dim=0)
        assert_close(step[name], g / (t**2 + rho))  # type: ignore[index]


def test_the_output_side_is_the_output_factor_of_kfac_weighted_by_the_norms_of_inputs() -> None:
    """NG+: E[‖a‖² δδᵀ], the partial trace of the empirical block, with an identity in place of A."""
    model, loss, x, y = one_layer(bias=True)
    delta, a = 2 * (model(x) - y).detach(), torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    L = torch.einsum("n,no,np->op", a.square().sum(1), delta, delta) / y.numel()
    structure = cf.OutputSide().update(empirical(model, loss, x, y))
    (block,) = structure._blocks
    assert_close(block.to_dense(), torch.kron(L, eye(5)))
    exact = cf.BlockDiagonal().update(empirical(model, loss, x, y))
    assert float(L.trace()) == pytest.approx(exact.trace())


def test_the_output_side_of_one_input_is_the_empirical_block() -> None:
    """NG+ is the empirical natural gradient of the block there."""
    rows = empirical(*one_layer(inputs=1))
    exact, structure, v = cf.BlockDiagonal().update(rows), cf.OutputSide().update(rows), draw(3)
    assert_close(structure.to_dense(), exact.to_dense())
    assert_close(structure.solve(v, 0.05**0.5), exact.solve(v, 0.05**0.5), 1e-9)


def test_the_published_output_side_of_a_convolution_is_over_the_root_of_its_positions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4 * 2 * 3, 3)).double()
    rows = empirical(model, nn.MSELoss(), draw(5, 2, 4, 5), draw(5, 3, seed=1))
    derived, published = cf.OutputSide().update(rows), cf.OutputSide(convolution="published").update(rows)
    (conv, last), (as_published, same) = derived._blocks, published._blocks
    assert_close(as_published.to_dense(), conv.to_dense() / 6**0.5)
    assert_close(same.to_dense(), last.to_dense())


def test_the_input_side_knows_no_targets() -> None:
    """SNGD: its solve with undamped A whitens the inputs of a layer."""
    model, loss, x, y = one_layer()
    first, second = (cf.InputSide().update(empirical(model, loss, x, targets)) for targets in (y, 3 - y))
    assert_close(first.to_dense(), second.to_dense(), 1e-14)
    assert_close(first.to_dense(), torch.kron(eye(3), x.T @ x / len(x)))
    white = first.solve(torch.cat([x, x, x], 1), 0.0, power=0.5)
    assert isinstance(white, Tensor)
    assert_close(white[:, :4].T @ white[:, :4] / len(x), eye(4), 1e-9)


# --- training ---------------------------------------------------------------------------------------------------------


POWERS = {"output-side": 1.0, "input-side": 1.0, "column-scaled": 1.0}
"""Of optimisers that do not take roots."""


@pytest.mark.parametrize("key", dict.fromkeys(key for key, _ in OPTIMISERS.values()))
def test_each_trains_on_handwritten_digits(key: str) -> None:
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels[:320] / 16).float(), torch.from_numpy(digits[:320])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 10))
    loss = nn.CrossEntropyLoss()
    plain = torch.optim.SGD(model.parameters(), 1.0)
    pre = Preconditioner(
        model,
        loss,
        cf.make(key),
        kind="empirical",
        rows="sample" if key.endswith("side") else "batch",
        damping=0.1,
        decay=0.9,
        kl_clip=0.1,
        power=POWERS.get(key, 0.5),
    )
    first = float(loss(model(x), y).detach())
    for epoch in range(3):
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(32):
            plain.zero_grad()
            with pre.collect():
                loss(model(x[part]), y[part]).backward()
            pre.precondition()
            plain.step()
    assert float(loss(model(x), y).detach()) < 0.3 * first


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_what_cannot_be_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="outputs and inputs are both 'identity'.* Keep one of them"):
        cf.PartialTraces(outputs="identity", inputs="identity")
    with pytest.raises(ValueError, match="Unknown inputs 'diagonals'.* Did you mean 'diagonal'"):
        cf.PartialTraces(inputs="diagonals")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown convolution 'publish'.* Did you mean 'published'"):
        cf.OutputSide(convolution="publish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown blocks 'unit'.* Did you mean 'units'"):
        cf.BlockMeans(blocks="unit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown sharing 'gradient'"):
        cf.InputSide(sharing="gradient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs factored_damping=True"):
        cf.PartialTraces(invert_every=2)
    with pytest.raises(ValueError, match=r"rows of batches do not tell\. Use rows='sample'"):
        cf.OutputSide(convolution="published").update(empirical(*one_layer(), "batch"))


def test_the_inputs_of_a_table_that_is_a_weight_too_are_of_two_kinds() -> None:
    model, x = architecture("tied").make(3)
    loss, y = loss_case("half").make(outputs(model, x), "mean")
    rows = sqrt_fisher(model, loss, x, y)
    (name,) = (layer.name for layer in rows.layers if type(layer).__name__ == "TiedRows")
    remedy = rf"PerLayer\({{'{name}': KFAC\(\), '\*': InputSide\(\)}}\)"
    with pytest.raises(UnsupportedModel, match=f"The table of '{name}' .* {remedy}"):
        cf.InputSide().update(rows)
    others = {"*": cf.InputSide()} if len(rows.layers) > 1 else {}
    assert cf.PerLayer({name: cf.KFAC(), **others}).update(rows).updated
