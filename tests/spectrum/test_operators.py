"""Matrix-free operators against dense matrices, by reverse mode alone or from the definitions."""

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from curvlinops import HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import network, samples
from oracle import ARCHITECTURES, DOUBLE, LOSSES, Architecture, Cube, architecture, chain, loss_case
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC
from curvlab.nn import WeightedCrossEntropy
from curvlab.nn.functional import attributes_kept
from curvlab.spectrum import GGN, DenseOperator, Fisher, Hessian, Operator, RowsOperator, StructureOperator
from curvlab.testing.oracle import (
    assert_close,
    dense_empirical,
    dense_ggn,
    dense_jacobian,
    outputs,
    trainable,
)


def dense_hessian(model: nn.Module, value: Callable[[], Tensor]) -> Tensor:
    """Differentiate the gradient entry by entry, in reverse mode."""
    own = [p for p in model.parameters() if p.requires_grad]
    with attributes_kept(model):
        first = torch.autograd.grad(value(), own, create_graph=True, materialize_grads=True)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(entry, own, retain_graph=True, materialize_grads=True)])
            if entry.requires_grad
            else torch.zeros(sum(p.numel() for p in own), dtype=DOUBLE)
            for piece in first
            for entry in piece.flatten()
        ]
    return torch.stack(rows)


def problem(
    case: Architecture, loss: str = "ce", reduction: str = "mean", N: int = 4
) -> tuple[nn.Module, Any, Any, Any]:
    model, x = case.make(N)
    criterion, y = loss_case(loss).make(outputs(model, x, case.pick), reduction)
    return model, criterion, x, y


def random_block(operator: Operator, K: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, operator.size, dtype=operator.dtype, generator=generator)


