"""The adaptive inverse: against inverses of dense averages, and the claims of Amari et al. 2000 and Park & Lee 2019."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from fisher_cases import batches, case, draw, rows_and_references, rows_of
from fisher_oracle import halves, positions
from oracle import DOUBLE
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvlab.errors import NotPositiveDefinite
from curvlab.fisher import AdaptiveInverse, memory
from curvlab.fisher.adaptive_inverse import Recursion
from curvlab.fisher.memory import matrix_elements
from curvlab.nn import HalfSquaredError
from curvlab.rows import Rows, sqrt_fisher
from curvlab.testing import check_structure
from curvlab.testing.oracle import assert_close

RECURSIONS = get_args(Recursion)
GRID = [(e, z) for e in (0.05, 0.3, 0.9) for z in (0.01, 0.9, 1.1, 100.0)]
"""Rates, and largest eigenvalues of G⁻¹F at the start, in units of the one up to which the first-order recursion is stable."""


def regression(outputs: int = 1, inputs: int = 3, N: int = 20) -> Rows:
    """Rows of a linear network, whose Fisher matrix is positive definite."""
    model = nn.Linear(inputs, outputs).double()
    return sqrt_fisher(model, HalfSquaredError(), draw(N, inputs), draw(N, outputs, seed=1))


def fisher(rows: Rows) -> Tensor:
    S = rows.dense()
    return S.T @ S


def inverse_of(structure: AdaptiveInverse) -> Tensor:
    return structure.solve(torch.eye(structure.space.size, dtype=DOUBLE), 0.0)


# --- against dense averages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("partition", [None, halves, list], ids=["whole", "halves", "every parameter"])
def test_woodbury_is_the_inverse_of_the_averaged_matrix(partition: Any, reduction: str) -> None:
    """Blocks smaller than the number of rows take them in by parts."""
    data = case("mlp", "ce-weights", reduction, N=6)
    names, place = list(positions(data.model)), positions(data.model)
    structure = AdaptiveInverse(partition=partition and partition(names), prior=0.7, scale=2.0)
    label = torch.zeros(data.reference.P, dtype=torch.long)
    for k, group in enumerate([names] if partition is None else partition(names)):
        for name in [group] if isinstance(group, str) else group:
            label[place[name]] = k
    total, weight = 0.7 * 2.0 * torch.eye(len(label), dtype=DOUBLE), 0.7
    for (rows, ref), decay in zip(zip(*rows_and_references(data), strict=True), (1.0, 0.6, 0.9), strict=True):
        structure.update(rows, decay)
        total = decay * total + ref.terms * ref.masked(torch.eye(len(label), dtype=DOUBLE), label)
        weight = decay * weight + ref.terms
        inverse = torch.linalg.inv(total / weight)
        found = inverse_of(structure)
        assert_close(found, inverse, 1e-10)
        assert torch.equal(found, found.T)
        assert_close(structure.to_dense(), total / weight, 1e-10)
        v = draw(2, len(label))
        assert_close(
            structure.solve(v, 0.3),
            torch.linalg.solve(total / weight + 0.3 * torch.eye(len(label), dtype=DOUBLE), v.T).T,
            1e-10,
        )


@pytest.mark.parametrize(("rate", "rates"), [(0.2, (0.2, 0.2, 0.2)), ("0.8/t", (0.5, 0.4, 0.8 / 3))])
def test_a_rate_is_used_whatever_the_decay(rate: float | str, rates: tuple[float, ...]) -> None:
    data = case("mlp", "ce", N=6)
    parts, _ = rows_and_references(data)
    woodbury, first = (AdaptiveInverse(recursion=recursion, rate=rate, scale=3.0) for recursion in RECURSIONS)
    G = 3.0 * torch.eye(data.reference.P, dtype=DOUBLE)
    inverse = torch.linalg.inv(G)
    for rows, decay, e in zip(parts, (0.0, 1.0, 0.3), rates, strict=True):
        woodbury.update(rows, decay)
        first.update(rows, decay)
        F = fisher(rows)
        G = (1 - e) * G + e * F
        inverse = (1 + e) * inverse - e * inverse @ F @ inverse
        assert_close(woodbury.to_dense(), G, 1e-10)
        assert_close(inverse_of(first), inverse, 1e-10)
    fresh = AdaptiveInverse(rate=rate, scale=3.0).update(parts[0])
    assert_close(woodbury.update(parts[0], 0.0).to_dense(), fresh.to_dense(), 1e-12)


def test_equal_batches_at_a_decay_come_to_its_rate() -> None:
    rows, d = regression(), 0.8
    structure = AdaptiveInverse().update(rows)
    for _ in range(60):
        structure.update(rows, d)
    before = structure.to_dense()
    other = regression(N=20)
    after = structure.update(other, d).to_dense()
    assert_close(after, d * before + (1 - d) * fisher(other), 1e-5)


def test_a_state_that_is_taken_up_goes_on() -> None:
    data = case("mlp", "ce", N=6)
    parts, _ = rows_and_references(data)
    structure, again = AdaptiveInverse(rate="1/t").update(parts[0]), AdaptiveInverse(rate="1/t")
    again.load_state_dict(structure.state_dict())
    for one in (structure, again):
        one.update(parts[1], 0.5)
    assert_close(again.to_dense(), structure.to_dense(), 1e-14)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_a_fit_takes_batches_in_one_after_the_other(recursion: Recursion) -> None:
    data = case("mlp", "ce", N=6)
    fitted = AdaptiveInverse.fit(data.model, data.loss, batches(data), recursion=recursion, scale=2.0)
    structure = AdaptiveInverse(recursion=recursion, scale=2.0)
    for rows in rows_and_references(data)[0]:
        structure.update(rows, 1.0)
    assert_close(fitted.to_dense(), structure.to_dense(), 1e-10)


def test_its_memory_is_that_of_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    data = case("mlp", "ce")
    P = data.reference.P
    assert matrix_elements(AdaptiveInverse(), data.rows) == P**2
    sizes = [len(at) for at in positions(data.model).values()]
    assert matrix_elements(AdaptiveInverse(partition=list(positions(data.model))), data.rows) == sum(
        n**2 for n in sizes
    )
    monkeypatch.setattr(memory, "WORTH_CHECKING", 0)
    monkeypatch.setattr(memory, "available_memory", lambda _: 8 * P**2)
    with pytest.raises(MemoryError, match="The adaptive-inverse structure needs"):
        AdaptiveInverse().update(data.rows)


@pytest.mark.parametrize("options", [{}, {"partition": None, "prior": 3.0, "scale": 0.5}])
def test_it_keeps_the_promises_of_all_structures(options: dict[str, Any]) -> None:
    check_structure(AdaptiveInverse, **options)


# --- claims -----------------------------------------------------------------------------------------------------------


def test_exact_rows_are_the_columns_of_the_paper() -> None:
    """Claim 1: q_k = ∇f_k/√f_k of probabilities f for a softmax, with the first-order rule over a batch."""
    data, e = case("mlp", "ce"), 0.1
    parameters = {name: p.detach() for name, p in data.model.named_parameters()}

    def probabilities(values: dict[str, Tensor]) -> Tensor:
        return functional_call(data.model, values, (data.inputs,)).softmax(1)

    f = probabilities(parameters)
    derivative = jacrev(probabilities)(parameters)
    Q = torch.cat([derivative[name].flatten(2) for name in parameters], 2) / f.sqrt()[..., None]
    Q = Q.flatten(0, 1).T
    rows = rows_of(data.model, nn.CrossEntropyLoss(), data.inputs, data.targets)
    assert_close(fisher(rows), Q @ Q.T / len(f), 1e-10)
    found = AdaptiveInverse(recursion="first-order", rate=e).update(rows)
    identity = torch.eye(len(Q), dtype=DOUBLE)
    assert_close(inverse_of(found), (1 + e) * identity - e / len(f) * Q @ Q.T, 1e-10)


@pytest.mark.parametrize("recursion", RECURSIONS)
@pytest.mark.parametrize("e", [0.1, 0.3])
def test_both_recursions_come_to_the_inverse_of_a_fixed_matrix_at_one_minus_the_rate(
    e: float, recursion: Recursion
) -> None:
    """Claim 2."""
    rows = regression()
    inverse = torch.linalg.inv(fisher(rows))
    structure = AdaptiveInverse(recursion=recursion, rate=e, scale=float(torch.linalg.eigvalsh(fisher(rows)).max()))
    errors = []
    for _ in range(round(12 / e)):
        structure.update(rows, 1.0)
        errors.append(float((inverse_of(structure) - inverse).norm()))
    assert errors[-1] < 1e-3 * errors[0]
    assert errors[-1] / errors[-2] == pytest.approx(1 - e, rel=1e-3)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("e", "z"), GRID)
def test_the_first_order_recursion_diverges_above_its_threshold_and_woodbury_nowhere(
    e: float, z: float, outputs: int
) -> None:
    """Claims 3 and 4: in one dimension, and for matrices by the largest eigenvalue of G⁻¹F."""
    rows = regression(outputs, inputs=2 if outputs > 1 else 1, N=9)
    F = fisher(rows)
    threshold = (1 + e) / e
    scale = float(torch.linalg.eigvalsh(F).max()) / (z * threshold)
    woodbury = AdaptiveInverse(rate=e, scale=scale)
    for _ in range(20):
        woodbury.update(rows, 1.0)
        assert float(torch.linalg.eigvalsh(inverse_of(woodbury)).min()) > 0
    first = AdaptiveInverse(recursion="first-order", rate=e, scale=scale)
    if z < 1:
        for _ in range(round(40 / e + 20)):
            first.update(rows, 1.0)
        assert float(torch.linalg.eigvalsh(inverse_of(first)).min()) > 0
        if z > 0.1:
            assert_close(inverse_of(first), torch.linalg.inv(F), 1e-6)
        return
    with pytest.raises(
        NotPositiveDefinite, match="the inverse has the eigenvalue -.*first-order recursion diverges"
    ) as told:
        first.update(rows)
    assert f"{z * threshold:.3g}, is above {threshold:.3g}. Use recursion='woodbury'" in str(told.value)


def test_an_update_that_diverges_leaves_the_state() -> None:
    rows = regression()
    first = AdaptiveInverse(recursion="first-order", rate=0.1, scale=10.0).update(rows)
    before = inverse_of(first)
    with pytest.raises(NotPositiveDefinite):
        first.update(Rows(**{**vars(rows), "layers": tuple(layer.scale(1e3) for layer in rows.layers)}), 1.0)
    assert torch.equal(inverse_of(first), before)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_a_batch_and_its_samples_one_by_one_differ_by_the_rate_squared(recursion: Recursion) -> None:
    """Claim 5."""
    data, B = case("mlp", "ce", N=6), 6
    singles, _ = rows_and_references(data, tuple((n, n + 1) for n in range(B)))
    gaps = []
    for e in (0.02, 0.01, 0.005):
        batch = AdaptiveInverse(recursion=recursion, rate=e).update(data.rows)
        online = AdaptiveInverse(recursion=recursion, rate=e / B)
        for rows in singles:
            online.update(rows, 1.0)
        gaps.append(float((inverse_of(batch) - inverse_of(online)).norm()))
    for larger, smaller in pairwise(gaps):
        assert larger / smaller == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_the_inverse_grows_where_no_batch_has_a_gradient_and_damping_bounds_the_step(recursion: Recursion) -> None:
    """Claim 6."""
    data, e, steps = case("mlp", "ce", N=2), 0.2, 25
    structure = AdaptiveInverse(recursion=recursion, rate=e)
    for _ in range(steps):
        structure.update(data.rows, 1.0)
    values, vectors = torch.linalg.eigh(fisher(data.rows))
    unseen = vectors[:, values < 1e-12 * values.max()].T
    assert 0 < len(unseen) < len(values)
    growth = (1 + e) ** steps if recursion == "first-order" else (1 - e) ** -steps
    assert_close(structure.solve(unseen, 0.0), growth * unseen, 1e-8)
    assert_close(structure.solve(unseen, 0.5), unseen / (1 / growth + 0.5), 1e-8)


@pytest.mark.filterwarnings("ignore::curvlab.errors.IllConditioned")
def test_rounding_that_eats_up_an_eigenvalue_is_an_error() -> None:
    data = case("mlp", "ce", N=2)
    structure, rows = AdaptiveInverse(rate=0.5), data.rows.to(torch.float32)
    v = draw(1, data.reference.P).float()

    def train() -> None:
        for _ in range(120):
            structure.update(rows, 1.0).solve(v, 0.1)

    with pytest.raises(NotPositiveDefinite, match=r"(float64|decay nearer to 1)"):
        train()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_options_are_checked() -> None:
    for options, message in (
        ({"recursion": "woodburry"}, r"Unknown recursion 'woodburry'\. Did you mean 'woodbury'"),
        ({"rate": 1.0}, r'rate is a number in \(0, 1\), or a string such as "1/t", got 1\.0'),
        ({"rate": "t"}, "got 't'"),
        ({"rate": "-1/t"}, "got '-1/t'"),
        ({"prior": 0.0}, r"prior is a finite number > 0, got 0\.0"),
        ({"scale": float("inf")}, "scale is a finite number > 0, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveInverse(**options)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_rows_that_are_not_finite_are_an_error(recursion: Recursion) -> None:
    rows = regression()
    broken = Rows(**{**vars(rows), "layers": tuple(layer.scale(float("nan")) for layer in rows.layers)})
    with pytest.raises(FloatingPointError, match="overflow, as after a run has diverged"):
        AdaptiveInverse(recursion=recursion).update(broken)
