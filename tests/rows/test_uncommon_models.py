"""Models whose parts torch treats in unusual ways: layers without samples, PReLU, checkpoints, exports, hooks of all sorts."""

from collections.abc import Callable
from typing import Any

import backpack
import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

from curvlab import gram, jacobian, sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC
from curvlab.optim import Preconditioner
from curvlab.rows.factored import KroneckerRows
from curvlab.spectrum import GGN, Hessian
from curvlab.testing.oracle import assert_close, dense_jacobian

KINDS = ["exact", "empirical", "mc"]


def fisher_of_rows(model: nn.Module, x: Tensor, kind: Any) -> None:
    """Check the rows of one kind against a dense Jacobian and the loss's own derivatives at the outputs."""
    loss, targets = nn.CrossEntropyLoss(), torch.arange(len(x)) % 3
    J = dense_jacobian(model, x).view(3, len(x), -1)
    S = sqrt_fisher(model, loss, x, targets, kind, generator=torch.Generator().manual_seed(0) if kind == "mc" else None)
    p = model(x).detach().softmax(1)
    if kind == "exact":
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = torch.einsum("cnp,ncd,dnq->pq", J, H, J) / len(x)
        assert_close(S.dense().T @ S.dense(), expected)
    elif kind == "empirical":
        errors = p - nn.functional.one_hot(targets, 3)
        assert_close(S.dense(), torch.einsum("nc,cnp->np", errors, J) / len(x) ** 0.5)
    else:
        drawn = [torch.einsum("nc,cnp->np", p - nn.functional.one_hot(torch.tensor(k), 3), J) for k in range(3)]
        nearest = torch.stack([(S.dense() - d / len(x) ** 0.5).norm(dim=1) for d in drawn]).min(0).values
        assert float(nearest.max()) < 1e-9


class Hyper(nn.Module):
    """A layer that makes the weight of another from a fixed embedding `[3]` or `[1, 3]`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.make, self.embedding = nn.Linear(3, 12), nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.make(self.embedding).view(4, 3))


@pytest.mark.parametrize("N", [1, 3, 5])
@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_a_layer_called_on_an_embedding_without_samples(shape: tuple[int, ...], N: int) -> None:
    torch.manual_seed(0)
    model, x = Hyper(*shape).to(DOUBLE), torch.randn(N, 4, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    for kind in KINDS:
        fisher_of_rows(model, x, kind)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(N) % 3
    preconditioner = Preconditioner(model, loss, "full", kind="exact", kl_clip=None)
    with preconditioner.collect():
        loss(model(x), targets).backward()
    preconditioner.precondition()


class Bent(nn.Module):
    """PReLU around bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale, self.bend = nn.Parameter(torch.randn(4, 3)), nn.Embedding(3, 4), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(torch.tanh(x * self.scale(torch.arange(3)).sum(0)) @ self.mix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [2, 3])