class TestHessianAndGGN:
    @pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
    def test_every_architecture(self, case: Architecture) -> None:
        loss = "half" if case.name in ("one-output", "bare", "reused") else "ce-smooth"
        model, criterion, x, y = problem(case, loss)
        args = {"output": case.output}
        H, G = Hessian(model, criterion, (x, y), **args), GGN(model, criterion, (x, y), **args)
        call = (
            (lambda: model(**x)) if isinstance(x, dict) else (lambda: model(*x) if isinstance(x, tuple) else model(x))
        )
        reference = dense_hessian(model, lambda: criterion(case.pick(call()), y))
        V = random_block(H)
        assert_close(H.matmat(V), V @ reference, 1e-9)
        ggn = dense_ggn(dense_jacobian(model, x, case.pick), criterion, outputs(model, x, case.pick), y)
        if case.name not in ("oddities", "embedding-padding", "attention"):
            # There the reference's own forward and reverse modes differ: no_grad, and the padding of an embedding.
            assert_close(G.matmat(V), V @ ggn, 1e-9)
        assert H.batched == G.batched == (case.name not in ("oddities", "embedding-padding", "attention"))

    @pytest.mark.parametrize("name", ["mlp", "conv2d", "attention", "tied", "oddities", "layernorm"])
    def test_both_ways_agree(self, name: str) -> None:
        model, criterion, x, y = problem(architecture(name))
        for kind in (Hessian, GGN):
            ways = [kind(model, criterion, (x, y), batched=batched) for batched in (True, False)]
            V = random_block(ways[0])
            assert_close(ways[0].matmat(V), ways[1].matmat(V))

    @pytest.mark.parametrize("name", ["oddities", "embedding-padding"])
    def test_ggn_where_forward_mode_differs(self, name: str) -> None:
        model, criterion, x, y = problem(architecture(name))
        rows = curvlab.sqrt_fisher(model, criterion, x, y, "ggn").dense()
        assert_close(GGN(model, criterion, (x, y)).to_dense(), rows.T @ rows)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("loss", [case.name for case in LOSSES])
    def test_every_loss(self, loss: str, reduction: str) -> None:
        case = architecture("mlp-nested")
        model, criterion, x, y = problem(case, loss, reduction)
        H = Hessian(model, criterion, (x, y))
        assert_close(H.to_dense(), dense_hessian(model, lambda: criterion(model(x), y)))
        expected = dense_ggn(dense_jacobian(model, x), criterion, outputs(model, x), y)
        assert H.batched
        assert_close(torch.stack([H.matvec(v) for v in torch.eye(H.size, dtype=DOUBLE)]), H.to_dense())
        for kind in ("exact", "ggn"):
            G = GGN(model, criterion, (x, y), kind=kind)  # type: ignore[arg-type]
            assert_close(G.to_dense(), expected)
            assert G.batched

    def test_a_loss_without_a_fisher_matrix(self) -> None:
        model, (x, _) = network(), samples(5)
        for loss in (nn.SmoothL1Loss(beta=0.5), lambda z, t: (z - t).cos().sum() / 7):
            y = torch.zeros(5, 3, dtype=DOUBLE)
            reference = dense_hessian(model, lambda loss=loss, y=y: loss(model(x), y))
            assert_close(Hessian(model, loss, (x, y)).to_dense(), reference)
            with pytest.raises(UnsupportedModel, match=r"not known to be a Fisher matrix\. Use kind='ggn'"):
                GGN(model, loss, (x, y), kind="exact")

    def test_a_linear_model_has_its_ggn_as_hessian(self) -> None:
        model, (x, y) = nn.Linear(4, 3).double(), samples(6)
        data, loss = (x, y), nn.CrossEntropyLoss()
        assert_close(Hessian(model, loss, data).to_dense(), GGN(model, loss, data).to_dense())

    def test_agrees_with_curvlinops(self) -> None:
        model, (x, y) = network(), samples(9)
        data = [(x[:5], y[:5]), (x[5:], y[5:])]
        ours = Hessian(model, nn.CrossEntropyLoss(), data)
        theirs = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
        V = random_block(ours)
        assert_close(ours.matmat(V), (theirs @ V.T).T)

    @pytest.mark.parametrize("chunk_size", [1, 2, 5])
    def test_chunks_of_any_size(self, chunk_size: int) -> None:
        model, (x, y) = network(), samples(6)
        whole = Hessian(model, nn.CrossEntropyLoss(), (x, y))
        V = random_block(whole, 5)
        assert_close(Hessian(model, nn.CrossEntropyLoss(), (x, y), chunk_size=chunk_size).matmat(V), whole.matmat(V))

    def test_follows_the_parameters(self) -> None:
        model, (x, y) = network(), samples(6)
        for make in (Hessian, GGN, Fisher):
            operator = make(model, nn.CrossEntropyLoss(), (x, y))
            before = operator.to_dense()
            with torch.no_grad():
                model[0].weight += 0.5
            assert float((operator.to_dense() - before).norm()) > 1e-3
            assert_close(operator.to_dense(), make(model, nn.CrossEntropyLoss(), (x, y)).to_dense())


