"""Outputs of a layer in groups, such as heads of attention: B block-diagonal, and one A, against dense matrices."""

from typing import Any

import pytest
import torch
from fisher_oracle import pinv
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.fisher import EKFAC, KFAC, PerLayer, Structure, make
from curvlab.optim import Preconditioner
from curvlab.rows import Rows
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close

IN, OUT, T, N = 3, 6, 4, 5
PACKED = torch.cat([torch.arange(OUT * IN).view(OUT, IN), OUT * IN + torch.arange(OUT)[:, None]], dim=1).flatten()
"""Where the packed layer's weights and biases are, in the order `(o, i)`."""


class Sequence(nn.Module):
    """A packed layer at T positions."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.last = nn.Linear(IN, OUT), nn.Linear(OUT, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.packed(x)).mean(1))


@pytest.fixture
def case() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Sequence().to(DOUBLE), nn.CrossEntropyLoss(), torch.randn(N, T, IN, dtype=DOUBLE), torch.randint(2, (N,))


def factors(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B, and the block itself in the order `(o, i)`, of the packed layer."""
    layer = rows.layers[0]
    assert isinstance(layer, KroneckerRows)
    a, g = layer.a[:, :, 0], layer.g[:, :, :, 0]
    dense = layer.dense()
    return torch.einsum("nti,ntj->ij", a, a) / (N * T), torch.einsum("vnto,vntp->op", g, g), dense.T @ dense


