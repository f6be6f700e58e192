"""Losses × reductions × kinds on one network, against the definitions of the Fisher matrices."""

from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import pytest
import torch
from oracle import CLASSES, LOSSES, LossCase, architecture, loss_case, ramp
from row_cases import fisher, generator
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab.rows
from curvlab.errors import StateError
from curvlab.nn import HalfSquaredError
from curvlab.rows import merge, sqrt_fisher
from curvlab.rows.loss import Draws, identity_cotangents, likelihood, loss_terms
from curvlab.testing.oracle import (
    assert_close,
    count_of,
    dense_empirical,
    dense_ggn,
    dense_jacobian,
    outputs,
    term_weights,
)

NETWORKS = {"[N, C]": "mlp", "[N, C, X]": "conv1d-grid", "[N, C, H, W]": "conv2d-grid"}
REDUCTIONS = ("mean", "sum")
CASES = [pytest.param(case, id=case.name) for case in LOSSES]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_kinds_equal_their_definitions(case: LossCase, reduction: str, network: str) -> None:
    model, x = architecture(NETWORKS[network]).make(N=3)
    z = outputs(model, x)
    loss, y = case.make(z, reduction)
    J = dense_jacobian(model, x)
    reference = dense_ggn(J, loss, z, y)
    exact = sqrt_fisher(model, loss, x, y)
    assert_close(fisher(exact), reference)
    assert_close(fisher(sqrt_fisher(model, loss, x, y, kind="ggn")), reference)
    assert_close(exact.gram(), exact.dense() @ exact.dense().T)
    assert_close(exact.jacobian().dense(), J)
    empirical = sqrt_fisher(model, loss, x, y, kind="empirical")
    assert_close(fisher(empirical), dense_empirical(J, loss, z, y))
    positions = z[0, 0].numel()
    assert exact.shape == (CLASSES * positions, 3)
    assert empirical.shape == (positions, 3)
    mc = sqrt_fisher(model, loss, x, y, kind="mc", draws=2, generator=generator())
    assert mc.shape == (2, 3)
    assert sqrt_fisher(model, loss, x, y, "mc", draws=2, generator=generator(), rows="term").shape == (2 * positions, 3)
    weights = term_weights(loss, z, y).mean(1).reshape(3, -1).sum(1)
    for rows in (exact, empirical, mc):
        assert rows.count == pytest.approx(count_of(loss, z, y), rel=1e-12)
        assert rows.terms == pytest.approx(rows.count if reduction == "mean" else 3, rel=1e-12)
        assert rows.reduction == reduction
        assert_close(rows.sample_weights, weights)


@pytest.mark.parametrize("case", CASES)
def test_empirical_rows_of_a_sum_add_to_the_gradient(case: LossCase) -> None:
    """Undoing each row's weight gives ∇loss, so rows carry the sign and scale of the user's loss."""
    model, x = architecture("one-output" if case.name.startswith("bce") else "mlp").make(N=5)
    z = outputs(model, x)
    loss, y = case.make(z, "mean")
    rows = sqrt_fisher(model, loss, x, y, kind="empirical")
    gradient = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    weights = term_weights(loss, z, y).mean(1)
    total = rows.rmatvec((weights * 1.0).sqrt() / rows.count**0.5)
    for expected, name in zip(gradient, rows.space.shapes, strict=True):
        assert_close(total[name], expected)


