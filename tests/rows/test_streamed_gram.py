"""Gram matrices in chunks against those of all rows at once."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import torch
from oracle import architecture, loss_case
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

import curvlab
from curvlab.errors import UnsupportedModel
from curvlab.fisher import Full
from curvlab.nn import GaussianNLL, HalfSquaredError, MultiTask, PerSample, Scaled, Task, WeightedCrossEntropy
from curvlab.optim import Preconditioner
from curvlab.rows.streamed import bytes_of
from curvlab.testing.oracle import assert_close, dense_jacobian, outputs


def budgets(rows: curvlab.Rows) -> list[int]:
    """Bytes for all samples in one chunk, several chunks in one panel, and several panels."""
    each = -(-bytes_of(rows) // rows.shape[1])
    return [1 << 30, 16 * each * 4, 16 * each]


@pytest.mark.parametrize("name", ["mlp", "conv2d-groups", "conv1d-grid", "embedding", "bare", "attention"])
def test_jacobians(name: str) -> None:
    model, x = architecture(name).make(N=11)
    J = curvlab.jacobian(model, x)
    for memory in budgets(J):
        streamed = curvlab.gram(model, x, memory=memory)
        assert_close(streamed, J.gram(), 1e-13)
        assert torch.equal(streamed, streamed.T)


@pytest.mark.parametrize("kind", ["exact", "ggn", "mc", "empirical"])
@pytest.mark.parametrize("name", ["ce-all", "mse", "bce-all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_a_loss(name: str, reduction: str, kind: Any) -> None:
    """The mean is over all samples, whatever the chunks are; draws do not depend on them."""
    model, x = architecture("conv1d-grid").make(N=9)
    loss, y = loss_case(name).make(outputs(model, x), reduction)
    how: dict[str, Any] = {"kind": kind}
    if kind == "mc":
        how |= {"draws": 2}

    def source() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(1)} if kind == "mc" else {}

    S = curvlab.sqrt_fisher(model, loss, x, y, **how, **source())
    for memory in budgets(S):
        assert_close(curvlab.gram(model, (x, y), loss=loss, memory=memory, **how, **source()), S.gram(), 1e-13)


def test_chunks_without_targets_that_count() -> None:
    model, x = architecture("mlp").make(N=6)
    y = torch.tensor([-100, -100, -100, 0, 1, -100])
    S = curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)
    streamed = curvlab.gram(model, (x, y), loss=nn.CrossEntropyLoss(), memory=budgets(S)[-1])
    assert_close(streamed, S.gram(), 1e-13)
    with pytest.raises(ValueError, match="No target carries weight"):
        curvlab.gram(model, (x, torch.full((6,), -100)), loss=nn.CrossEntropyLoss(), memory=budgets(S)[-1])


def test_the_jacobian_goes_by_the_same_engine_whatever_the_kind(caplog: pytest.LogCaptureFixture) -> None:
    model, x = architecture("mlp").make(N=6)
    with caplog.at_level("INFO", logger="curvlab"):
        assert_close(curvlab.gram(model, x, kind="empirical"), curvlab.jacobian(model, x).gram(), 1e-13)
    (record,) = caplog.records
    assert "BackPACK engine" in record.message


def test_results_go_where_they_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = architecture("mlp").make(N=10)
    out = torch.full((30, 30), torch.nan, dtype=torch.float64)
    assert curvlab.gram(model, x, out=out, memory=budgets(curvlab.jacobian(model, x))[-1], progress=True) is out
    assert_close(out, curvlab.jacobian(model, x).gram(), 1e-13)
    shown = capsys.readouterr().err
    assert "[1/12] chunk 1 of the panel from 1: done" in shown
    assert "[12/12] chunk 10 of the panel from 9: done" in shown


def test_inputs_and_targets_of_any_structure() -> None:
    model, inputs = architecture("dict").make(N=5)
    inputs = {name: value for name, value in inputs.items() if name != "flag"}
    J = curvlab.jacobian(model, inputs)
    assert_close(curvlab.gram(model, inputs, memory=budgets(J)[-1]), J.gram(), 1e-13)
    loss = MultiTask(
        {"a": Task(HalfSquaredError("sum"), slice(0, 2)), "b": Task(nn.MSELoss(reduction="sum"), slice(2, 3))}
    )
    z = outputs(model, inputs)
    y = {"a": (z[:, :2] + 1, torch.arange(5) > 1), "b": z[:, 2:]}
    S = curvlab.sqrt_fisher(model, loss, inputs, y)
    assert_close(curvlab.gram(model, (inputs, y), loss=loss, memory=budgets(S)[-1]), S.gram(), 1e-13)


def test_loaders_are_joined() -> None:
    model, x = architecture("mlp").make(N=7)
    y = torch.tensor([0, 1, 2, -100, 0, 1, 1])
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    assert_close(curvlab.gram(model, loader), curvlab.jacobian(model, x).gram(), 1e-13)
    loss = nn.CrossEntropyLoss()
    S = curvlab.sqrt_fisher(model, loss, x, y)
    for batches in (loader, [(x[:2], y[:2]), (x[2:], y[2:])], [(x, y)]):
        assert_close(curvlab.gram(model, batches, loss=loss, memory=budgets(S)[-1]), S.gram(), 1e-13)
    model, inputs = architecture("dict").make(N=5)
    parts = [(tree_map_only(Tensor, itemgetter(k), inputs), y[k]) for k in (slice(2), slice(2, 5))]
    assert_close(curvlab.gram(model, parts), curvlab.jacobian(model, inputs).gram(), 1e-13)


def test_what_does_not_fit_is_named() -> None:
    model, x = architecture("mlp").make(N=6)
    with pytest.raises(MemoryError, match=r"rows of one sample take .*memory must be at least .* it is 100 B"):
        curvlab.gram(model, x, memory=100)
    with pytest.raises(ValueError, match=r"out must be contiguous, \[18, 18\] and torch\.float64; it is \[17, 17\]"):
        curvlab.gram(model, x, out=torch.zeros(17, 17, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"data is a pair \(inputs, targets\) or an iterable of pairs .* got a Tensor"):
        curvlab.gram(model, x, loss=nn.MSELoss())
    with pytest.raises(ValueError, match=r"A batch is a pair \(inputs, targets\), got a Tensor"):
        curvlab.gram(model, [x])
    with pytest.raises(ValueError, match="The data hold no batch"):
        curvlab.gram(model, [], loss=nn.MSELoss())
    with pytest.raises(ValueError, match=r"their lengths are \[5, 6\]"):
        curvlab.gram(model, (x, x[:5]), loss=nn.MSELoss())


class Laplacian(nn.Module):
    """The Laplacian of a network with respect to its inputs, by torch.func."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.batched = batched
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        def value(point: Tensor) -> Tensor:
            return self.net(point[None])[0, 0] if self.batched else self.net(point)[0]

        return vmap(lambda point: jacrev(jacrev(value))(point).trace())(x)[:, None]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_models_that_differentiate_by_torch_func(N: int, batched: bool) -> None:
    """Whatever axis inside of the transforms is as long as there are samples."""
    model, x = Laplacian(batched), torch.randn(N, 2, dtype=torch.float64)
    J = dense_jacobian(model, x)
    assert_close(curvlab.jacobian(model, x).dense(), J)
    assert_close(curvlab.gram(model, x), J @ J.T)
    y = torch.zeros(N, 1, dtype=torch.float64)
    assert_close(curvlab.gram(model, (x, y), loss=nn.MSELoss(), memory=8000), 2 / N * J @ J.T)