class TestBatches:
    @settings(max_examples=8)
    @given(
        cuts=st.sets(st.integers(1, 9), max_size=4),
        loss=st.sampled_from([case.name for case in LOSSES if case.name not in ("ce-ignore", "ce-all")]),
        reduction=st.sampled_from(["mean", "sum"]),
    )
    def test_any_split_gives_the_whole(self, cuts: set[int], loss: str, reduction: str) -> None:
        case = architecture("mlp-nested")
        model, criterion, x, y = problem(case, loss, reduction, N=10)
        edges = [0, *sorted(cuts), 10]
        parts = [(x[a:b], y[a:b]) for a, b in pairwise(edges)]
        for kind in (Hessian, GGN, Fisher):
            whole, split = kind(model, criterion, (x, y)), kind(model, criterion, parts)
            V = random_block(whole)
            assert_close(split.matmat(V), whole.matmat(V))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_divisor_of_an_unknown_loss(self, reduction: str) -> None:
        model, (x, y) = chain(*network(), nn.LogSoftmax(1)), samples(8)
        weight = torch.tensor([0.2, 1.0, 3.0], dtype=DOUBLE)
        loss = nn.NLLLoss(weight=weight, reduction=reduction)
        split = Hessian(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
        assert_close(split.to_dense(), Hessian(model, loss, (x, y)).to_dense())

    @pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
    @pytest.mark.parametrize("empty", [0, 1, 2])
    def test_batches_whose_targets_are_all_ignored_have_no_part(self, kind: Any, empty: int) -> None:
        model, (x, y) = network(), samples(9)
        y[3 * empty : 3 * empty + 3] = -100
        split = kind(model, nn.CrossEntropyLoss(), [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])])
        assert_close(split.to_dense(), kind(model, nn.CrossEntropyLoss(), (x, y)).to_dense())

    def test_data_whose_targets_are_all_ignored(self) -> None:
        x, y = samples(6)
        y = torch.full_like(y, -100)
        with pytest.raises(ValueError, match="mean over no terms in any of the 2 batches: all targets are ignored"):
            Hessian(network(), nn.CrossEntropyLoss(), [(x[:3], y[:3]), (x[3:], y[3:])])

    def test_a_batch_without_samples_is_refused(self) -> None:
        x, y = samples(6)
        with pytest.raises(ValueError, match="zero samples"):
            Hessian(network(), nn.CrossEntropyLoss(), [(x, y), (x[:0], y[:0])])

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), WeightedCrossEntropy(torch.arange(1, 6, dtype=DOUBLE))])
    def test_classes_in_a_byte_are_taken_in_forward_mode(self, loss: nn.Module) -> None:
        model, (x, y) = network(), samples(5)
        narrow = Hessian(model, loss, (x, y.to(torch.uint8)))
        assert narrow.batched
        assert_close(narrow.to_dense(), Hessian(model, loss, (x, y)).to_dense())

    def test_loaders(self) -> None:
        model, (x, y) = network(), samples(8)
        whole = Hessian(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
        for shuffle in (False, True):
            loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=shuffle)
            assert_close(Hessian(model, nn.CrossEntropyLoss(), loader).to_dense(), whole)


class TestRestriction:
    @pytest.mark.parametrize(
        ("wanted", "names"),
        [
            ("0", ["0.weight", "0.bias"]),
            (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
            ("2.weight", ["2.weight"]),
        ],
    )
    def test_parameters_and_modules(self, wanted: Any, names: list[str]) -> None:
        model, data = network(), samples(6)
        for kind in (Hessian, GGN, Fisher):
            whole, part = (kind(model, nn.CrossEntropyLoss(), data, parameters=p) for p in (None, wanted))
            assert list(part.space.shapes) == names
            index = whole.space.unflatten(torch.arange(whole.size, dtype=DOUBLE))
            at = torch.cat([index[name].flatten() for name in names]).long()
            assert_close(part.to_dense(), whole.to_dense()[at][:, at])

    def test_frozen_parameters_have_no_columns(self) -> None:
        model, data = network(), samples(6)
        model[0].weight.requires_grad_(False)
        assert list(Hessian(model, nn.CrossEntropyLoss(), data).space.shapes) == ["0.bias", "2.weight", "2.bias"]

    @pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
    def test_unknown_names(self, kind: Any) -> None:
        with pytest.raises(ValueError, match=r"Unknown parameter '0\.weigth'\. Did you mean '0\.weight'\?"):
            kind(network(), nn.CrossEntropyLoss(), samples(4), parameters=["0.weigth"])
        with pytest.raises(ValueError, match=r"parameters=\[\] leaves no"):
            kind(network(), nn.CrossEntropyLoss(), samples(4), parameters=[])


class TestFisher:
    @pytest.mark.parametrize("name", ["mlp", "conv2d", "attention", "tied"])
    def test_kinds(self, name: str) -> None:
        model, criterion, x, y = problem(architecture(name))
        J, z = dense_jacobian(model, x), outputs(model, x)
        if name != "attention":
            for kind in ("exact", "ggn"):
                assert_close(Fisher(model, criterion, (x, y), kind=kind).to_dense(), dense_ggn(J, criterion, z, y))
            assert_close(
                Fisher(model, criterion, (x, y), kind="empirical").to_dense(), dense_empirical(J, criterion, z, y)
            )
        source = torch.Generator().manual_seed(3)
        F = Fisher(model, criterion, (x, y), kind="mc", draws=2, generator=source)
        same = torch.Generator().manual_seed(3)
        rows = curvlab.sqrt_fisher(model, criterion, x, y, "mc", draws=2, generator=same).dense()
        assert_close(F.to_dense(), rows.T @ rows)

    def test_mc_draws_the_same_at_every_sweep(self) -> None:
        model, data = network(), samples(5)
        F = Fisher(model, nn.CrossEntropyLoss(), data, kind="mc", generator=torch.Generator().manual_seed(1))
        first = F.to_dense()
        with torch.no_grad():
            model[0].bias += 1.0
            assert float((F.to_dense() - first).norm()) > 1e-6
            model[0].bias -= 1.0
        assert_close(F.to_dense(), first, 1e-8)

    def test_rows_and_structures(self) -> None:
        model, (x, y) = network(), samples(6)
        rows = curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)
        assert_close(RowsOperator(rows).to_dense(), rows.dense().T @ rows.dense())
        structure = KFAC().update(rows)
        assert_close(StructureOperator(structure).to_dense(), structure.to_dense())

    def test_a_matrix_at_hand_is_not_multiplied(self) -> None:
        matrix = torch.eye(3)
        assert DenseOperator(matrix).to_dense() is matrix