def enumerated_targets(case: LossCase, z: Tensor) -> list[tuple[Tensor, float]]:
    """List targets and probabilities whose moments up to the second are those of y ~ model."""
    if case.name in ("mse", "half"):
        spread = 1.0 if case.name == "half" else 0.5**0.5
        signs = [torch.tensor(s, dtype=z.dtype).view_as(z) for s in product((-1.0, 1.0), repeat=z.numel())]
        return [(z + spread * sign, 1 / len(signs)) for sign in signs]
    if case.name.startswith("ce"):
        p = z.softmax(1).movedim(1, -1).reshape(-1, z.shape[1])
        drawn = [torch.tensor(c) for c in product(range(z.shape[1]), repeat=len(p))]
        return [(c.view(z.shape[0], *z.shape[2:]), float(p[torch.arange(len(p)), c].prod())) for c in drawn]
    p = z.sigmoid()
    drawn = [torch.tensor(b, dtype=z.dtype).view_as(z) for b in product((0.0, 1.0), repeat=z.numel())]
    return [(b, float(torch.where(b > 0, p, 1 - p).prod())) for b in drawn]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("name", "network", "N"),
    [
        *(("mse", "mlp", 1), ("half", "mlp", 1), ("ce", "mlp", 2), ("bce", "mlp", 1), ("bce-weight", "mlp", 1)),
        *(("mse", "conv1d-grid", 1), ("ce", "conv1d-grid", 1), ("bce-weight", "conv1d-grid", 1)),
    ],
)
def test_mean_of_empirical_over_targets_of_the_model_is_exact(name: str, network: str, N: int, reduction: str) -> None:
    case = loss_case(name)
    model, x = architecture(network).make(N)
    pick = None if network == "mlp" else lambda z: z[..., :2]
    z = outputs(model, x, pick or (lambda z: z))
    loss, _ = case.make(z, reduction)
    mean = torch.zeros(())
    for y, probability in enumerated_targets(case, z):
        mean = mean + probability * fisher(sqrt_fisher(model, loss, x, y, kind="empirical", output=pick))
    assert_close(mean, fisher(sqrt_fisher(model, loss, x, enumerated_targets(case, z)[0][0], output=pick)))


def test_mean_of_empirical_with_ignored_positions_is_exact() -> None:
    model, x = architecture("conv1d-grid").make(N=1)
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    mean = torch.zeros(())
    for y, probability in enumerated_targets(loss_case("ce"), outputs(model, x)[..., 1:]):
        full = torch.cat([torch.full((1, 1), -1), y], dim=1)
        mean = mean + probability * fisher(sqrt_fisher(model, loss, x, full, kind="empirical"))
    assert_close(mean, fisher(sqrt_fisher(model, loss, x, torch.tensor([[-1, 0, 0]]))))


def fake_noise(monkeypatch: pytest.MonkeyPatch, noise: Callable[..., Tensor]) -> None:
    """Replace draws of noise at the output, `[samples, N, C, X]`."""
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: noise(*shape) if len(shape) == 4 else draw(*shape, **how))


def test_classes_are_drawn_with_their_probabilities() -> None:
    """A grid of uniform numbers hits every class as often as its probability says."""
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)[..., None]
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = likelihood.classes_at(p, grid[:, None, None].expand(1000, 2, 1))
    for n in range(2):
        assert drawn[:, n, 0].bincount(minlength=4).tolist() == [round(1000 * q) for q in p[n, :, 0].tolist()]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[:, None, None].expand(2, 2, 1)
    assert likelihood.classes_at(p, edges)[:, :, 0].tolist() == [[0, 1], [3, 1]]


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_a_batch_draw_what_one_would(case: LossCase) -> None:
    model, x = architecture("mlp").make(N=6)
    z = outputs(model, x)
    loss, y = case.make(z, "sum")
    whole = loss_terms(loss, z, y).sampled(Draws(2, generator()))
    parts = [
        loss_terms(loss, z[n], y[n]).sampled(Draws(2, generator(), (n.start, 6))) for n in (slice(0, 2), slice(2, 6))
    ]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("network", ["mlp", "conv1d-grid"])