def by_sample(N: int, *rest: int) -> Tensor:
    return torch.linspace(0.5, 2, N, dtype=torch.float64).view(N, *(1,) * len(rest)).expand(N, *rest).contiguous()


HELD: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: WeightedCrossEntropy(by_sample(7)),
    "variance": lambda: GaussianNLL(by_sample(7, 3)),
    "one-variance": lambda: GaussianNLL(by_sample(7, 1), "sum"),
    "output-variance": lambda: GaussianNLL(by_sample(3)),
    "bce": lambda: nn.BCEWithLogitsLoss(by_sample(7, 1)),
    "scaled": lambda: Scaled(nn.BCEWithLogitsLoss(by_sample(7, 3), reduction="sum"), 2.0),
}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", HELD)
def test_losses_that_hold_an_entry_a_sample(name: str, kind: Any) -> None:
    model, x = architecture("mlp").make(N=7)
    loss = HELD[name]()
    y = torch.arange(7) % 3 if name == "weights" else (outputs(model, x) > 0).double()
    S = curvlab.sqrt_fisher(model, loss, x, y, kind)
    held = {key: value.clone() for key, value in loss.state_dict().items()}
    for memory in budgets(S):
        assert_close(curvlab.gram(model, (x, y), loss=loss, kind=kind, memory=memory), S.gram(), 1e-13)
    for key, value in loss.state_dict().items():
        assert torch.equal(value, held[key])