class TestVectors:
    def test_forms(self) -> None:
        H = Hessian(network(), nn.CrossEntropyLoss(), samples(6))
        V = random_block(H, 2)
        product = V @ H.to_dense()
        assert_close(H.matvec(V), product)
        assert_close(H.matvec(V[0]), product[0])
        for vector, expected in ((V, product), (V[0], product[0])):
            named = H.matvec(H.space.unflatten(vector))
            assert isinstance(named, dict)
            assert_close(H.space.flatten(named), expected)

    def test_scipy(self) -> None:
        H = Hessian(network(), nn.CrossEntropyLoss(), samples(6))
        view, dense = H.scipy(), H.to_dense().numpy()
        assert view.dtype == np.float64
        block = np.random.default_rng(0).normal(size=(H.size, 3))
        np.testing.assert_allclose(view @ block, dense @ block, atol=1e-12)
        np.testing.assert_allclose(view.T @ block[:, 0], dense @ block[:, 0], atol=1e-12)
        values = eigsh(view, k=3, which="LA", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense)[-3:], rtol=1e-8)
        single = Hessian(network().float(), nn.CrossEntropyLoss(), (samples(6)[0].float(), samples(6)[1]))
        assert single.scipy().dtype == np.float32

    def test_a_matrix_must_fit(self) -> None:
        with pytest.raises(ValueError, match="A matrix for 2 parameters is square"):
            DenseOperator(torch.zeros(2, 3))
        assert repr(DenseOperator(torch.zeros(2, 2))) == "DenseOperator(P=2, dtype=torch.float32, device=cpu)"


