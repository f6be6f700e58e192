"""Training on flattened logits takes the steps of training on positions with an axis of their own."""

import copy
from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn

from curvlab import sqrt_fisher
from curvlab.errors import UnsupportedModel
from curvlab.fisher import EKFAC, KFAC, STRUCTURES, Structure, make
from curvlab.optim import LevenbergMarquardt, NaturalGradient, Preconditioner
from curvlab.testing.oracle import assert_close

N, T, C = 5, 3, 3


class Tokens(nn.Module):
    """A sequence model with a table of positions that has no rule."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding, self.body, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, C)
        self.place = nn.Parameter(torch.randn(T, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.embedding(x) + self.place)).cumsum(1)
        if self.way == "deep":
            return self.head(h.reshape(-1, 3))
        z: Tensor = self.head(h)
        return {"apart": z.transpose(1, 2), "last": z, "flat": z.flatten(0, 1)}[self.way]


def tokens(way: str) -> Tokens:
    torch.manual_seed(0)
    return Tokens(way).to(DOUBLE)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(C, (N, T), generator=generator)
    y[0, 1] = -100
    return torch.randint(5, (N, T), generator=generator), y


def loss_module() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), label_smoothing=0.1)


def loss_of(model: Tokens, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x)
    value: Tensor = loss(z, y) if model.way == "apart" else loss(z.view(-1, C), y.view(-1))
    return value


def structures() -> dict[str, Structure]:
    layers = torch.eye(4) + 0.1
    made = {key: make(key, **({"sigma": layers.tolist()} if key == "layer-wise" else {})) for key in STRUCTURES}
    return {
        **made,
        "kfac-reduce": KFAC(sharing="reduce"),
        "kfac-gradient": KFAC(sharing="gradient"),
        "ekfac-gradient": EKFAC(sharing="gradient"),
    }


def direction(way: str, structure: Structure, kind: Any) -> Tensor:
    model, loss, (x, y) = tokens(way), loss_module(), data()
    pre = Preconditioner(model, loss, structure, kind=kind, damping=0.05, kl_clip=None)
    with pre.collect():
        loss_of(model, loss, x, y).backward()
    pre.precondition()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("key", list(structures()))
def test_the_direction_is_that_of_positions_on_an_axis_of_their_own(key: str, kind: str) -> None:
    structure = structures()[key]
    expected = direction("apart", copy.deepcopy(structure), kind)
    for way in ("last", "deep"):
        assert_close(direction(way, copy.deepcopy(structure), kind), expected, 1e-8)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("key", ["full", "kfac", "diagonal"])
def test_the_fit_of_a_model_that_returns_flattened_outputs(key: str, kind: Any) -> None:
    loss, (x, y) = loss_module(), data()
    kind_of = type(make(key))
    expected = kind_of.fit(tokens("apart"), loss, [(x, y), (x.flip(0), y.flip(0))], kind=kind)
    flat = [(x, y.flatten()), (x.flip(0), y.flip(0).flatten())]
    assert_close(kind_of.fit(tokens("flat"), loss, flat, kind=kind).to_dense(), expected.to_dense(), 1e-9)
    assert_close(
        make(key).update(sqrt_fisher(tokens("deep"), loss, x, y.flatten(), kind)).to_dense(),
        make(key).update(sqrt_fisher(tokens("apart"), loss, x, y, kind)).to_dense(),
    )


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"lr": "quadratic"}, {"damping": LevenbergMarquardt(every=1)}],
    ids=["momentum", "quadratic", "levenberg-marquardt"],
)
def test_natural_gradient_takes_the_same_steps(options: dict[str, Any]) -> None:
    (x, y), found = data(), {}
    for way in ("apart", "last", "deep"):
        model, loss = tokens(way), loss_module()
        made = NaturalGradient(
            model, loss, **{"lr": 0.2, "structure": "kfac", "kind": "mc", "damping": 0.1, "kl_clip": None} | options
        )
        for _ in range(3):
            made.zero_grad()
            with made.collect():
                loss_of(model, loss, x, y).backward()
            made.step()
        found[way] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_close(found["last"], found["apart"], 1e-8)
    assert_close(found["deep"], found["apart"], 1e-8)


def test_the_quadratic_model_knows_a_reshaped_output_by_the_graph_not_by_its_numbers() -> None:
    """Logits that are all zero are alike in any order."""
    model, loss, (x, y) = tokens("last"), loss_module(), data()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    made = NaturalGradient(model, loss, lr="quadratic", structure="kfac", kind="mc", damping=0.1, kl_clip=None)
    with made.collect():
        loss(model(x).flip(1).reshape(-1, C), y.flip(1).reshape(-1)).backward()
    with pytest.raises(UnsupportedModel, match="something else than what the model returned"):
        made.step()


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")], ids=["bce", "mse"])
def test_one_number_a_sample_may_lack_the_axis_of_outputs(loss: nn.Module, kind: Any) -> None:
    class Single(nn.Module):
        def __init__(self, *, squeezed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.scale = nn.Linear(4, 1), nn.Parameter(torch.ones(1))
            self.squeezed = squeezed

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.body(x) * self.scale
            return z.squeeze(1) if self.squeezed else z

    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.rand(6, dtype=DOUBLE)
    found = []
    for squeezed, late in ((False, False), (False, True), (True, False)):
        model = Single(squeezed=squeezed).to(DOUBLE)
        pre = Preconditioner(model, loss, "full", kind=kind, damping=0.1, kl_clip=None)
        with pre.collect():
            z = model(x)
            z = z.squeeze(1) if late else z
            loss(z, y.view_as(z)).backward()
        pre.precondition()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