class OwnWeights(nn.Module):
    reduction = "sum"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("importance", by_sample(7, 1))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (self.importance * (z - y) ** 4).sum()


def test_an_own_loss_that_holds_an_entry_a_sample_is_told_where_to_put_it() -> None:
    model, x = architecture("mlp").make(N=7)
    with pytest.raises(UnsupportedModel, match=r"OwnWeights holds importance with one entry a sample(?s:.)*PerSample"):
        curvlab.gram(model, (x, torch.zeros(7, 3).double()), loss=OwnWeights(), kind="ggn")


IMPORTANCE = by_sample(7)
STEPS = (torch.arange(7) // 2).double() + 1


def by_object() -> Callable[..., Tensor]:
    class Weighed:
        weights = IMPORTANCE

        def __call__(self, z: Tensor, y: Tensor) -> Tensor:
            return self.weights * (z - y).square().sum(1)

    return Weighed()


HIDDEN: dict[str, Callable[..., Tensor]] = {
    "closure": lambda z, y: IMPORTANCE * (z - y).square().sum(1),
    "default": lambda z, y, w=IMPORTANCE: w * (z - y).square().sum(1),
    "partial": partial(lambda w, z, y: w * (z - y).square().sum(1), IMPORTANCE),
    "object": by_object(),
    "first-of-them": lambda z, y: STEPS[: len(z)] * (z - y).square().sum(1),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_weights_of_samples_in_closures_are_refused_by_name(name: str, own: bool) -> None:
    class Own(nn.Module):
        reduction = "sum"

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return HIDDEN[name](z, y).sum()

    model, x = architecture("mlp").make(N=7)
    loss, y = (Own() if own else PerSample(HIDDEN[name], "sum")), torch.zeros(7, 3).double()
    message = (
        "is not a sum over samples" if name == "first-of-them" else r"may hold tensors with one entry a sample, and"
    )
    for call in (
        lambda: curvlab.sqrt_fisher(model, loss, x, y, "ggn"),
        lambda: curvlab.gram(model, (x, y), loss=loss, kind="ggn"),
        lambda: curvlab.gram(model, (x, y), loss=loss, kind="ggn", memory=8000),
    ):
        with pytest.raises(UnsupportedModel, match=rf"{message}(?s:.)*PerSample"):
            call()
    preconditioner = Preconditioner(model, loss, "full", kind="ggn", kl_clip=None)
    with pytest.raises(UnsupportedModel, match=message), preconditioner.collect():
        loss(model(x), y)


def test_weights_handed_over_with_the_targets() -> None:
    model, x = architecture("mlp").make(N=7)
    weighed = PerSample(lambda z, t: t[1] * (z - t[0]).square().sum(1), "sum")
    y = torch.zeros(7, 3).double()
    S = curvlab.sqrt_fisher(model, weighed, x, (y, IMPORTANCE), "ggn")
    J = curvlab.jacobian(model, x)
    expected = (2 * IMPORTANCE).sqrt().repeat(3)[:, None] * J.dense()
    assert_close(S.dense(), expected)
    assert_close(Full().fit(model, weighed, (x, (y, IMPORTANCE)), kind="ggn").to_dense(), S.dense().mT @ S.dense())
    for memory in budgets(S):
        assert_close(
            curvlab.gram(model, (x, (y, IMPORTANCE)), loss=weighed, kind="ggn", memory=memory), S.gram(), 1e-13
        )
