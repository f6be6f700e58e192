"""One batch, many batches and a loader that drops the last one agree."""

from typing import Any

import pytest
import torch
from oracle import LOSSES, LossCase, architecture, loss_case
from row_cases import fisher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvlab.rows
from curvlab.errors import StateError
from curvlab.fisher import STRUCTURES, Full
from curvlab.fisher.kronecker_structure import KroneckerStructure
from curvlab.rows import Rows, merge, sqrt_fisher
from curvlab.testing.oracle import assert_close, outputs

CASES = [pytest.param(case, id=case.name) for case in LOSSES]
SPLITS = {"4+3": (4, 3), "1+5+1": (1, 5, 1)}


def in_batches(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, sizes: tuple[int, ...], kind: Any) -> Rows:
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    total, *rest = (sqrt_fisher(model, loss, a, b, kind) for a, b in parts)
    for rows in rest:
        total = total + rows
    return total


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_batches_add_to_the_whole(case: LossCase, reduction: str, kind: Any, split: str) -> None:
    model, x = architecture("conv1d-grid").make(N=7)
    loss, y = case.make(outputs(model, x), reduction)
    whole = sqrt_fisher(model, loss, x, y, kind)
    merged = in_batches(model, loss, x, y, SPLITS[split], kind)
    assert_close(merged.dense(), whole.dense())
    assert merged.count == pytest.approx(whole.count, rel=1e-12)
    assert merged.terms == pytest.approx(whole.terms, rel=1e-12)
    assert merged.shape == whole.shape
    assert_close(merged.sample_weights, whole.sample_weights)
    if kind == "exact":
        assert_close(merged.jacobian().dense(), curvlab.rows.jacobian(model, x).dense())


def test_merging_is_associative_and_leaves_its_parts_alone() -> None:
    model, x = architecture("mlp").make(N=6)
    loss, y = loss_case("ce-all").make(outputs(model, x), "mean")
    a, b, c = (sqrt_fisher(model, loss, x[k : k + 2], y[k : k + 2]) for k in (0, 2, 4))
    before = [part.dense() for part in (a, b, c)]
    assert_close(((a + b) + c).dense(), (a + (b + c)).dense())
    assert_close(((a + b) + c).dense(), merge([a, b, c]).dense())
    assert all(torch.equal(part.dense(), old) for part, old in zip((a, b, c), before, strict=True))
    assert merge([a]) is a


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loader_that_drops_the_last_batch(reduction: str) -> None:
    model, x = architecture("mlp").make(N=8)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True)
    merged = merge([sqrt_fisher(model, loss, a, b) for a, b in loader])
    assert_close(merged.dense(), sqrt_fisher(model, loss, x[:6], y[:6]).dense())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_monte_carlo_batches(reduction: str) -> None:
    model, x = architecture("mlp").make(N=5)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    source = torch.Generator().manual_seed(0)
    parts = [
        sqrt_fisher(model, loss, a, b, "mc", draws=2, generator=source) for a, b in ((x[:3], y[:3]), (x[3:], y[3:]))
    ]
    weights = [part.terms for part in parts] if reduction == "mean" else [1.0, 1.0]
    total = sum(weights) if reduction == "mean" else 1.0
    expected = sum(w * fisher(part) for w, part in zip(weights, parts, strict=True)) / total
    assert isinstance(expected, Tensor)
    assert_close(fisher(parts[0] + parts[1]), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_decayed_merging(reduction: str) -> None:
    model, x = architecture("mlp").make(N=5)
    loss, y = loss_case("ce-weights").make(outputs(model, x), reduction)
    old, new = sqrt_fisher(model, loss, x[:3], y[:3]), sqrt_fisher(model, loss, x[3:], y[3:])
    merged = merge([old, new], decay=[0.25, 1.0])
    if reduction == "mean":
        total = 0.25 * old.terms + new.terms
        expected = (0.25 * old.terms * fisher(old) + new.terms * fisher(new)) / total
        assert merged.terms == pytest.approx(total)
    else:
        expected = 0.25 * fisher(old) + fisher(new)
    assert_close(fisher(merged), expected)
    assert_close(merged.sample_weights, torch.cat([0.25 * old.sample_weights, new.sample_weights]))
    assert_close(merged.jacobian().dense(), curvlab.rows.jacobian(model, x).dense())
    assert_close(fisher(merge([old], decay=[0.25])), fisher(old) * (1.0 if reduction == "mean" else 0.25))


@pytest.mark.parametrize("name", ["mlp", "attention", "embedding", "conv2d-groups", "bare", "batchnorm2d"])
def test_jacobians_stack(name: str) -> None:
    model, x = architecture(name).make(N=5)
    J = curvlab.rows.jacobian(model, x)
    stacked = curvlab.rows.jacobian(model, x[:2]) + curvlab.rows.jacobian(model, x[2:])
    assert_close(stacked.dense(), J.dense())
    assert_close(stacked.gram(), J.gram())
    assert (stacked.kind, stacked.count, stacked.terms) == ("jacobian", 1.0, 5.0)


def test_the_inverse_root_of_merged_rows() -> None:
    model, x = architecture("mlp").make(N=5)
    loss, y = loss_case("half").make(outputs(model, x), "mean")
    merged = in_batches(model, loss, x, y, (2, 3), "exact")
    whole, parts = (
        curvlab.rows.jacobian(model, x),
        curvlab.rows.jacobian(model, x[:2]) + curvlab.rows.jacobian(model, x[2:]),
    )
    assert merged.stems_from(parts)
    structure = Full().update(merged)
    assert_close(structure.response(whole, 0.1), structure.response(parts, 0.1))
    assert merged.root is not None
    back = merged.root.inverse()
    assert back is not None
    assert_close(back.apply(merged.dense().view(*merged.shape, -1)).flatten(0, 1), merged.jacobian().dense())


def test_parts_that_do_not_fit() -> None:
    model, x = architecture("mlp").make(N=4)
    y = torch.tensor([0, 1, 2, 0])
    J = curvlab.rows.jacobian(model, x)
    exact = sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)
    with pytest.raises(ValueError, match="differ in kind: 'exact' and 'jacobian'"):
        exact + J
    with pytest.raises(ValueError, match="differ in reduction: 'mean' and 'sum'"):
        exact + sqrt_fisher(model, nn.CrossEntropyLoss(reduction="sum"), x, y)
    other, x_ = architecture("linear").make(N=4)
    with pytest.raises(ValueError, match="Rows of different parameters"):
        J + curvlab.rows.jacobian(other, x_)
    source = torch.Generator().manual_seed(0)
    one, two = (sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, "mc", draws=s, generator=source) for s in (1, 2))
    with pytest.raises(ValueError, match="Rows a sample differ: 1 and 2"):
        one + two
    with pytest.raises(ValueError, match="nothing to stack"):
        merge([])


