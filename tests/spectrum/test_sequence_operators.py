"""Products with Hessian, GGN and Fisher matrices of decoders, cut over tokens, against dense matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import StateError
from curvlab.rows import products
from curvlab.rows.loss import RowPer
from curvlab.spectrum import GGN, Fisher, Hessian, Operator
from curvlab.testing.oracle import assert_close
from curvlab.tools.live_memory import Live

N, T, C, WIDTH = 3, 5, 7, 4


class Decoder(nn.Module):
    """Tables of tokens and positions, a block of attention, and logits `[N, C, T]` or `[N·T, C]`."""

    def __init__(self, vocabulary: int = C, length: int = T, width: int = WIDTH, *, flat: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head, self.flat = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=not flat), flat

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions
        q, k, v = self.qkv(h).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        z = self.head(F.gelu(self.norm(h)))
        return z.flatten(0, 1) if self.flat else z.transpose(1, 2)


def data(*, flat: bool = False, batch: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x, y = torch.randint(C, (2, N, T), generator=generator)
    y[0, 1] = y[2, 3:] = -100
    return x, y.flatten() if flat else y


def decoder(*, flat: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(flat=flat).double()


LOSSES: dict[str, Callable[[], nn.CrossEntropyLoss]] = {
    "plain": nn.CrossEntropyLoss,
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "weighted": lambda: nn.CrossEntropyLoss(weight=torch.linspace(0, 2, C).double()),
    "smooth": lambda: nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, C).double(), label_smoothing=0.3),
}


@pytest.fixture(params=[1, 2 * C + 1, 11 * C, 1 << 20], ids=lambda limit: f"pieces-of-{limit}")
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut outputs into pieces of so many numbers: single tokens, some of a sample, whole samples, all."""
    monkeypatch.setattr(products, "cached", lambda _: request.param)