@pytest.mark.parametrize("case", CASES)
def test_mean_of_mc_is_exact(case: LossCase, network: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the draws by every outcome once: all classes, or all corners ±1 of the noise, in turn."""
    model, x = architecture(network).make(N=2)
    z = outputs(model, x)
    loss, y = case.make(z, reduction)
    C = z.shape[1]
    exact = fisher(sqrt_fisher(model, loss, x, y))
    if isinstance(loss, nn.CrossEntropyLoss):
        monkeypatch.setattr(likelihood, "classes_at", lambda _, u: torch.arange(C)[:, None, None].expand(u.shape))
        rows = sqrt_fisher(model, loss, x, y, kind="mc", draws=C, generator=generator(), rows="term")
        p = z.softmax(1).reshape(2, C, -1)
        probability = p.permute(1, 2, 0).flatten()
    else:
        H = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=z.dtype)

        fake_noise(monkeypatch, lambda samples, N, C, X: H[:, 1:].view(samples, 1, C, 1).expand(samples, N, C, X))
        rows = sqrt_fisher(model, loss, x, y, kind="mc", draws=4, generator=generator(), rows="term")
        probability = torch.full((rows.R,), 0.25, dtype=z.dtype)
    S = rows.dense()
    draws = rows.shape[0] // z[0, 0].numel()
    assert_close(S.T @ (S * (draws * probability)[:, None]), exact)


@pytest.mark.parametrize("name", ["half", "ce-all", "bce-all"])
def test_monte_carlo_converges_as_one_over_the_square_root_of_the_draws(name: str) -> None:
    model, x = architecture("mlp").make(N=3)
    loss, y = loss_case(name).make(outputs(model, x), "mean")
    exact = fisher(sqrt_fisher(model, loss, x, y))
    source = generator(3)

    def error(draws: int) -> float:
        squares = [
            (fisher(sqrt_fisher(model, loss, x, y, "mc", draws=draws, generator=source)) - exact).square().sum()
            for _ in range(30)
        ]
        return float(sum(squares) / len(squares)) ** 0.5

    few, many = error(10), error(1000)
    assert 7 < few / many < 14
    assert many < 0.1 * float(exact.norm())


@pytest.mark.parametrize("name", ["half", "ce", "bce"])
def test_a_generator_determines_the_draws(name: str) -> None:
    model, x = architecture("mlp").make(N=3)
    loss, y = loss_case(name).make(outputs(model, x), "mean")
    source = generator(5)

    def draw(source: torch.Generator, engine: Any = "auto") -> Tensor:
        return sqrt_fisher(model, loss, x, y, "mc", draws=3, generator=source, engine=engine).dense()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = draw(source), draw(source)
    assert not torch.equal(first, second)
    assert torch.equal(draw(generator(5)), first)
    assert_close(draw(generator(5), "autograd"), draw(generator(5), "backpack"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_weight_two_is_a_duplicated_sample(kind: Any, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "classes_at", lambda _, u: torch.full(u.shape, 2))
    model, x = architecture("mlp").make(N=4)
    y = torch.tensor([0, 1, 2, 0])
    twice = nn.CrossEntropyLoss(torch.tensor([2.0, 1.0, 1.0], dtype=x.dtype), reduction=reduction)
    once = nn.CrossEntropyLoss(reduction=reduction)
    order = torch.tensor([0, 0, 1, 2, 3, 3])
    options: dict[str, Any] = {"generator": generator()} if kind == "mc" else {}
    weighted = sqrt_fisher(model, twice, x, y, kind, **options)
    duplicated = sqrt_fisher(model, once, x[order], y[order], kind, **options)
    assert_close(fisher(weighted), fisher(duplicated))
    assert weighted.count == duplicated.count
    assert weighted.sample_weights.tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_sample_weight_two_is_a_duplicated_sample(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_noise(monkeypatch, lambda *shape: torch.ones(shape, dtype=torch.float64))
    model, x = architecture("mlp").make(N=3)
    y = torch.tensor([[0.0, 1, 1], [1, 0, 1], [0.3, 0.2, 0.9]], dtype=x.dtype)
    twice = nn.BCEWithLogitsLoss(torch.tensor([[1.0], [2.0], [1.0]], dtype=x.dtype), reduction="sum")
    once = nn.BCEWithLogitsLoss(reduction="sum")
    order = torch.tensor([0, 1, 1, 2])
    options: dict[str, Any] = {"generator": generator()} if kind == "mc" else {}
    weighted = sqrt_fisher(model, twice, x, y, kind, **options)
    duplicated = sqrt_fisher(model, once, x[order], y[order], kind, **options)
    assert_close(fisher(weighted), fisher(duplicated))


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_ignored_samples_keep_rows_of_zero(kind: Any) -> None:
    model, x = architecture("mlp").make(N=3)
    options: dict[str, Any] = {"generator": generator()} if kind == "mc" else {}
    rows = sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.tensor([1, -100, 2]), kind, **options)
    S = rows.dense().view(*rows.shape, -1)
    assert not S[:, 1].any()
    assert S[:, 0].any()
    assert rows.sample_weights.tolist() == [1, 0, 1]
    kept = sqrt_fisher(model, nn.CrossEntropyLoss(), x[[0, 2]], torch.tensor([1, 2]), "exact")
    if kind == "exact":
        assert_close(fisher(rows), fisher(kept))


def test_a_softmax_is_the_fisher_matrix_by_its_own_definition() -> None:
    """E_y[∇log p ∇log pᵀ] from gradients of log p, without any output Hessian."""
    model, x = architecture("mlp").make(N=3)
    parameters = list(model.parameters())
    F_ = torch.zeros(43, 43, dtype=x.dtype)
    for n, c in product(range(3), range(CLASSES)):
        log_p = F.log_softmax(model(x[n : n + 1]), dim=1)[0, c]
        g = torch.cat([d.flatten() for d in torch.autograd.grad(log_p, parameters)])
        F_ += log_p.detach().exp() * torch.outer(g, g) / 3
    assert_close(fisher(sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.tensor([0, 0, 0]))), F_)


def test_saturated_outputs_have_finite_rows() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[800.0, 0.0], [-800.0, 0.0]], dtype=torch.float64)
    x = torch.ones(2, 2, dtype=torch.float64)
    losses: list[tuple[nn.Module, Tensor]] = [
        (nn.CrossEntropyLoss(), torch.tensor([0, 1])),
        (nn.BCEWithLogitsLoss(), torch.ones(2, 2, dtype=x.dtype)),
    ]
    for loss, y in losses:
        for kind in ("exact", "empirical"):
            assert torch.isfinite(sqrt_fisher(model, loss, x, y, kind).dense()).all()
        mc = sqrt_fisher(model, loss, x, y, "mc", draws=4, generator=generator())
        assert not mc.dense().any()


@pytest.mark.parametrize("name", ["mse", "half", "bce-all", "ce"])
def test_the_inverse_root_brings_rows_back_to_the_jacobian(name: str) -> None:
    model, x = architecture("conv1d-grid").make(N=3)
    loss, y = loss_case(name).make(outputs(model, x), "mean")
    rows = sqrt_fisher(model, loss, x, y)
    J = curvlab.rows.jacobian(model, x)
    assert rows.stems_from(J)
    assert rows.root is not None
    back = rows.root.inverse()
    if name == "ce":
        assert back is None
        return
    assert back is not None
    restored = back.apply(rows.dense().view(*rows.shape, -1))
    assert_close(restored.flatten(0, 1), J.dense())
    assert rows.stems_from(rows.jacobian())
    for other in (rows, curvlab.rows.jacobian(model, x + 1), curvlab.rows.jacobian(model, x[:2])):
        assert not rows.stems_from(other)
    assert not J.stems_from(J)


@pytest.mark.parametrize("case", CASES)
def test_duals_and_projectors_of_the_output_root(case: LossCase) -> None:
    """At every position the root is a C × C matrix A with S = A·J: duals are pinv(Aᵀ)u, projectors A·pinv(A)."""
    model, x = architecture("conv1d-grid").make(N=3)
    z = outputs(model, x)
    N, C, X = z.shape
    loss, y = case.make(z, "mean")
    root = loss_terms(loss, z, y).root()
    applied = root.apply(identity_cotangents(z)).view(C, X, N, C, X)
    A = torch.diagonal(applied, dim1=1, dim2=4).permute(3, 1, 0, 2)
    inverse = torch.linalg.pinv(A, rtol=1e-12)
    u = torch.randn(2, C, X, N, dtype=z.dtype)
    reached = torch.einsum("xnck,xnkd,bdxn->bcxn", A.mT, inverse.mT, u)
    if isinstance(loss, nn.CrossEntropyLoss):
        u = u - z.softmax(1).permute(1, 2, 0) * u.sum(1, keepdim=True)
        reached = u * (A.abs().sum((2, 3)) > 0)
    dual = root.dual(u.view(2, C * X, N)).view(u.shape)
    assert_close(torch.einsum("xnkc,bkxn->bcxn", A, dual), reached)
    assert_close(dual, torch.einsum("xnck,bcxn->bkxn", inverse, reached))
    within = torch.zeros(C, X, N, C, X, dtype=z.dtype)
    for k in range(X):
        within[:, k, :, :, k] = (A[k] @ inverse[k]).transpose(0, 1)
    assert_close(root.projector(), within.view(C * X, N, C * X))


@pytest.mark.parametrize("case", CASES)
def test_a_reduced_root_has_the_same_products_with_fewer_rows(case: LossCase) -> None:
    model, x = architecture("conv1d-grid").make(N=3)
    z = outputs(model, x)
    loss, y = case.make(z, "mean")
    root = loss_terms(loss, z, y).root()
    V, N = root.shape
    A = root.columns(torch.eye(V * N, dtype=z.dtype)).mT
    reduced = root.reduced(torch.eye(V * N, dtype=z.dtype))
    assert_close(reduced.mT @ reduced, A.mT @ A)
    assert_close(root.compressed(A), reduced)
    assert torch.equal(root.reduced(torch.eye(V * N, dtype=z.dtype).expand(2, -1, -1))[1], reduced)
    positions = z[0, 0].numel()
    assert len(reduced) == (V - positions if isinstance(loss, nn.CrossEntropyLoss) else V) * N


def test_a_reduced_root_of_certain_outputs() -> None:
    """Probabilities of 0 and 1 at the output that is left out, and elsewhere."""
    z = torch.tensor([[0.0, 0.0, 800.0], [800.0, 0.0, 0.0], [0.0, 30.0, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
    root = loss_terms(nn.CrossEntropyLoss(), z, torch.tensor([0, 1, 2, 0])).root()
    A, reduced = root.columns(torch.eye(12, dtype=z.dtype)).mT, root.reduced(torch.eye(12, dtype=z.dtype))
    assert_close(reduced.mT @ reduced, A.mT @ A)


def test_the_inverse_root_needs_every_output_to_carry_weight() -> None:
    model, x = architecture("mlp").make(N=2)
    loss = nn.BCEWithLogitsLoss(torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype))
    rows = sqrt_fisher(model, loss, x, torch.zeros(2, 3, dtype=x.dtype))
    assert rows.root is not None
    assert rows.root.inverse() is None


@pytest.mark.parametrize("weight", [ramp(CLASSES).view(1, CLASSES), torch.full((), 2.0)])
def test_bce_weights_broadcast_as_in_the_loss(weight: Tensor) -> None:
    model, x = architecture("mlp").make(N=3)
    z = outputs(model, x)
    loss = nn.BCEWithLogitsLoss(weight)
    y = torch.rand_like(z)
    assert_close(fisher(sqrt_fisher(model, loss, x, y)), dense_ggn(dense_jacobian(model, x), loss, z, y))


def test_one_output_losses() -> None:
    model, x = architecture("one-output").make(N=5)
    z = outputs(model, x)
    J = dense_jacobian(model, x)
    for loss in (HalfSquaredError(), nn.MSELoss(), nn.BCEWithLogitsLoss()):
        y = torch.rand_like(z)
        assert_close(fisher(sqrt_fisher(model, loss, x, y)), dense_ggn(J, loss, z, y))
    assert_close(fisher(sqrt_fisher(model, HalfSquaredError(), x, z)), J.T @ J / 5)


def test_integer_targets_of_any_width() -> None:
    model, x = architecture("mlp").make(N=3)
    y = torch.tensor([0, 2, 1])
    wide = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(sqrt_fisher(model, nn.CrossEntropyLoss(), x, y.to(dtype)).dense(), wide.dense())


def test_class_weights_of_another_number_of_classes() -> None:
    model, x = architecture("mlp").make(N=3)
    loss = nn.CrossEntropyLoss(weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"weight of shape \(4,\), but the model's output has 3 classes"):
        sqrt_fisher(model, loss, x, torch.tensor([0, 2, 1]))


def test_float32_targets_and_weights_with_a_float64_model() -> None:
    model, x = architecture("mlp").make(N=3)
    y = torch.zeros(3, 3)
    rows = sqrt_fisher(model, nn.BCEWithLogitsLoss(torch.ones(3)), x, y)
    assert rows.dtype == rows.sample_weights.dtype == torch.float64


@pytest.mark.parametrize("kind", ["exact", "ggn"])
@pytest.mark.parametrize("case", CASES)
def test_rows_without_the_jacobian_are_the_same(case: LossCase, kind: Literal["exact", "ggn"]) -> None:
    """Whether Λ^{1/2} is applied before the sweep or after it."""
    model, x = architecture("conv1d-grid").make(N=3)
    loss, y = case.make(outputs(model, x), "mean")
    kept, alone = (sqrt_fisher(model, loss, x, y, kind, keep_jacobian=keep) for keep in (True, False))
    assert_close(alone.dense(), kept.dense())
    u = torch.randn(alone.R, dtype=x.dtype)
    assert_close(alone.dual(u), kept.dual(u))
    halves = [sqrt_fisher(model, loss, x, y, kind, keep_jacobian=keep) for keep in (True, False)]
    assert_close(merge(halves).dual(torch.cat([u, u])), merge([kept, kept]).dual(torch.cat([u, u])))
    with pytest.raises(StateError, match="jacobian"):
        alone.jacobian()