class TestModelUntouched:
    @pytest.mark.parametrize(
        "name", ["mlp", "oddities", "batchnorm1d", "in-place", "parametrised", "embedding-padding"]
    )
    def test_nothing_is_left_behind(self, name: str) -> None:
        model, criterion, x, y = problem(architecture(name))
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        before = copy.deepcopy(model.state_dict())
        attributes = [set(vars(module)) for module in model.modules()]
        for kind in (Hessian, GGN):
            kind(model, criterion, (x, y)).to_dense()
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert all(bool((model.state_dict()[key] == value).all()) for key, value in before.items())
        assert [p.grad is None for p in model.parameters()][1:] == [True] * (len(trainable(model)) - 1)
        assert bool((next(model.parameters()).grad == 1).all())
        assert not any(module.training for module in model.modules())

    def test_batch_norm_in_training_mode_keeps_its_statistics(self) -> None:
        model = chain(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = samples(7)
        reference = dense_hessian(copy.deepcopy(model), lambda: nn.functional.cross_entropy(model(x), y))
        assert reference.shape[0] > 0
        model[1].reset_running_stats()
        H = Hessian(model, nn.CrossEntropyLoss(), (x, y))
        twin = copy.deepcopy(model)
        assert_close(H.to_dense(), dense_hessian(twin, lambda: nn.functional.cross_entropy(twin(x), y)), 1e-9)
        assert float(model[1].running_mean.abs().max()) == 0
        assert int(model[1].num_batches_tracked) == 0


class WithCube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.layer(x))


class TestFallback:
    def test_says_so_once(self, caplog: pytest.LogCaptureFixture) -> None:
        model, (x, y) = WithCube().double(), samples(5)
        with caplog.at_level(logging.INFO, logger="curvlab"):
            operators = [kind(model, nn.CrossEntropyLoss(), (x, y)) for kind in (Hessian, GGN, Hessian)]
        assert caplog.text.count("Products by double backward, one vector at a time:") == 1
        assert not any(operator.batched for operator in operators)
        assert_close(operators[0].to_dense(), dense_hessian(model, lambda: nn.functional.cross_entropy(model(x), y)))
        plain = copy.deepcopy(model)
        plain.forward = lambda x: plain.layer(x) ** 3  # type: ignore[method-assign]
        expected = GGN(plain, nn.CrossEntropyLoss(), (x, y))
        assert expected.batched
        assert_close(operators[1].to_dense(), expected.to_dense())

    def test_names_the_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        model, criterion, x, y = problem(architecture("oddities"))
        with caplog.at_level(logging.INFO, logger="curvlab"):
            Hessian(model, criterion, (x, y))
        assert "forward mode differs, as it does for functions under no_grad and for padding_idx" in caplog.text


class TestHeld:
    """Within `held` double backward records the gradient once, and the products are the same."""

    LOSS = nn.CrossEntropyLoss()

    @pytest.mark.parametrize("kind", [Hessian, GGN])
    def test_products_are_the_same_from_one_recording(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        data = samples(6)
        operator = kind(network(), self.LOSS, data, batched=False)
        block = torch.randn(3, operator.size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        expected = operator.matmat(block)
        recorded = []
        record = operator._record
        monkeypatch.setattr(operator, "_record", lambda part: (recorded.append(part), record(part))[1])
        with operator.held():
            for _ in range(2):
                assert_close(operator.matmat(block), expected)
            with operator.held():
                assert_close(operator.matmat(block[:1]), expected[:1])
        assert len(recorded) == 1
        with torch.no_grad():
            next(iter(operator.objective.model.parameters())).mul_(1.5)
        assert not torch.allclose(operator.matmat(block), expected)
        assert len(recorded) == 2

    def test_parameters_that_change_nevertheless_are_an_error(self) -> None:
        operator = Hessian(network(), self.LOSS, samples(6), batched=False)
        block = torch.ones(1, operator.size, dtype=DOUBLE)
        with operator.held():
            operator.matmat(block)
            with torch.no_grad():
                for parameter in operator.objective.model.parameters():
                    parameter.mul_(1.5)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                operator.matmat(block)

    def test_several_batches_are_passed_over_as_ever(self) -> None:
        x, y = samples(6)
        operator = Hessian(network(), self.LOSS, [(x[:4], y[:4]), (x[4:], y[4:])], batched=False)
        whole = Hessian(network(), self.LOSS, (x, y), batched=False)
        block = torch.ones(1, operator.size, dtype=DOUBLE)
        with operator.held():
            assert_close(operator.matmat(block), whole.matmat(block))
