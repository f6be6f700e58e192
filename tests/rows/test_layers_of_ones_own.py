"""Layers that are not in the table: their rows are derivatives of the layer alone, called on single samples."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import jacobian, sqrt_fisher
from curvlab.fisher import KFAC
from curvlab.optim import Preconditioner
from curvlab.rows import modules
from curvlab.rows.modules import own
from curvlab.testing.oracle import assert_close, dense_jacobian

N, C = 4, 2


class OwnNorm(nn.Module):
    """What language models have in place of `nn.RMSNorm`."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Gated(nn.Module):
    """Takes a tensor that all samples share, too; parameters of other names and shapes, one of them a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.slope = nn.Parameter(torch.randn(3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * x * scale + self.slope * x.square()


class Branching(nn.Module):
    """Looks at numbers, which torch cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([one * (self.up if float(one.detach().sum()) > 0 else self.down) for one in x])


class Centred(nn.Module):
    """Subtracts the mean over the batch, so that samples interact."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(0))


class Between(nn.Module):
    def __init__(self, layer: nn.Module, *more: Any, **named: Any) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(3, 3), layer, nn.Linear(3, C)
        self.more, self.named = more, named

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(torch.tanh(self.layer(torch.tanh(self.first(x)), *self.more, **self.named)))
        return h if h.ndim == 2 else h.transpose(1, 2)


def checked(model: nn.Module, x: Tensor) -> None:
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    loss, z = nn.CrossEntropyLoss(), model(x)
    y = torch.randint(C, (len(x), *z.shape[2:]))
    training = Preconditioner(model, loss, "full", kind="empirical", kl_clip=None)
    for _ in range(2):
        model.zero_grad()
        with training.collect():
            loss(model(x), y).backward()
        assert training._passes[0].rows is not None
        assert_close(training._passes[0].rows.dense(), sqrt_fisher(model, loss, x, y, "empirical").dense())
        training.precondition()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose rows came from their own forward pass, and how."""
    names: list[str] = []
    for how in ("_vectorised", "_one_by_one"):
        original = getattr(own, how)

        def spied(use: Any, *rest: Any, how: str = how, original: Any = original) -> Any:
            names.append(f"{use.name}{how}")
            return original(use, *rest)

        monkeypatch.setattr(own, how, spied)
    return names


@pytest.mark.parametrize("tokens", [None, 5])
def test_a_norm_of_ones_own(tokens: int | None, called: list[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    shape = (N, 3) if tokens is None else (N, tokens, 3)
    checked(Between(OwnNorm()).to(DOUBLE), torch.randn(*shape, dtype=DOUBLE))
    assert set(called) == {"layer_vectorised"}
    assert "checked by another backward pass for every batch" not in caplog.text


def test_inputs_that_samples_share_and_parameters_of_other_names(called: list[str]) -> None:
    torch.manual_seed(0)
    checked(Between(Gated(), torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)).to(DOUBLE), torch.randn(N, 3, dtype=DOUBLE))
    assert set(called) == {"layer_vectorised"}


def test_one_parameter_frozen(called: list[str]) -> None:
    torch.manual_seed(0)
    model = Between(Gated(), torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)).to(DOUBLE)
    model.layer.gate.requires_grad_(False)  # type: ignore[union-attr,operator]
    checked(model, torch.randn(N, 3, dtype=DOUBLE))
    assert called


def test_a_layer_that_looks_at_numbers_is_called_sample_by_sample(called: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Between(Branching()).to(DOUBLE), torch.randn(N, 3, dtype=DOUBLE)
    z = model(x)
    expected = []
    for c in range(C):
        for n in range(N):
            gradient = torch.autograd.grad(z[n, c], list(model.parameters()), retain_graph=True, materialize_grads=True)
            expected.append(torch.cat([g.flatten() for g in gradient]))
    assert_close(jacobian(model, x).dense(), torch.stack(expected))
    assert {"layer_vectorised", "layer_one_by_one"} <= set(called)


def test_a_layer_in_which_samples_interact_is_refused() -> None:
    torch.manual_seed(0)
    model = Between(Centred()).to(DOUBLE)
    with pytest.raises(Exception, match=r"layer\.weight"):
        jacobian(model, torch.randn(N, 3, dtype=DOUBLE))


def test_what_is_given_by_name_cannot_be_given_again(called: list[str]) -> None:
    """The layer's rows are then formed by calls of the model."""
    torch.manual_seed(0)
    model = Between(Gated(), scale=torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)).to(DOUBLE)
    x = torch.randn(N, 3, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    assert not called


def test_a_fit_takes_such_layers_as_it_reaches_them(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = Between(OwnNorm()).to(DOUBLE), torch.randn(N, 3, dtype=DOUBLE), torch.randint(C, (N,))

    def never(*_: Any) -> Any:
        raise AssertionError("The model was called on single samples.")

    monkeypatch.setattr("curvlab.rows.autograd.dense_rows", never)
    fitted = KFAC.fit(model, nn.CrossEntropyLoss(), (x, y), kind="mc", generator=torch.Generator().manual_seed(0))
    assert "layer" in [block.name for block in fitted._blocks]
    assert called


class Routed(nn.Module):
    """Returns two tensors, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * x, x.argmax(-1)


def test_a_layer_that_returns_several_tensors(called: list[str]) -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.last = Routed(), nn.Linear(3, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.router(x)[0]))

    torch.manual_seed(0)
    model, x = Picked().to(DOUBLE), torch.randn(N, 3, dtype=DOUBLE)
    assert_close(jacobian(model, x).dense(), dense_jacobian(model, x))
    assert not called


def test_torchs_own_layers_and_those_with_hooks_are_left_to_the_model() -> None:
    hooked = OwnNorm()
    hooked.register_forward_hook(lambda *_: None)
    for module in (hooked, nn.LSTM(2, 2), nn.ParameterList([torch.ones(2)]), Between(OwnNorm()), nn.Tanh()):
        assert modules.rule_for(module) is None
    assert modules.rule_for(OwnNorm()) is modules.OWN
    assert modules.rule_for(nn.Linear(2, 2)) is modules.RULES[nn.Linear]