def test_prelu_beside_dense_rows_also_of_as_many_samples_as_outputs(N: int, kind: Any) -> None:
    torch.manual_seed(0)
    model, x = Bent().to(DOUBLE), torch.randn(N, 4, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    fisher_of_rows(model, x, kind)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(lambda h: torch.tanh(self.inner(h)), self.first(x), use_reentrant=self.reentrant)
        return self.last(inner)


@pytest.mark.parametrize("N", [1, 3])
def test_checkpoints(N: int) -> None:
    x = torch.randn(N, 4, dtype=DOUBLE)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(N) % 3
    model, reentrant = (Checkpointed(reentrant=flag).to(DOUBLE) for flag in (False, True))
    J = jacobian(model, x).dense()
    plain = nn.Sequential(model.first, model.inner, nn.Tanh(), model.last)
    assert_close(J, dense_jacobian(plain, x))
    for kind in KINDS:
        fitting = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
        with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*Call .*use_reentrant=False"):
            sqrt_fisher(reentrant, loss, x, targets, kind, **fitting)
    with pytest.raises(UnsupportedModel, match=r"use_reentrant=True.*Call .*use_reentrant=False"):
        jacobian(reentrant, x)
    preconditioner = Preconditioner(reentrant, loss, "full", kind="exact", kl_clip=None)
    with pytest.raises(UnsupportedModel, match=r"use_reentrant=True"), preconditioner.collect():
        loss(reentrant(x), targets).backward()


class Dropping(nn.Module):
    """Noise inside a layer that is computed again in the backward pass, or not."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.again = nn.Dropout(0.5), again

    def block(self, h: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.inner(self.drop(h))))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(checkpoint(self.block, h, use_reentrant=False) if self.again else self.block(h))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_checkpoints_is_that_of_the_pass(kind: Any) -> None:
    x, loss, targets, found = torch.randn(5, 4, dtype=DOUBLE), nn.CrossEntropyLoss(), torch.arange(5) % 3, []
    for again in (True, False):
        torch.manual_seed(0)
        model = Dropping(again=again).to(DOUBLE)
        preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=0.1, kl_clip=None)
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.zero_grad()
            with preconditioner.collect():
                loss(model(x), targets).backward()
            preconditioner.precondition()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    assert_close(*found)
    with pytest.raises(UnsupportedModel, match=r"Dropout 'drop' is in training mode.*eval\(\)"):
        jacobian(model, x)


@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_a_compiled_model_are_those_of_its_layers_and_compile_nothing(whole: bool) -> None:
    compiled_graphs = []

    def backend(graph: Any, _: Any) -> Any:
        compiled_graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE)
    x, loss, targets = torch.randn(5, 4, dtype=DOUBLE), nn.CrossEntropyLoss(), torch.arange(5) % 3
    expected = jacobian(plain, x).dense()
    if whole:
        model: Any = torch.compile(plain, backend=backend)
    else:
        model = plain
        model.compile(backend=backend)
    rows = jacobian(model, x)
    assert [layer.name.removeprefix("_orig_mod.") for layer in rows.layers] == ["0", "2"]
    assert_close(rows.dense(), expected)
    fit = KFAC.fit(model, loss, (x, targets), kind="mc", generator=torch.Generator().manual_seed(0))
    assert not compiled_graphs
    assert fit.space.shapes.keys() == dict(model.named_parameters()).keys()
    assert all(isinstance(layer, KroneckerRows) for layer in rows.layers)


def test_what_hooks_store_can_be_used_afterwards() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale, self.last = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) * self.scale))

    model, x, stored = Scaled().to(DOUBLE), torch.randn(3, 4, dtype=DOUBLE), []
    J = dense_jacobian(model, x)
    model.first.register_forward_hook(lambda _, __, y: stored.append(y.detach()))
    model.last.register_forward_pre_hook(lambda _, args: stored.append(args[0] * 1))
    assert_close(jacobian(model, x).dense(), J)
    loss, targets = nn.CrossEntropyLoss(), torch.arange(3)
    preconditioner = Preconditioner(model, loss, "full", kind="exact", kl_clip=None)
    with preconditioner.collect():
        loss(model(x), targets).backward()
    assert stored
    assert all(bool(kept.detach().sum().isfinite()) for kept in stored)


class Gated(nn.Module):
    """Layers, a bare parameter and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.norm, self.last = (
            nn.Linear(4, 5),
            nn.Parameter(torch.randn(5)),
            nn.LayerNorm(5),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(torch.tanh(self.first(x)) * self.scale))
        return out


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, what it is exported to for any number of samples, and for five."""
    torch.manual_seed(0)
    model, x = Gated().to(DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    free = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("N")},)).module()
    return model, free, torch.export.export(model, (x,)).module()


def test_exported_models(exported: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    model, free, fixed = exported
    x, y, loss = torch.randn(5, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1]), nn.CrossEntropyLoss()
    J = dense_jacobian(model, x)
    assert_close(jacobian(free, x).dense(), J)
    for kind in KINDS:
        fisher_of_rows(free, x, kind)
    S = sqrt_fisher(model, loss, x, y).dense()
    for made in (free, fixed):
        assert_close(GGN(made, loss, (x, y)).to_dense(), S.T @ S)
        assert_close(Hessian(made, loss, (x, y)).to_dense(), Hessian(model, loss, (x, y)).to_dense())
    preconditioner = Preconditioner(free, loss, "full", kind="exact", damping=0.1, kl_clip=None)
    with preconditioner.collect():
        loss(free(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in free.parameters()])
    preconditioner.precondition()
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient)
    assert_close(torch.cat([p.grad.flatten() for p in free.parameters()]), expected, 1e-8)


def test_models_exported_for_one_number_of_samples_are_told_the_remedy(
    exported: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    fixed = exported[2]
    x, y, loss = torch.randn(5, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1]), nn.CrossEntropyLoss()
    remedy = r"norm.weight.* single samples.*dynamic_shapes=\(\{0: torch.export.Dim\('N'\)\},\)"
    with pytest.raises(UnsupportedModel, match=remedy):
        jacobian(fixed, x)
    with pytest.raises(UnsupportedModel, match=remedy):
        sqrt_fisher(fixed, loss, x, y)
    preconditioner = Preconditioner(fixed, loss, "kfac", kind="exact", kl_clip=None)
    with pytest.raises(UnsupportedModel, match=remedy), preconditioner.collect():
        loss(fixed(x), y).backward()


# --- hooks --------------------------------------------------------------------------------------------------------------


class Observed(nn.Module):
    """A model whose activation may have a hook; one without bare parameters has factored rows only."""

    def __init__(self, *, bare: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.randn(5)) if bare else None
        self.on_gradient: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) * (1 if self.scale is None else self.scale))
        if self.on_gradient and h.requires_grad:
            h.register_hook(self.on_gradient)
        out: Tensor = self.last(h)
        return out


def gradients_of(stored: list[Tensor], *groups: Any) -> None:
    stored += [g for group in groups for g in group if g is not None]


HOOKS: dict[str, Callable[[Observed, list[Tensor]], Any]] = {
    "forward": lambda m, kept: m.first.register_forward_hook(lambda _, __, y: kept.append(y)),
    "forward-pre": lambda m, kept: m.last.register_forward_pre_hook(lambda _, args: kept.append(args[0])),
    "full-backward": lambda m, kept: m.first.register_full_backward_hook(lambda _, i, o: gradients_of(kept, i, o)),
    "full-backward-pre": lambda m, kept: m.last.register_full_backward_pre_hook(lambda _, o: gradients_of(kept, o)),
    "activation": lambda m, kept: setattr(m, "on_gradient", kept.append),
    "parameter": lambda m, kept: m.first.weight.register_hook(kept.append),
    "accumulated": lambda m, kept: m.first.weight.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad)),
    "everywhere": lambda _, kept: register_module_full_backward_hook(lambda __, i, o: gradients_of(kept, i, o)),
    "forward-everywhere": lambda _, kept: register_module_forward_hook(lambda __, ___, y: kept.append(y)),
}


def uses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return what batched passes give; the last is a step of a preconditioner, whose own pass lets hooks act."""
    loss = nn.CrossEntropyLoss()
    found = [jacobian(model, x).dense(), sqrt_fisher(model, loss, x, y).dense()]
    found += [sqrt_fisher(model, loss, x, y, "empirical").dense(), gram(model, x, memory=8000)]
    found += [operator(model, loss, (x, y)).to_dense() for operator in (GGN, Hessian)]
    preconditioner = Preconditioner(model, loss, "full", kind="exact", damping=0.1, kl_clip=None)
    model.zero_grad()
    with preconditioner.collect():
        loss(model(x), y).backward()
    preconditioner.precondition()
    return [*found, torch.cat([p.grad.flatten() for p in model.parameters()])]


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_plain_tensors_or_nothing(name: str, bare: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Observed(bare=bare).to(DOUBLE), torch.randn(3, 4, dtype=DOUBLE), torch.tensor([0, 2, 1])
    expected = uses(model, x, y)
    kept: list[Tensor] = []
    handle = HOOKS[name](model, kept)
    try:
        for found, without in zip(uses(model, x, y), expected, strict=True):
            assert_close(found, without)
        assert kept
        assert all(bool(tensor.detach().sum().isfinite()) and tensor.tolist() for tensor in kept)
        before = len(kept)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        assert len(kept) > before, "hooks act again in the user's own passes"
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["full-backward", "full-backward-pre", "activation"])
def test_hooks_that_change_gradients_are_no_part_of_curvature(name: str, kind: Any) -> None:
    """They change the user's gradient, which is preconditioned as it is."""

    def halve(*arguments: Any) -> Any:
        changed = arguments[-1] if name == "full-backward-pre" else arguments[1 if name == "full-backward" else 0]
        return changed / 2 if isinstance(changed, Tensor) else tuple(None if g is None else g / 2 for g in changed)

    torch.manual_seed(0)
    model, x, y = Observed(bare=False).to(DOUBLE), torch.randn(3, 4, dtype=DOUBLE), torch.tensor([0, 2, 1])
    loss, fitting = nn.CrossEntropyLoss(), {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
    S, J = sqrt_fisher(model, loss, x, y, kind, **fitting).dense(), dense_jacobian(model, x)
    plain = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    if name == "activation":
        model.on_gradient = halve
    else:
        getattr(model.last, f"register_{name.replace('-', '_')}_hook")(halve)
    fitting = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
    assert_close(sqrt_fisher(model, loss, x, y, kind, **fitting).dense(), S)
    assert_close(jacobian(model, x).dense(), J)
    preconditioner = Preconditioner(model, loss, "full", kind=kind, damping=0.1, kl_clip=None)
    with preconditioner.collect():
        loss(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert not torch.allclose(gradient, torch.cat([g.flatten() for g in plain]))
    preconditioner.precondition()
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient)
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_activations_retain_are_those_of_the_users_pass(kind: Any) -> None:
    model, x, y, loss = (
        Observed(bare=True).to(DOUBLE),
        torch.randn(3, 4, dtype=DOUBLE),
        torch.arange(3),
        nn.CrossEntropyLoss(),
    )
    kept: list[Tensor] = []

    def retain(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.first.register_forward_hook(retain)
    loss(model(x), y).backward()
    preconditioner = Preconditioner(model, loss, "full", kind=kind, kl_clip=None)
    with preconditioner.collect():
        found = model(x)
        mine = kept[1]
        loss(found, y).backward()
    assert_close(mine.grad, kept[0].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_within_the_users_own_backpack_context(kind: Any) -> None:
    """BackPACK's hooks on model and loss act in the user's backward pass, and in no pass of curvlab's."""
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE),
        torch.randn(3, 4).to(DOUBLE),
        torch.arange(3),
    )
    plain = nn.CrossEntropyLoss()
    fitting = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
    S = sqrt_fisher(model, plain, x, y, kind, **fitting).dense()
    expected = [operator(model, plain, (x, y)).to_dense() for operator in (GGN, Hessian)]
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(backpack.extensions.DiagGGNExact()):
        fitting = {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}
        assert_close(sqrt_fisher(extended, loss, x, y, kind, **fitting).dense(), S)
        for operator, dense in zip((GGN, Hessian), expected, strict=True):
            assert_close(operator(extended, loss, (x, y)).to_dense(), dense)
        preconditioner = Preconditioner(extended, loss, "full", kind=kind, damping=0.1, kl_clip=None)
        with preconditioner.collect():
            loss(extended(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        diagonal = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
        assert_close(diagonal, expected[0].diag())
        preconditioner.precondition()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_close(found, torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient), 1e-8)