def dense(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian, and GGN from the Jacobian and the loss's Hessian at the outputs, in reverse mode."""
    own = list(model.parameters())

    def rows(numbers: Tensor) -> Tensor:
        found = [torch.autograd.grad(n, own, retain_graph=True, materialize_grads=True) for n in numbers.flatten()]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(x)
        first = torch.autograd.grad(loss(z, y), own, create_graph=True)
        J, H = rows(z), rows(torch.cat([g.flatten() for g in first]))
    at_output = torch.autograd.functional.hessian(lambda at: loss(at, y), z.detach()).view(z.numel(), -1)
    return H, J.T @ at_output @ J


def block(operator: Operator, K: int = 3) -> Tensor:
    return torch.randn(K, operator.size, dtype=operator.dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("flat", [False, True])
def test_products_in_pieces_of_any_size_are_those_of_dense_matrices(loss: str, flat: bool) -> None:
    model, criterion, (x, y) = decoder(flat=flat), LOSSES[loss](), data(flat=flat)
    H, G = dense(model, criterion, x, y)
    for chunk_size in (1, 2):
        for kind, expected in ((Hessian, H), (GGN, G)):
            operator = kind(model, criterion, (x, y), chunk_size=chunk_size)
            assert operator.batched
            assert_close(operator.matmat(block(operator)), block(operator) @ expected)


@pytest.mark.parametrize("names", [["head.bias"], ["head.weight"], ["norm.weight", "head.bias"], ["tokens.weight"]])
def test_products_of_some_parameters_are_parts_of_the_dense_ones(names: list[str]) -> None:
    model, criterion, (x, y) = decoder(), nn.CrossEntropyLoss(), data()
    for kind, expected in zip((Hessian, GGN), dense(model, criterion, x, y), strict=True):
        operator = kind(model, criterion, (x, y), chunk_size=1, parameters=names)
        every = kind(model, criterion, (x, y)).space
        index = every.unflatten(torch.arange(every.size).double())
        at = torch.cat([index[name].flatten() for name in operator.space.shapes]).long()
        assert_close(operator.to_dense(), expected[at][:, at])


class Around(nn.Module):
    """A norm, and a weight that its outputs go through there and back."""

    def __init__(self, norm: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm, self.weight = norm, weight

    def forward(self, h: Tensor) -> Tensor:
        h = self.norm(h)
        return h + F.linear(F.linear(h, self.weight), self.weight.T)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_weight_that_is_looked_up_and_used_in_several_layers(chunk_size: int) -> None:
    """What its uses add to a product comes on different ways."""
    model, criterion, (x, y) = decoder(flat=True), nn.CrossEntropyLoss(), data(flat=True)
    model.norm = Around(model.norm, model.tokens.weight)
    model.head.weight = model.tokens.weight
    for kind, expected in zip((Hessian, GGN), dense(model, criterion, x, y), strict=True):
        operator = kind(model, criterion, (x, y), chunk_size=chunk_size)
        assert operator.batched
        assert_close(operator.matmat(block(operator)), block(operator) @ expected)


def test_targets_that_are_probabilities() -> None:
    model, (x, _), criterion = decoder(), data(), LOSSES["smooth"]()
    y = torch.rand(N, C, T, dtype=torch.float64).softmax(1)
    H, G = dense(model, criterion, x, y)
    for kind, expected in ((Hessian, H), (GGN, G)):
        assert_close(kind(model, criterion, (x, y), chunk_size=1).to_dense(), expected)


@pytest.mark.parametrize("loss", ["weighted", "sum"])
def test_the_empirical_fisher_without_rows_is_that_of_the_gradients_of_tokens(loss: str) -> None:
    model, criterion, (x, y) = decoder(), LOSSES[loss](), data()
    weight = torch.ones(C).double() if criterion.weight is None else criterion.weight
    counted = torch.where(y == -100, 0, weight[y.clamp_min(0)])
    losses = F.cross_entropy(model(x), y, weight=weight, reduction="none")
    rows = []
    for w, own in zip(counted.flatten(), losses.flatten(), strict=True):
        g = torch.autograd.grad(own, list(model.parameters()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([p.flatten() for p in g]) / (w.sqrt() if w > 0 else 1))
    S = torch.stack(rows) / (counted.sum().sqrt() if criterion.reduction == "mean" else 1)
    assert_close(Fisher(model, criterion, (x, y), kind="empirical", keep_rows=False).to_dense(), S.T @ S)


@pytest.mark.parametrize(
    ("kind", "rows", "draws"),
    [
        ("exact", None, 1),
        ("mc", None, 1),
        ("mc", "term", 3),
        ("empirical", "term", 1),
        ("empirical", "sample", 1),
        ("empirical", "signs", 2),
        ("empirical", "batch", 1),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_fisher_matrices_without_rows_are_those_of_the_rows(
    kind: Any, rows: RowPer | None, draws: int, flat: bool
) -> None:
    """Over two batches, whose draws follow on each other, and several times over."""
    model, criterion, batches = decoder(flat=flat), LOSSES["smooth"](), [data(flat=flat, batch=b) for b in range(2)]
    found = []
    for keep_rows in (True, False):
        generator = torch.Generator().manual_seed(2) if kind == "mc" or rows == "signs" else None
        options = {"kind": kind, "rows": rows, "draws": draws, "generator": generator, "keep_rows": keep_rows}
        found.append(Fisher(model, criterion, batches, **options))
    V = block(found[0])
    for _ in range(2):
        assert_close(found[1].matmat(V), found[0].matmat(V))


def test_without_rows_there_are_none_to_hand_out() -> None:
    F_ = Fisher(decoder(), nn.CrossEntropyLoss(), data(), kind="empirical", keep_rows=False)
    with pytest.raises(StateError, match=r"keep_rows=False there are no rows; curvlab\.sqrt_fisher"):
        _ = F_.rows


class TestMemory:
    """Of a decoder whose logits are larger than all else, in bytes of tensors."""

    VOCABULARY, LENGTH = 4000, 64

    def problem(self) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        model = Decoder(self.VOCABULARY, self.LENGTH, 16, flat=True)
        x, y = torch.randint(self.VOCABULARY, (2, 2, self.LENGTH))
        return model, (x, y.flatten())

    def step(self) -> int:
        model, (x, y) = self.problem()
        with Live() as live:
            nn.CrossEntropyLoss()(model(x), y).backward()
        return live.peak

    @pytest.mark.parametrize(
        ("make", "bound"),
        [
            (lambda *given: GGN(*given, chunk_size=1), 1.5),
            (lambda *given: Fisher(*given, kind="empirical", keep_rows=False), 1.8),
            (lambda *given: Hessian(*given, chunk_size=1), 1.5),
        ],
    )
    @pytest.mark.parametrize("K", [1, 4])
    def test_a_product_takes_little_more_than_a_training_step(
        self, make: Callable[..., Operator], bound: float, K: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "cached", lambda _: 5 * self.VOCABULARY)
        model, batch = self.problem()
        operator = make(model, nn.CrossEntropyLoss(), batch)
        V = block(operator, K)
        with Live() as live:
            operator.matmat(V)
        assert live.peak <= bound * self.step() + (K > 1) * V.nbytes

    def test_large_outputs_go_one_vector_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = self.problem()
        outputs = 2 * self.LENGTH * self.VOCABULARY
        for room, expected in ((outputs - 1, 1), (3 * outputs, 3), (1 << 30, 16)):
            monkeypatch.setattr("curvlab.spectrum.autodiff.OUTPUTS", room)
            assert GGN(model, nn.CrossEntropyLoss(), batch).chunk_size == expected


def test_the_ggn_keeps_fused_attention_where_it_takes_reverse_mode_alone() -> None:
    model, (x, y) = decoder(), data()
    operator = GGN(model, nn.CrossEntropyLoss(), (x, y), chunk_size=1)
    with Live() as live:
        operator.matmat(block(operator, 1))
    assert {name for name in live.functions if "flash_attention" in name} == {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }
