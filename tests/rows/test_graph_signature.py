"""Rows of passes in which samples take another way through the model than in those that were checked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import UnsupportedModel
from curvlab.fisher import Full
from curvlab.optim import Preconditioner
from curvlab.rows import graph_signature, guard, jacobian
from curvlab.rows.digest import digest
from curvlab.testing.oracle import assert_close, dense_jacobian


class ByLength(nn.Module):
    """Sorts its samples by length, as before packing, and brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        hidden, _ = self.rnn(x[order])
        last = hidden[torch.arange(len(x)), lengths - 1]
        return self.head(last[order.argsort()])


class Reusing(nn.Module):
    """Uses the weight of a layer once more where a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.flag = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(h @ self.first.weight) if self.flag else h)


class Positions(nn.Module):
    """Learned positions, whose layer is called on no sample; as many as samples in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(i) + self.place(torch.arange(i.shape[1]))).mean(1))


@pytest.mark.parametrize("sorted_first", [True, False])
def test_samples_that_are_sorted_in_some_batches_only(sorted_first: bool) -> None:
    model, x = ByLength().to(DOUBLE), torch.randn(4, 5, 3, dtype=DOUBLE)
    batches = [torch.tensor([5, 4, 3, 2]), torch.tensor([2, 5, 3, 4]), torch.tensor([3, 2, 4, 5])]
    for lengths in batches if sorted_first else reversed(batches):
        assert_close(jacobian(model, (x, lengths)).dense(), dense_jacobian(model, (x, lengths)))


def test_a_weight_that_is_used_elsewhere_from_some_batch_on() -> None:
    model, x = Reusing().to(DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    for flag in (False, True, False):
        model.flag = flag
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))


class Between(nn.Module):
    """Two layers, and a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(torch.tanh(self.first(x))))


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def vmap(_: Any, in_dims: Any, x: Tensor) -> Any:
        return 2 * x, in_dims[0]

    @staticmethod
    def backward(_: Any, g: Tensor) -> Tensor:
        return 2 * g


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (F.relu, 1),
        (lambda h: h[:, :2] @ torch.ones(2, 4, dtype=DOUBLE), 1),
        (lambda h: (torch.ones(4, 4, dtype=DOUBLE) @ h.T).T, 1),
        (lambda h: h.masked_fill(h > 0, 0.0), 1),
        (lambda h: h.softmax(-1) * h.mean(1, keepdim=True), 1),
        (lambda h: torch.cat([h[:, 2:], h[:, :2]], -1).unsqueeze(1).transpose(1, 2).flatten(1), 1),
        (lambda h: torch.cat([h.split(2, 1)[1], torch.unsafe_chunk(h, 2, 1)[0].softmax(1)], -1), 1),
        (lambda h: torch._safe_softmax(h, -1), 1),
        (lambda h: h[torch.arange(len(h))], 3),
        (lambda h: h.gather(1, torch.zeros_like(h, dtype=torch.long)), 3),
        (lambda h: torch.eye(len(h), dtype=DOUBLE) @ h, 3),
        (lambda h: h.roll(0, 0), 3),
        (Doubling.apply, 3),
    ],
)
def test_only_what_is_not_known_to_keep_samples_apart_is_checked_for_every_batch(
    function: Callable[[Tensor], Tensor], times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared: list[int] = []
    compare = guard.compare_with_reverse_pass

    def note(parameters: Any, z: Any, cotangents: Any, layers: Any) -> Any:
        compared.append(1)
        return compare(parameters, z, cotangents, layers)

    monkeypatch.setattr(guard, "compare_with_reverse_pass", note)
    model = Between(function).to(DOUBLE)
    for _ in range(3):
        jacobian(model, torch.randn(5, 3, dtype=DOUBLE), engine="autograd")
    assert len(compared) == times
    said = [record.message for record in caplog.records if "another backward pass for every batch" in record.message]
    assert len(said) == (times > 1)


def test_rows_that_are_always_compared_pay_another_forward_pass_once() -> None:
    passes: list[int] = []

    def rolled(h: Tensor) -> Tensor:
        passes.append(len(h))
        return h.roll(0, 0)

    model = Between(rolled).to(DOUBLE)
    for N in (4, 4, 4, 5, 5, 4):
        jacobian(model, torch.randn(N, 3, dtype=DOUBLE), engine="autograd")
    assert passes == [4, 4, 4, 4, 5, 5, 5, 4]


def test_a_random_model_that_is_always_compared_is_refused() -> None:
    model = Between(lambda h: h.roll(0, 0) * torch.rand(())).to(DOUBLE)
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="the model is random"):
            jacobian(model, torch.randn(4, 3, dtype=DOUBLE))


def test_a_function_of_ones_own_by_the_name_of_a_known_one() -> None:
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.roll(1, 0)

        @staticmethod
        def backward(_: Any, g: Tensor) -> Tensor:
            return g.roll(-1, 0)

    model, x = Between(F.relu).to(DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    model.function = Relu.apply
    with pytest.raises(UnsupportedModel, match="samples interact"):
        jacobian(model, x)


def read_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the graphs that are read from here on, digests that are known apart."""
    found: list[Any] = []
    read = graph_signature._read

    def note(functions: Any, *asked: Any) -> Any:
        found.append(functions)
        return read(functions, *asked)

    monkeypatch.setattr(graph_signature, "_read", note)
    return found


