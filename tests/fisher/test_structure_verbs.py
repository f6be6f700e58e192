"""Structures × kinds × networks: every verb against the dense matrix that the definition gives."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fisher_cases import NETWORKS, Case, case, draw
from fisher_oracle import PLAIN_SPECS, SPECS, build, dense_structure, pinv, positions
from oracle import DOUBLE
from torch import Tensor, nn

import curvlab.fisher as cf
from curvlab.rows import products, sqrt_fisher
from curvlab.testing.oracle import assert_close

LOSSES = {"mlp": "ce-all", "cnn": "mse", "sequence": "ce-ignore"}


def cases(**specs_by_kind: Iterable[str]) -> list[Any]:
    return [
        pytest.param(network, kind, spec, id=f"{network}-{kind}-{spec}")
        for network in NETWORKS
        for kind, specs in specs_by_kind.items()
        for spec in specs
    ]


def fitted(spec: str, data: Case) -> tuple[cf.Structure, Tensor]:
    place = positions(data.model)
    return build(spec, list(place)).update(data.rows), dense_structure(spec, data.reference, place)


def damping_for(dense: Tensor) -> float:
    """Return a damping that makes an indefinite matrix positive."""
    values = torch.linalg.eigvalsh(dense)
    return float(0.01 * values.max() + 1.5 * values.min().clamp_max(0).abs())


@pytest.mark.parametrize(
    ("network", "kind", "spec"), cases(exact=SPECS, ggn=PLAIN_SPECS, mc=PLAIN_SPECS, empirical=SPECS)
)
def test_verbs_equal_the_dense_matrix(network: str, kind: str, spec: str) -> None:
    data = case(network, LOSSES[network], kind=kind)
    structure, dense = fitted(spec, data)
    P = data.reference.P
    space, v = structure.space, draw(2, P)

    assert_close(structure.to_dense(), dense)
    assert_close(structure.matvec(v), v @ dense)
    assert structure.trace() == pytest.approx(float(dense.trace()), rel=1e-10)
    values = torch.linalg.eigvalsh(dense)
    assert_close(structure.eigvalsh(), values, 1e-9)
    assert structure.largest_eigenvalue() == pytest.approx(float(values.max()), rel=1e-9)

    rho = damping_for(dense)
    damped = dense + rho * torch.eye(P, dtype=DOUBLE)
    assert_close(structure.solve(v, rho), torch.linalg.solve(damped, v.T).T, 1e-9)
    assert structure.logdet(rho) == pytest.approx(float(torch.linalg.slogdet(damped).logabsdet), rel=1e-9)
    relative = f"rel:{rho / float(values.max())!r}"
    assert_close(space.flatten(structure.solve(space.unflatten(v), relative)), structure.solve(v, rho), 1e-7)

    c = draw(3, data.rows.R)
    lifted = torch.linalg.solve(damped, data.rows.dense().T @ c.T).T
    assert_close(space.flatten(structure.lift(c, rho)), lifted, 1e-9)

    J, separate, (elsewhere, other) = data.reference.rows_of_J(), data.separate, data.elsewhere
    inverse, count = torch.linalg.inv(damped), data.reference.count
    assert structure.count == pytest.approx(count)
    assert_close(structure.response(separate, rho), J @ inverse @ J.T / count, 1e-9)
    assert_close(structure.response(separate, rho, test=elsewhere), other @ inverse @ J.T / count, 1e-9)
    assert_close(structure.response(elsewhere, rho), other @ inverse @ other.T / count, 1e-9)
    S = data.rows.dense()
    assert_close(structure.response(data.rows, rho), S @ inverse @ S.T / count, 1e-9)
    if kind in ("exact", "ggn"):
        own = data.rows.jacobian()
        assert_close(structure.response(own, rho), J @ inverse @ J.T / count, 1e-9)
        assert_close(structure.response(own, rho, test=elsewhere), other @ inverse @ J.T / count, 1e-9)


@pytest.mark.filterwarnings("ignore::curvlab.errors.OutsideRange")
@pytest.mark.parametrize(("network", "kind", "spec"), cases(exact=SPECS, mc=PLAIN_SPECS, empirical=PLAIN_SPECS))
def test_undamped_verbs_are_those_of_the_pseudo_inverse(network: str, kind: str, spec: str) -> None:
    data = case(network, LOSSES[network], kind=kind)
    structure, dense = fitted(spec, data)
    inverse = data.reference.kronecker(SPECS[spec][1].get("sharing", "expand"), undamped_inverse=True)
    inverse = inverse if spec in ("kfac", "kfac-reduce") else pinv(dense)
    tolerance = 1e-12 * float(inverse.norm() * dense.norm())
    v, c = draw(2, data.reference.P), draw(data.rows.R)

    solution, info = structure.solve(v, 0.0, info=True)
    assert_close(solution, v @ inverse, tolerance)
    within = v @ inverse @ dense
    assert info.damping == 0
    assert float((info.outside - (v - within).norm(dim=1) / v.norm(dim=1)).abs().max()) < 1e-7
    assert_close(structure.space.flatten(structure.lift(c, 0)), inverse @ data.rows.dense().T @ c, tolerance)
    J, separate, (elsewhere, other) = data.reference.rows_of_J(), data.separate, data.elsewhere
    count = data.reference.count
    assert_close(structure.response(separate, 0), J @ inverse @ J.T / count, tolerance)
    assert_close(structure.response(separate, 0, test=elsewhere), other @ inverse @ J.T / count, tolerance)
    if kind == "exact":
        assert_close(structure.response(data.rows.jacobian(), 0), J @ inverse @ J.T / count, tolerance)


@pytest.mark.parametrize("spec", SPECS)
def test_vectors_travel_in_every_form(spec: str) -> None:
    structure, dense = fitted(spec, case("cnn", "mse"))
    v, space = draw(2, len(dense)), structure.space
    rho = damping_for(dense)
    for verb in (structure.matvec, lambda x: structure.solve(x, rho)):
        block = verb(v)
        assert_close(verb(v[0]), block[0], 1e-12)
        named = verb(space.unflatten(v[1]))
        assert {name: value.shape for name, value in named.items()} == dict(space.shapes)
        assert_close(space.flatten(named), block[1], 1e-12)
        named = verb(space.unflatten(v))
        assert {name: value.shape[1:] for name, value in named.items()} == dict(space.shapes)
        assert_close(space.flatten(named), block, 1e-12)
    c = draw(2, structure.rows.R)
    assert_close(space.flatten(structure.lift(c[0], rho)), space.flatten(structure.lift(c, rho))[0], 1e-12)


def test_responses_of_units_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = case("cnn", "ce")
    structure, dense = fitted("unit-wise-rows", data)
    J, rho = data.rows.jacobian(), damping_for(dense)
    test = replace(J, layers=tuple(layer.scale(2.0) for layer in J.layers))
    whole, across = structure.response(J, rho), structure.response(J, rho, test)
    assert_close(across, 2 * whole, 1e-9)
    monkeypatch.setattr(products, "CACHE_ELEMENTS", 2 * J.R**2)
    assert_close(structure.response(J, rho), whole, 1e-12)
    assert_close(structure.response(J, rho, test), across, 1e-12)


@pytest.mark.parametrize("key", ["full", "block-diagonal", "unit-wise"])
def test_the_response_of_a_softmax_over_one_class(key: str) -> None:
    """Its Fisher matrix is zero."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    rows = sqrt_fisher(model, nn.CrossEntropyLoss(), draw(4, 5), torch.zeros(4, dtype=torch.long))
    response = cf.make(key).update(rows).response(rows.jacobian(), 0.5)
    assert_close(response, rows.jacobian().gram() / (0.5 * 4))


@pytest.mark.parametrize("spec", SPECS)
def test_response_is_jacobian_solve_jacobian(spec: str) -> None:
    """What `response` computes block by block is what the verbs of the rows and `solve` give."""
    data = case("sequence", "ce-ignore")
    structure, dense = fitted(spec, data)
    J, rho = data.rows.jacobian(), damping_for(dense)
    identity = torch.eye(J.R, dtype=DOUBLE)
    step = structure.solve(J.rmatvec(identity), rho)
    assert_close(structure.response(J, rho), J.matvec(step).T / structure.count, 1e-9)