class Words(nn.Module):
    """An embedding and a layer at every word, averaged over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, words: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(words))).mean(1)


def test_batches_of_different_lengths() -> None:
    """Shorter samples are padded, and K-FAC's A still averages over the positions that a sample has."""
    model, loss = Words().double(), nn.CrossEntropyLoss()
    short, long = torch.randint(6, (2, 4)), torch.randint(6, (3, 5))
    J = [curvlab.rows.jacobian(model, words) for words in (short, long)]
    dense = [part.dense().view(3, -1, part.P) for part in J]
    for order in ((0, 1), (1, 0), (0, 1, 0)):
        stacked = merge([J[k] for k in order])
        assert_close(stacked.dense(), torch.cat([dense[k] for k in order], dim=1).flatten(0, 1))
        assert_close(stacked.gram(), stacked.dense() @ stacked.dense().T)
    rows = [sqrt_fisher(model, loss, words, torch.arange(len(words)) % 3) for words in (short, long)]
    for structure in STRUCTURES.values():
        for options in ({"sharing": "expand"}, {"sharing": "reduce"}) if "kfac" in structure.key else ({},):
            together = structure(**options).update(rows[0] + rows[1])
            if structure.passes == 1:
                apart = structure(**options).update(rows[0]).update(rows[1], 1.0)
                assert_close(together.to_dense(), apart.to_dense())
            copy = structure(**options)
            copy.load_state_dict(together.state_dict())
            assert_close(copy.to_dense(), together.to_dense())


class Latents(nn.Module):
    """Attends to its inputs with queries of its own, which a batch of one sample takes for that sample's.

    Queries that are not handed on by broadcasting have factored rows in such a batch only.
    """

    def __init__(self, *, broadcast: bool = True) -> None:
        super().__init__()
        self.broadcast = broadcast
        self.latents = nn.Parameter(torch.randn(1, 3, 4))
        self.query, self.key, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        k = self.key(x)
        q = self.query(self.latents)
        return self.last((((q if self.broadcast else q[0]) @ k.mT).softmax(-1) @ k).mean(1))


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (1, 1, 3)])
@pytest.mark.parametrize(
    ("key", "broadcast"),
    [
        (key, broadcast)
        for key in sorted(STRUCTURES)
        for broadcast in (True, False)
        if broadcast or not issubclass(STRUCTURES[key], KroneckerStructure)
    ],
)
def test_layers_that_are_factored_in_some_batches_only(key: str, sizes: tuple[int, ...], broadcast: bool) -> None:
    torch.manual_seed(0)
    model, loss = Latents(broadcast=broadcast).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(3, (5,))
    whole = STRUCTURES[key].fit(model, loss, (x, y))
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    assert_close(STRUCTURES[key].fit(model, loss, parts).to_dense(), whole.to_dense())


@pytest.mark.parametrize("key", ["kfac", "ekfac"])
def test_kronecker_factors_of_a_layer_that_loses_its_own(key: str) -> None:
    model, loss = Latents(broadcast=False), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 2, 4), torch.randint(3, (5,))
    structure = STRUCTURES[key]().update(sqrt_fisher(model, loss, x[:1], y[:1]))
    before = structure.to_dense()
    with pytest.raises(StateError, match="Layer 'query' had factored rows in the first batch and has none in this one"):
        structure.update(sqrt_fisher(model, loss, x[1:], y[1:]), 1.0)
    assert torch.equal(structure.to_dense(), before)