def test_a_graph_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_graphs(monkeypatch)
    model, loss = Positions().to(DOUBLE), nn.CrossEntropyLoss()
    natural = Preconditioner(model, loss, Full(), kind="exact", damping=1e-2, kl_clip=None)

    def step(T: int) -> int:
        before, i = len(found), torch.randint(7, (4, T))
        jacobian(model, i)
        model.zero_grad()
        with natural.collect():
            loss(model(i), torch.randint(3, (4,))).backward()
        natural.precondition()
        return len(found) - before

    assert [step(T) for T in (5, 5, 4, 5, 4)] == [4, 0, 2, 0, 0], (
        "two more, while it is not known that positions are shared"
    )


def test_tables_forget_the_oldest() -> None:
    table: dict[Any, int] = {}
    for n in range(5):
        graph_signature.remember(table, n, n, 3)
    assert table == {2: 2, 3: 3, 4: 4}


SHIFT = torch.eye(4, dtype=DOUBLE).roll(1, 0).requires_grad_()
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "transpose": (lambda h: h.transpose(0, 0), lambda h: h.transpose(0, 1)),
    "permute": (lambda h: h.permute(0, 1), lambda h: h.permute(1, 0)),
    "softmax": (lambda h: h.softmax(1), lambda h: h.softmax(0)),
    "cumsum": (lambda h: h.cumsum(1), lambda h: h.cumsum(0)),
    "log_softmax": (lambda h: h.log_softmax(-1), lambda h: h.log_softmax(-2)),
    "mean": (lambda h: h + h.mean(1)[:, None], lambda h: h + h.mean(0)[:, None]),
    "unbind": (lambda h: torch.stack(h.unbind(1), 1), lambda h: torch.stack(h.unbind(0), 1)),
    "split": (lambda h: torch.cat(h.split(1, 1)[::-1], 1), lambda h: torch.cat(h.split(1, 0)[::-1], 0)),
    "unsqueeze": (
        lambda h: h.unsqueeze(1).expand(4, 4, 4).mean(1),
        lambda h: h.unsqueeze(0).expand(4, 4, 4).mean(1),
    ),
    "layer_norm": (
        lambda h: F.layer_norm(h.view(4, 4, 1).expand(4, 4, 4), (4,)).mean(2),
        lambda h: F.layer_norm(h.view(4, 4, 1).expand(4, 4, 4), (4, 4, 4)).mean(2),
    ),
    "view": (lambda h: h.view(4, 1, 4).cumsum(1).view(4, 4), lambda h: h.view(1, 4, 4).cumsum(1).view(4, 4)),
    "constant": (
        lambda h: (h * torch.ones(4, dtype=DOUBLE)).softmax(1).view(4, 4),
        lambda h: (h * torch.ones(1, 1, 4, dtype=DOUBLE)).softmax(1).view(4, 4),
    ),
    "order": (lambda h: h @ SHIFT + h.exp() @ SHIFT.exp(), lambda h: h @ SHIFT + SHIFT.exp() @ h.exp()),
}


@pytest.mark.parametrize("alike", ALIKE)
def test_graphs_of_the_same_functions_are_told_apart(alike: str) -> None:
    """Of square batches, so that shapes differ as little as can be."""
    apart, mixing = ALIKE[alike]
    model, x = Between(apart).to(DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    for _ in range(2):
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x).detach())
    model.function = mixing
    with pytest.raises(UnsupportedModel, match=r"samples interact|no factored rows"):
        jacobian(model, x)
    model.function = apart
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x).detach())


def test_a_digest_holds_which_output_of_a_function_is_used() -> None:
    h = torch.randn(3, 3, requires_grad=True)
    digests = [digest([column.tanh().grad_fn], {})[1] for column in h.unbind(1)]
    assert len({hash(tuple(entries)) for entries in digests}) == 3


class Gated(nn.Module):
    """Something else beside a layer, behind a gate that opens later."""

    def __init__(self, beside: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.beside, self.gate = nn.Linear(3, 3), nn.Linear(3, 2), beside, 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + self.gate * self.beside(self.first, h))


