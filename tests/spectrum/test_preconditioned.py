"""Preconditioned operators against SciPy's dense generalised eigenproblem."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from oracle import DOUBLE
from scipy.linalg import eigh
from torch import Tensor, nn

import curvlab
from curvlab.errors import NotPositiveDefinite, UnsupportedModel
from curvlab.fisher import STRUCTURES
from curvlab.spectrum import (
    DenseOperator,
    DiagonalPreconditioner,
    Hessian,
    Preconditioned,
    eigenpairs,
    trace,
)
from curvlab.testing.oracle import assert_close

ENDS = ("largest", "smallest", "both")


def setting(width: int = 6, N: int = 8, seed: int = 0) -> tuple[nn.Sequential, nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
        return model, nn.CrossEntropyLoss(), (torch.randn(N, 4, dtype=DOUBLE), torch.randint(3, (N,)))


def structure(key: str, model: nn.Module, loss: nn.Module, data: Any, **options: Any) -> Any:
    return STRUCTURES[key]().update(curvlab.sqrt_fisher(model, loss, *data))


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("damping", [1e-3, "rel:1e-2"])
@pytest.mark.parametrize("key", ["full", "block-diagonal", "unit-wise", "diagonal", "kfac", "ekfac"])
def test_structures(key: str, damping: Any, which: Any) -> None:
    model, loss, data = setting()
    F, H = structure(key, model, loss, data), Hessian(model, loss, data)
    pencil = Preconditioned(H, F, damping)
    M = F.to_dense() + pencil.damping * torch.eye(H.size, dtype=DOUBLE)
    expected = eigh(H.to_dense().numpy(), M.numpy(), eigvals_only=True)[::-1]
    found = eigenpairs(pencil, 2, which, tolerance=1e-9)
    wanted = {"largest": expected[:2], "smallest": expected[::-1][:2], "both": [*expected[:2], *expected[-2:]]}[which]
    np.testing.assert_allclose(found.values.numpy(), wanted, rtol=1e-6, atol=1e-9)
    assert_close(found.vectors @ M @ found.vectors.T, torch.eye(len(wanted), dtype=DOUBLE), 1e-9)
    assert_close(pencil.to_dense(), torch.linalg.solve(M, H.to_dense()), 1e-8)


@pytest.mark.parametrize("key", ["full", "block-diagonal", "kfac"])
def test_without_damping_on_the_range(key: str) -> None:
    model, loss, data = setting(N=4)
    F, H = structure(key, model, loss, data), Hessian(model, loss, data)
    values, vectors = torch.linalg.eigh(F.to_dense())
    kept = values > 1e-10 * values[-1]
    assert int(kept.sum()) < H.size, "F must be singular"
    root = vectors[:, kept] / values[kept].sqrt()
    expected = torch.linalg.eigvalsh(root.T @ H.to_dense() @ root).flip(0)
    found = eigenpairs(Preconditioned(H, F), 2, tolerance=1e-8)
    np.testing.assert_allclose(found.values.numpy(), expected[:2].numpy(), rtol=1e-5)


def test_a_linear_model_with_squared_error_gives_ones() -> None:
    _, _, (x, _) = setting()
    model, loss = nn.Linear(4, 2).double(), nn.MSELoss()
    data = (x, torch.zeros(8, 2, dtype=DOUBLE))
    F = structure("full", model, loss, data)
    found = eigenpairs(Preconditioned(Hessian(model, loss, data), F), 3, "largest", tolerance=1e-9)
    assert found.values.tolist() == pytest.approx([1.0] * 3, abs=1e-9)


def test_warm_start() -> None:
    model, loss, data = setting(width=40, N=20)
    F, H = structure("kfac", model, loss, data), Hessian(model, loss, data)
    pencil = Preconditioned(H, F, 1e-3)
    cold = eigenpairs(pencil, 2, tolerance=1e-4)
    with torch.no_grad():
        model[0].weight += 1e-4
    warm, again = (eigenpairs(pencil, 2, tolerance=1e-4, start=start) for start in (cold, None))
    assert warm.products <= again.products / 2
    assert warm.values.tolist() == pytest.approx(again.values.tolist(), rel=1e-4)


class TestDiagonal:
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
    def test_adam(self, kind: Any, amsgrad: bool) -> None:
        model, loss, (x, y) = setting()
        optimizer = kind(model.parameters(), lr=1e-2, betas=(0.0, 0.9), eps=1e-3, amsgrad=amsgrad, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            before = copy.deepcopy(model)
            optimizer.step()
        P = DiagonalPreconditioner.adam(model, optimizer)
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        step = P.solve(gradient, 0.0)
        assert isinstance(step, dict)
        for name, p in before.named_parameters():
            assert_close(p.detach() - 1e-2 * step[name], model.get_parameter(name).detach(), 1e-9)
        H = Hessian(model, loss, (x, y))
        expected = eigh(H.to_dense().numpy(), np.diag(P.diagonal.numpy()), eigvals_only=True)[::-1]
        found = eigenpairs(Preconditioned(H, P), 2, tolerance=1e-9)
        np.testing.assert_allclose(found.values.numpy(), expected[:2], rtol=1e-8)

    def test_verbs(self) -> None:
        D = DiagonalPreconditioner({"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[4.0]])})
        v = torch.ones(3)
        assert D.matvec(v).tolist() == [0, 2, 4]
        assert D.solve(v, 0.0).tolist() == [0, 0.5, 0.25]
        assert D.solve(v, "rel:0.5").tolist() == [0.5, 0.25, pytest.approx(1 / 6)]
        assert D.largest_eigenvalue() == 4

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="The diagonal of 'a' has an entry that is negative or not finite"):
            DiagonalPreconditioner({"a": torch.tensor([1.0, -1.0])})
        model, _, _ = setting()
        with pytest.raises(UnsupportedModel, match=r"no exp_avg_sq of '0\.weight': take a step with it first"):
            DiagonalPreconditioner.adam(model, torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize("damping", [1e-2, 0.0])
@pytest.mark.parametrize("key", ["full", "kfac"])
def test_scipy_gets_the_transpose_too(key: str, damping: float) -> None:
    model, loss, data = setting(N=4)
    F, H = structure(key, model, loss, data), Hessian(model, loss, data)
    view, block = Preconditioned(H, F, damping).scipy(), np.random.default_rng(0).normal(size=(H.size, 2))
    M = F.to_dense() + damping * torch.eye(H.size, dtype=DOUBLE)
    dense = (torch.linalg.pinv(M, rtol=1e-10, hermitian=True) @ H.to_dense()).numpy()
    np.testing.assert_allclose(view @ block, dense @ block, atol=1e-7 * abs(dense).max())
    np.testing.assert_allclose(view.T @ block, dense.T @ block, atol=1e-7 * abs(dense).max())
    np.testing.assert_allclose(view.rmatvec(block[:, 0]), dense.T @ block[:, 0], atol=1e-7 * abs(dense).max())


class TestErrors:
    H = DenseOperator(torch.eye(3, dtype=DOUBLE))

    def test_a_transpose_that_nobody_has_said(self) -> None:
        class Own(DenseOperator):
            euclidean = False

        with pytest.raises(
            NotImplementedError, match=r"Own is symmetric in the inner product of M only.*Operator\.adjoint"
        ):
            Own(torch.eye(3, dtype=DOUBLE)).scipy().rmatvec(np.ones(3))

    def test_twice(self) -> None:
        D = DiagonalPreconditioner({"vector": torch.ones(3, dtype=DOUBLE)})
        once = Preconditioned(self.H, D)
        with pytest.raises(ValueError, match="precondition it once only"):
            Preconditioned(once, D)
        with pytest.raises(ValueError, match="not symmetric in the Euclidean inner product"):
            trace(once)

    def test_other_parameters(self) -> None:
        with pytest.raises(ValueError, match="The preconditioner has the parameters a, the operator vector"):
            Preconditioned(self.H, DiagonalPreconditioner({"a": torch.ones(3)}))

    def test_relative_damping_needs_an_eigenvalue(self) -> None:
        class Plain:
            def matvec(self, v: Any) -> Any:
                return 2 * v

            def solve(self, v: Any, damping: float) -> Any:
                return v / (2 + damping)

        with pytest.raises(ValueError, match=r"Plain has no largest_eigenvalue\(\)\. Pass a number"):
            Preconditioned(self.H, Plain(), "rel:1e-3")
        assert eigenpairs(Preconditioned(self.H, Plain(), 2.0)).values.tolist() == pytest.approx([0.25])

    def test_an_indefinite_inner_product(self) -> None:
        class Indefinite:
            def matvec(self, v: Any) -> Any:
                return v * torch.tensor([1.0, -2.0, 1.0], dtype=DOUBLE)

            def solve(self, v: Any, damping: float) -> Any:  # noqa: ARG002
                return v

        with pytest.raises(NotPositiveDefinite, match=r"The inner product of Preconditioned\(.*is not positive"):
            eigenpairs(Preconditioned(self.H, Indefinite()), 3)
