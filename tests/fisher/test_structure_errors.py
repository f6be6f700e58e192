"""Every message: what is named, and what the user is told to do."""

import pytest
import torch
from fisher_cases import case, draw
from fisher_oracle import PLAIN_SPECS, SPECS, build, pinv, positions
from oracle import DOUBLE

import curvlab.fisher as cf
from curvlab.errors import IllConditioned, NotPositiveDefinite, OutsideRange, PartitionError, StateError
from curvlab.fisher import memory
from curvlab.testing.oracle import assert_close
from curvlab.tools.looks import look


def test_the_registry_lists_every_structure_and_its_options_rebuild_it() -> None:
    assert list(cf.STRUCTURES) == [
        "full", "block-diagonal", "layer-wise", "block-tridiagonal", "unit-wise", "diagonal", "component-wise", "kfac",
        "ekfac", "sketched", "adaptive-inverse",
        "partial-traces", "output-side", "column-scaled", "rank-one", "partial-traces-diagonal", "input-side",
        "block-means",
    ]  # fmt: skip
    for key, cls in cf.STRUCTURES.items():
        structure = cf.make(key)
        assert type(structure) is cls
        assert cls.key == key
        assert cls.summary
        assert type(structure)(**structure.options).options == structure.options
        assert look(key) is cls.look
    assert cf.make("full", side="rows", rtol=1e-3).options == {"side": "rows", "window": None, "rtol": 1e-3}


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown structure 'blockdiagonal'\. Did you mean 'block-diagonal'\?"):
        cf.make("blockdiagonal")
    with pytest.raises(ValueError, match=r"Unknown option of 'full' 'windows'\. Did you mean 'window'\?"):
        cf.make("full", windows=2)
    with pytest.raises(ValueError, match=r"Unknown side 'row'\. Did you mean 'rows'\?"):
        cf.Full(side="row")
    with pytest.raises(ValueError, match=r"Unknown sharing 'reduced'\. Did you mean 'reduce'\?"):
        cf.KFAC(sharing="reduced")
    with pytest.raises(ValueError, match=r"Unknown parameter '0\.weights'\. Did you mean '0\.weight'\?"):
        cf.BlockDiagonal(partition=[["0.weights"]]).update(case("mlp").rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is a number of batches ≥ 1, got 0"),
        ({"window": 2, "side": "parameters"}, "cannot be combined with side='parameters'"),
        ({"rtol": 1.0}, r"rtol is a number in \[0, 1\), got 1.0"),
        ({"rtol": -0.1}, "rtol is a number"),
    ],
)
@pytest.mark.parametrize(
    "key", ["full", "block-diagonal", "layer-wise", "block-tridiagonal", "unit-wise", "component-wise"]
)
def test_options_are_checked_at_construction(key: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cf.make(key, **options)


def test_options_of_diagonal_and_kronecker_structures_are_checked() -> None:
    for key in ("diagonal", "kfac", "ekfac"):
        with pytest.raises(ValueError, match="rtol is a number"):
            cf.make(key, rtol=2.0)
    with pytest.raises(ValueError, match="max_block is a number of parameters, got -1"):
        cf.EKFAC(max_block=-1)


@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_a_structure_without_state_says_what_to_do(spec: str) -> None:
    structure, v = build(spec, []), draw(3)
    for verb in (
        lambda: structure.matvec(v),
        lambda: structure.solve(v, 0.1),
        lambda: structure.lift(v, 0.1),
        lambda: structure.response(case("mlp").separate, 0.1),
        structure.to_dense,
        structure.trace,
        structure.eigvalsh,
        structure.largest_eigenvalue,
        structure.condition_number,
        structure.state_dict,
        lambda: structure.logdet(0.1),
        lambda: structure.rows,
        lambda: structure.space,
        lambda: structure.count,
    ):
        with pytest.raises(StateError, match=r"no state yet: call update\(rows\) or use fit"):
            verb()
    assert "not updated yet" in repr(structure)


def test_rows_of_a_jacobian_build_no_structure() -> None:
    with pytest.raises(ValueError, match=r"rows of S .*not of the Jacobian"):
        cf.Full().update(case("mlp").separate)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_decay_is_a_share(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay is a number in \[0, 1\]"):
        cf.KFAC().update(case("mlp").rows, decay)


@pytest.mark.parametrize("damping", ["1e-3", "rel", "rel:", "rel:x", "relative:1", "abs:1"])
def test_damping_has_a_form(damping: str) -> None:
    structure = cf.Diagonal().update(case("mlp").rows)
    with pytest.raises(ValueError, match='damping is a number or a string such as "rel:1e-6"'):
        structure.solve(draw(64), damping)


@pytest.mark.parametrize("damping", [-1.0, float("inf"), float("nan"), "rel:-1", "rel:inf", "rel:nan"])
def test_damping_is_finite_and_not_negative(damping: float | str) -> None:
    structure = cf.Diagonal().update(case("mlp").rows)
    with pytest.raises(ValueError, match="damping must be finite and not negative"):
        structure.lift(draw(12), damping)


@pytest.mark.parametrize("spec", SPECS)
def test_relative_damping_is_a_multiple_of_the_largest_eigenvalue(spec: str) -> None:
    data = case("cnn", "mse")
    structure = build(spec, list(positions(data.model))).update(data.rows)
    largest = float(torch.linalg.eigvalsh(structure.to_dense()).max())
    _, info = structure.solve(draw(structure.space.size), "rel:0.25", info=True)
    assert info.damping == pytest.approx(0.25 * largest, rel=1e-9)
    assert float(info.outside.max()) == 0
    _, info = structure.solve(draw(3, structure.space.size), 2, info=True)
    assert info.damping == 2
    assert info.outside.shape == (3,)


def test_a_partition_holds_every_parameter_once() -> None:
    rows, names = case("cnn", "mse").rows, list(positions(case("cnn", "mse").model))
    for make in (lambda p: cf.BlockDiagonal(partition=p), lambda p: cf.LayerWise(partition=p)):
        with pytest.raises(PartitionError, match=r"in no block: gain, conv\.bias.*freeze parameters"):
            make([names[1:2], names[3:]]).update(rows)
        with pytest.raises(PartitionError, match=r"in several blocks: gain\. List each name once"):
            make([names[:1], names]).update(rows)
        with pytest.raises(PartitionError, match="a block is empty"):
            make([names, []]).update(rows)
    structure = cf.BlockDiagonal(partition=[names[1:]])
    for _ in range(2):
        with pytest.raises(PartitionError, match="in no block: gain"):
            structure.update(rows)
    assert "not updated yet" in repr(structure)


@pytest.mark.usefixtures("unchecked_types")
def test_sigma_is_a_symmetric_matrix_of_the_right_size() -> None:
    rows = case("mlp").rows
    for sigma in ([[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0]], [[float("inf")]], [1.0]):
        with pytest.raises(ValueError, match="sigma must be a finite, symmetric square matrix"):
            cf.LayerWise(sigma)
    with pytest.raises(ValueError, match="sigma is 2 × 2, but there are 3 groups"):
        cf.LayerWise([[1.0, 0.0], [0.0, 1.0]]).update(rows)
    with pytest.raises(ValueError, match="finite, symmetric"):
        cf.LayerWise(lambda L: torch.ones(L, L).triu()).update(rows)


@pytest.mark.parametrize("side", ["rows", "parameters"])
def test_an_indefinite_structure_says_so_where_positivity_is_needed(side: str) -> None:
    data = case("mlp", "mse")
    structure = cf.BlockTridiagonal(side=side).update(data.rows)
    lowest = float(structure.eigvalsh().min())
    assert lowest < 0
    message = (
        rf"block-tridiagonal structure, layers 0, 2, 4, has the eigenvalue {lowest:.3g} .*damping above {-lowest:.3g}"
    )
    with pytest.raises(NotPositiveDefinite, match=message):
        structure.logdet(0.0)
    with pytest.raises(NotPositiveDefinite):
        structure.logdet(-0.9 * lowest)
    dense = structure.to_dense() - 1.1 * lowest * torch.eye(structure.space.size, dtype=DOUBLE)
    assert structure.logdet(-1.1 * lowest) == pytest.approx(float(torch.logdet(dense)))
    v = draw(structure.space.size)
    solution = structure.solve(v, -0.5 * lowest)
    assert_close(structure.matvec(solution) - 0.5 * lowest * solution, v, 1e-9)
    with pytest.warns(IllConditioned, match="block '0, 2, 4': condition number about .* Use another damping"):
        structure.solve(v, -lowest)


@pytest.mark.parametrize("spec", SPECS)
def test_what_lies_outside_the_range_is_reported(spec: str) -> None:
    data = case("mlp", "ce", N=2)
    structure = build(spec, list(positions(data.model))).update(data.rows)
    dense = structure.to_dense()
    values, vectors = torch.linalg.eigh(dense)
    top = vectors[:, values.abs().argmax()]
    solution, info = structure.solve(top, 0.0, info=True)
    assert_close(dense @ solution, top, 1e-9)
    assert float(info.outside) < 1e-6
    if spec in ("diagonal", "component-wise-kernel-rows", "adaptive-inverse"):  # none is null
        return
    if "kfac" in spec:  # the range of K-FAC's factors, which holds EKFAC's, too
        projector = data.reference.kronecker() @ data.reference.kronecker(undamped_inverse=True)
    else:
        projector = pinv(dense) @ dense
    null = draw(len(dense)) - projector @ draw(len(dense))
    null = null / null.norm()
    with pytest.warns(OutsideRange, match=rf"0\.6 of the right-hand side's norm .* undamped {structure.key} structure"):
        solution, info = structure.solve(0.8 * top + 0.6 * null, 0.0, info=True)
    assert_close(dense @ solution, 0.8 * top, 1e-9)
    assert float(info.outside) == pytest.approx(0.6)


def test_vectors_and_coefficients_must_fit() -> None:
    data = case("mlp", "mse")
    structure = cf.Full().update(data.rows)
    with pytest.raises(ValueError, match=r"Coefficients are \[R\] or \[K, R\] with R = 12"):
        structure.lift(draw(11), 0.1)
    with pytest.raises(ValueError, match="needs 64 entries"):
        structure.matvec(draw(63))
    named = structure.space.unflatten(draw(64))
    del named["0.bias"]
    with pytest.raises(ValueError, match=r"lacks the parameters 0\.bias"):
        structure.solve(named, 0.1)
    other = case("cnn", "mse").separate
    for jacobian, test in ((other, None), (data.separate, other)):
        with pytest.raises(ValueError, match="other parameters"):
            structure.response(jacobian, 0.1, test=test)


def test_what_does_not_fit_in_memory_says_its_size_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WORTH_CHECKING", 0)
    rows = case("mlp").rows
    for made, elements in [
        (cf.Full(side="parameters"), rows.P**2),
        (cf.Full(side="rows"), rows.R**2),
        (cf.KFAC(), sum(f.shape[-1] ** 2 for layer in rows.layers for f in layer.factors)),
        (cf.Diagonal(), rows.P),
        (cf.UnitWise(side="parameters"), sum(layer.layout.units * layer.layout.width**2 for layer in rows.layers)),
    ]:
        needed = 16 * elements
        monkeypatch.setattr(memory, "available_memory", lambda _, n=needed: n)
        type(made)(**made.options).update(rows)
        monkeypatch.setattr(memory, "available_memory", lambda _, n=needed: n - 1)
        with pytest.raises(MemoryError, match=rf"The {made.key} structure needs .* are available"):
            made.update(rows)
        assert not made.updated