BESIDE = {
    "weight": lambda layer, h: torch.tanh(F.linear(h, layer.weight.T)),
    "mean": lambda layer, h: h.mean(0),
    "permutation": lambda layer, h: torch.eye(len(h), dtype=DOUBLE).roll(1, 0) @ h,
    "pairs": lambda layer, h: h.view(2, 2, 3).flip(1).reshape(4, 3),
    "sum": lambda layer, h: h * h.norm(),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_gate_that_opens(beside: str) -> None:
    """Nothing passed through it while rows were checked."""
    model, x = Gated(BESIDE[beside]).to(DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    model.gate = 1.0
    if beside == "weight":
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    else:
        with pytest.raises(UnsupportedModel, match=r"first\.weight.*samples interact"):
            jacobian(model, x)


class ZeroHead(nn.Module):
    """Uses a weight twice, below a head that starts from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.first(x)), self.first.weight.T)))


class ZeroPositions(nn.Module):
    """Positions, as many as samples, below a head that starts from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(i) + self.place(torch.arange(i.shape[1]))).mean(1))


@pytest.mark.parametrize("make", [ZeroHead, ZeroPositions])
def test_a_head_that_starts_from_zero(make: type[nn.Module]) -> None:
    """A check of gradients that are zero has checked nothing."""
    model, loss = make().to(DOUBLE), nn.CrossEntropyLoss()
    x = torch.randn(4, 3, dtype=DOUBLE) if make is ZeroHead else torch.randint(7, (4, 4))
    y, natural = torch.randint(2, (4,)), Preconditioner(model, loss, Full(), kind="exact", damping=1e-2, kl_clip=None)
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(4):
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
        sgd.zero_grad()
        with natural.collect():
            loss(model(x), y).backward()
        natural.precondition()
        z = model(x).detach()
        p = torch.softmax(z, -1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        J = dense_jacobian(model, x).view(z.shape[1], 4, -1)
        assert_close(natural.structure.to_dense(), torch.einsum("cnp,ncd,dnq->pq", J, H, J) / 4)
        sgd.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_a_small_branch_are_compared_with_its_own_gradient(dtype: torch.dtype) -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(1e3 * x) + 1e-4 * self.small(x).flip(0)

    with pytest.raises(UnsupportedModel, match=r"gradient of small\.weight\."):
        jacobian(Branched().to(dtype), torch.randn(4, 3, dtype=dtype))


def test_parts_that_compute_in_single_precision() -> None:
    """Their round-off is measured, and is no sign of samples that interact."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).float()
            h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).double()
            return self.last(torch.tanh(self.norm(h)))

    model, x = Mixed().to(DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    error = jacobian(model, x).dense() - dense_jacobian(model, x)
    assert float(error.norm()) < 1e-5


def test_batch_normalisation_does_not_hide_a_weight_that_is_used_elsewhere() -> None:
    class Normalised(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.first, self.norm, self.last, self.again = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), again

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            return self.last(torch.tanh(F.linear(h, self.first.weight) if self.again else h))

    x, y, loss = torch.randn(6, 3), torch.randint(2, (6,)), nn.CrossEntropyLoss()
    for again in (False, True):
        model = Normalised(again)
        natural = Preconditioner(model, loss, "kfac", kind="mc", damping=1e-2, kl_clip=None)

        def step(model: nn.Module = model, natural: Preconditioner = natural) -> None:
            with natural.collect():
                loss(model(x), y).backward()
            natural.precondition()

        if again:
            with pytest.raises(
                UnsupportedModel, match=r"norm normalise by the batch, so first\.weight.*no factored rows.*plain="
            ):
                step()
        else:
            step()


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_training_on_batches_with_as_many_positions_as_samples(kind: Any) -> None:
    model, loss = Positions().to(DOUBLE), nn.CrossEntropyLoss()
    natural = Preconditioner(model, loss, Full(), kind=kind, damping=1e-2, kl_clip=None)
    for T in (5, 4, 6, 4, 5):
        x, y = torch.randint(7, (4, T)), torch.randint(3, (4,))
        model.zero_grad()
        with natural.collect():
            loss(model(x), y).backward()
        natural.precondition()
        expected = Full.fit(unchecked(model), loss, (x, y), kind=kind)
        assert_close(natural.structure.to_dense(), expected.to_dense())


def unchecked(model: nn.Module) -> nn.Module:
    """Return a model of the same parameters that nobody has checked yet."""
    fresh = Positions().to(DOUBLE)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_positions_have_one_form_whatever_the_batch() -> None:
    """Also as many as samples, below a head of zeros, so that a structure trains on."""
    model, loss = ZeroPositions().to(DOUBLE), nn.CrossEntropyLoss()
    natural = Preconditioner(model, loss, "kfac", kind="exact", damping=1e-1, kl_clip=None)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for N in (4, 3, 4, 5):
        x, y = torch.randint(7, (N, 4)), torch.randint(3, (N,))
        kinds = {layer.name: type(layer).__name__ for layer in jacobian(model, x).layers}
        assert kinds == {"token": "EmbeddingRows", "place": "EmbeddingRows", "head": "KroneckerRows"}
        assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
        sgd.zero_grad()
        with natural.collect():
            loss(model(x), y).backward()
        natural.precondition()
        sgd.step()
