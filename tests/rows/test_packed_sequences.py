"""Recurrent networks on packed sequences, against reverse passes through torch's own kernels."""

from typing import Any

import pytest
import torch
from oracle import CLASSES, DOUBLE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from curvlab import gram, jacobian, sqrt_fisher
from curvlab.fisher import Full
from curvlab.optim import Preconditioner
from curvlab.rows.factored import KroneckerRows
from curvlab.spectrum import GGN
from curvlab.testing.oracle import assert_close

LENGTHS = torch.tensor([2, 4, 1, 3, 4])


class Packed(nn.Module):
    """A recurrent network on packed sequences `[N, 4, 3]` of unequal lengths, its outputs and last states."""

    def __init__(self, kind: type[nn.RNNBase], *, ordered: bool = False, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.net, self.ordered, self.given = kind(3, 4, **options), ordered, given
        width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.net.batch_first
        lengths = lengths.sort(descending=True).values if self.ordered else lengths
        packed = pack_padded_sequence(
            x if first else x.transpose(0, 1), lengths, batch_first=first, enforce_sorted=self.ordered
        )
        h = x[:, 0, :1].tanh() * torch.ones(self.net.num_layers, 1, 4, dtype=DOUBLE) if self.given else None
        y, end = self.net(packed, h)
        assert torch.equal(y.batch_sizes, packed.batch_sizes)
        y = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]
        extra = sum(state.square().sum((0, 2)) for state in (end if isinstance(end, tuple) else (end,)))
        return self.last(y).tanh().sum(1) + extra[:, None]


MODELS = {
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-all": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}),
    "gru-sorted": (nn.GRU, {"ordered": True, "bidirectional": True}),
    "rnn-states": (nn.RNN, {"given": True, "num_layers": 2}),
}


def made(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    kind, options = MODELS[name]
    return Packed(kind, **options).to(DOUBLE).eval(), (torch.randn(5, 4, 3, dtype=DOUBLE), LENGTHS)


def reference(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Return J, one reverse pass a row."""
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(*args).T.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_packed_sequences(name: str) -> None:
    model, args = made(name)
    rows = jacobian(model, args)
    assert {type(layer) for layer in rows.layers} == {KroneckerRows}
    assert_close(rows.dense(), reference(model, args))


def test_packed_lists_of_sequences_and_last_states_only() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.GRU(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_sequence([one[:n] for one, n in zip(x, lengths, strict=True)], enforce_sorted=False)
            return self.net(packed)[1][0]

    model, args = Last().to(DOUBLE), made("lstm")[1]
    assert_close(jacobian(model, args).dense(), reference(model, args))


@pytest.mark.parametrize("name", MODELS)
def test_preconditioners_of_packed_sequences(name: str) -> None:
    model, args = made(name)
    loss, targets = nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0, 1])
    preconditioner = Preconditioner(model, loss, "full", kind="exact", damping=0.1, kl_clip=None)
    with preconditioner.collect():
        loss(model(*args), targets).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    preconditioner.precondition()
    S = sqrt_fisher(model, loss, args, targets).dense()
    expected = torch.linalg.solve(S.T @ S + 0.1 * torch.eye(S.shape[1], dtype=DOUBLE), gradient)
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-8)


class OfPacked(nn.Module):
    """A network called on a packed sequence of vectors, or of indices."""

    def __init__(self, *, table: bool = False, every: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3) if table else None
        self.net, self.last, self.every = nn.GRU(3, 4), nn.Linear(4, CLASSES), every

    def forward(self, packed: PackedSequence) -> Tensor:
        if self.table is not None:
            packed = packed._replace(data=self.table(packed.data))
        y, end = self.net(packed)
        return self.last(pad_packed_sequence(y, batch_first=True)[0].sum(1) if self.every else end[0])


INPUTS = {
    "unequal": ([2, 4, 1, 3, 4], {}),
    "every-step": ([2, 4, 1, 3, 4], {"every": True}),
    "sorted": ([4, 3, 3, 1], {}),
    "single-steps": ([1, 1, 1], {}),
    "equal": ([3, 3, 3], {"every": True}),
    "indices": ([2, 4, 1, 3], {"table": True}),
    "equal-indices": ([2, 2, 2], {"table": True}),
    "single-indices": ([1, 1, 1, 1], {"table": True}),
    "one": ([3], {"table": True}),
}


def packed_case(name: str) -> tuple[nn.Module, PackedSequence, list[Tensor]]:
    torch.manual_seed(0)
    lengths, options = INPUTS[name]
    model = OfPacked(**options).to(DOUBLE)
    whole = [torch.randint(7, (n,)) if options.get("table") else torch.randn(n, 3, dtype=DOUBLE) for n in lengths]
    return model, pack_sequence(whole, enforce_sorted=name == "sorted"), whole


@pytest.mark.parametrize("name", INPUTS)
def test_models_called_on_a_packed_sequence(name: str) -> None:
    model, packed, whole = packed_case(name)
    N, loss = len(whole), nn.CrossEntropyLoss()
    J, y = reference(model, (packed,)), torch.arange(N) % CLASSES
    for inputs in (packed, (packed,), {"packed": packed}):
        assert_close(jacobian(model, inputs).dense(), J)
    p = model(packed).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    by_sample = J.view(CLASSES, N, -1)
    F = torch.einsum("cnp,ncd,dnq->pq", by_sample, H, by_sample) / N
    S = sqrt_fisher(model, loss, packed, y)
    assert_close(S.dense().T @ S.dense(), F)
    assert_close(GGN(model, loss, (packed, y)).to_dense(), F)
    assert_close(Full().fit(model, loss, (packed, y)).to_dense(), F)
    preconditioner = Preconditioner(model, loss, "full", kind="exact", damping=0.1, kl_clip=None)
    with preconditioner.collect():
        loss(model(packed), y).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    preconditioner.precondition()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert_close(found, torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=DOUBLE), gradient), 1e-8)
    for data in ((packed, y), [(pack_sequence(whole[n : n + 1]), y[n : n + 1]) for n in range(N)]):
        assert_close(gram(model, data, loss=loss, memory=100_000), S.gram(), 1e-13)