def expected(rows: Rows, groups: int, corrected: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B without what couples groups, and the block, whose values an EKFAC has corrected."""
    A, B, F = factors(rows)
    blocks = [B.reshape(groups, OUT // groups, groups, OUT // groups)[k, :, k] for k in range(groups)]
    B = torch.block_diag(*blocks)
    if not corrected:
        return A, B, torch.kron(B, A)
    K = torch.kron(
        torch.block_diag(*(torch.linalg.eigh(block).eigenvectors.contiguous() for block in blocks)),
        torch.linalg.eigh(A).eigenvectors.contiguous(),
    )
    return A, B, K @ (K.T @ F @ K).diagonal().diag() @ K.T


def structure_of(kind: type[KFAC], groups: int, **options: Any) -> Structure:
    return PerLayer({"packed": kind(output_groups=groups, **options), "*": kind(**options)})


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_the_block_its_products_and_solves(case: Any, kind: type[KFAC], groups: int) -> None:
    model, loss, x, y = case
    rows = sqrt_fisher(model, loss, x, y)
    _, _, dense = expected(rows, groups, kind is EKFAC)
    rho = 0.1
    for structure in (structure_of(kind, groups).update(rows), structure_of(kind, groups).update(rows, 0.0)):
        whole = structure.to_dense()
        assert_close(whole[PACKED[:, None], PACKED], dense)
        v = torch.randn(rows.P, dtype=DOUBLE)
        assert_close(structure.matvec(v), whole @ v)
        assert_close(structure.solve(v, rho), torch.linalg.solve(whole + rho * torch.eye(rows.P, dtype=DOUBLE), v))
        g = structure.space.flatten(rows.rmatvec(torch.ones(rows.R, dtype=DOUBLE)))
        lifted = structure.lift(torch.ones(rows.R, dtype=DOUBLE), rho)
        assert_close(structure.space.flatten(lifted), structure.solve(g, rho), 1e-8)
        assert abs(float(structure.trace()) - float(whole.trace())) < 1e-10
        J = rows.jacobian()
        assert_close(
            structure.response(J, rho),
            J.dense() @ torch.linalg.solve(whole + rho * torch.eye(rows.P, dtype=DOUBLE), J.dense().T) / rows.count,
            1e-8,
        )


@pytest.mark.parametrize("equal", [True, "equal"])
def test_factored_damping_shares_the_split_between_groups(case: Any, equal: Any) -> None:
    model, loss, x, y = case
    rows = sqrt_fisher(model, loss, x, y)
    structure = structure_of(KFAC, 3, factored_damping=equal).update(rows)
    (A, B, _), rho = expected(rows, 3, False), 0.1
    pi = 1.0 if equal == "equal" else float((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
    damped = torch.kron(
        torch.linalg.inv(B + rho**0.5 / pi * torch.eye(len(B), dtype=DOUBLE)),
        torch.linalg.inv(A + rho**0.5 * pi * torch.eye(len(A), dtype=DOUBLE)),
    )
    v = torch.zeros(rows.P, dtype=DOUBLE)
    v[PACKED] = torch.randn(OUT * (IN + 1), dtype=DOUBLE)
    assert_close(structure.solve(v, rho)[PACKED], damped @ v[PACKED])
    c = torch.randn(rows.R, dtype=DOUBLE)
    assert_close(
        structure.space.flatten(structure.lift(c, rho)),
        structure.solve(structure.space.flatten(rows.rmatvec(c)), rho),
        1e-8,
    )


def test_undamped_solves_and_one_group(case: Any) -> None:
    model, loss, x, y = case
    rows = sqrt_fisher(model, loss, x, y)
    one = KFAC(output_groups=1).update(rows)
    assert_close(one.to_dense(), make("kfac").update(rows).to_dense())
    structure = structure_of(KFAC, 2).update(rows)
    v = structure.to_dense() @ torch.randn(rows.P, dtype=DOUBLE)
    assert_close(structure.solve(v, 0), pinv(structure.to_dense()) @ v, 1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_a_step_fits_and_a_saved_state(case: Any, factored: bool) -> None:
    model, loss, x, y = case
    options: Any = {"factored_damping": factored}
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    whole = structure_of(KFAC, 3, **options).update(sqrt_fisher(model, loss, x, y))
    fit = PerLayer.fit(model, loss, parts, choices={"packed": KFAC(output_groups=3, **options), "*": KFAC(**options)})
    assert_close(fit.to_dense(), whole.to_dense())
    training = Preconditioner(model, loss, structure_of(KFAC, 3, **options), kind="exact", damping=0.1, kl_clip=None)
    with training.collect():
        loss(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    training.precondition()
    step = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(step, whole.solve(gradient, 0.1), 1e-8)
    again = structure_of(KFAC, 3, **options)
    again.load_state_dict(whole.state_dict())
    assert_close(again.solve(gradient, 0.1), whole.solve(gradient, 0.1))


def test_outputs_that_cannot_be_cut_are_refused_by_name(case: Any) -> None:
    model, loss, x, y = case
    with pytest.raises(ValueError, match=r"output_groups=4 does not cut layer 'packed'.*PerLayer"):
        KFAC(output_groups=4).update(sqrt_fisher(model, loss, x, y))
    with pytest.raises(ValueError, match="output_groups is a number of groups"):
        KFAC(output_groups=0)


class Attention(nn.Module):
    """Packed projections inside a module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("groups", [3, 6])
def test_heads_of_packed_attention(groups: int) -> None:
    """B without what couples queries, keys and values, or their heads, is K-FAC's own, masked."""
    torch.manual_seed(1)
    model, loss, x = Attention().to(DOUBLE), nn.CrossEntropyLoss(), torch.randn(N, T, 4, dtype=DOUBLE)
    rows = sqrt_fisher(model, loss, x, torch.randint(2, (N,)))
    cut = PerLayer({"*in_proj": KFAC(output_groups=groups), "*": KFAC()}).update(rows)
    group = []
    for name, shape in cut.space.shapes.items():
        within = (
            torch.arange(shape.numel()) * groups // shape.numel() if "in_proj" in name else torch.zeros(shape.numel())
        )
        group.append(within.long() + 100 * ("in_proj" not in name))
    label = torch.cat(group)
    whole = KFAC().update(rows).to_dense()
    assert_close(cut.to_dense(), whole * (label[:, None] == label))
