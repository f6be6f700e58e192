"""Half-precision models and autocast: rows in the type that is asked for, with the error that is stated."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvlab
from curvlab.fisher import STRUCTURES
from curvlab.optim import Preconditioner
from curvlab.rows import Rows, sqrt_fisher

Made = tuple[nn.Module, Tensor]


def perceptron() -> Made:
    layers = nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    return nn.Sequential(*layers), torch.randn(12, 20)


def convolution() -> Made:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)), torch.randn(12, 3, 6, 6)


def normalised() -> Made:
    return nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 5)), torch.randn(12, 20)


NETWORKS: dict[str, Callable[[], Made]] = {"mlp": perceptron, "conv": convolution, "norm": normalised}
LABELS = torch.arange(12) % 5
HALF = 4e-3


def network(name: str) -> Made:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]()


def error(gram: Tensor, reference: Tensor) -> float:
    return float((gram.double() - reference).norm() / reference.norm())


def rows_of(model: nn.Module, x: Tensor, kind: str, **how: Any) -> Rows:
    generator = torch.Generator().manual_seed(0) if kind == "mc" else None
    return sqrt_fisher(model, nn.CrossEntropyLoss(), x, LABELS, kind, generator=generator, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_models_and_autocast(name: str, kind: str, dtype: torch.dtype) -> None:
    model, x = network(name)
    reference = rows_of(copy.deepcopy(model).double(), x.double(), kind).gram()
    half = copy.deepcopy(model).bfloat16()
    rows = rows_of(half, x.bfloat16(), kind, dtype=dtype)
    assert rows.dtype == rows.sample_weights.dtype == dtype
    assert HALF / 20 < error(rows.gram(), reference) < 3 * HALF
    with torch.autocast("cpu", torch.bfloat16):
        cast = rows_of(model, x, kind, dtype=dtype)
    assert cast.dtype == dtype
    assert HALF / 20 < error(cast.gram(), reference) < 3 * HALF
    single = rows_of(model, x, kind, dtype=dtype)
    assert error(single.gram(), reference) < 1e-6
    J = curvlab.jacobian(half, x.bfloat16(), dtype=dtype)
    assert J.dtype == dtype
    if kind == "exact":
        assert torch.equal(J.dense(), rows.jacobian().dense())


def test_rows_of_a_half_model_are_in_its_type_unless_another_is_asked_for() -> None:
    model, x = network("mlp")
    assert rows_of(copy.deepcopy(model).bfloat16(), x.bfloat16(), "exact").dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for kind in ("exact", "mc", "empirical"):
            assert rows_of(model, x, kind).dtype == torch.float32


SMALL = [key for key in STRUCTURES if key != "adaptive-inverse"]
"""Structures that are not always a matrix over all parameters, which are many here."""


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("key", SMALL)
def test_structures_of_half_precision_models(key: str, autocast: bool) -> None:
    """Damped solves with rows of a half-precision sweep in float32 stay within its round-off over the damping."""
    model, x = network("mlp")
    made = model if autocast else copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        rows = rows_of(made, x if autocast else x.bfloat16(), "exact", dtype=torch.float32)
    exact = rows_of(copy.deepcopy(model).double(), x.double(), "exact")
    got, expected = STRUCTURES[key]().update(rows), STRUCTURES[key]().update(exact)
    g = torch.randn(exact.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    solved = got.solve(g.float(), "rel:0.1")
    assert error(solved, expected.solve(g, "rel:0.1")) < 6 * HALF  # type: ignore[arg-type]
    assert torch.equal(got.solve(g.bfloat16(), "rel:0.1"), solved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"The vector is torch.float64 at '0.weight', the structure torch.float32"):
        got.solve(g, 1.0)
    if not autocast:
        widened = STRUCTURES[key]().update(rows.to(torch.bfloat16))
        assert widened.rows.dtype == torch.float32
        assert error(widened.solve(g.float(), "rel:0.1"), solved.double()) < 6 * HALF  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["exact", "mc"])
@pytest.mark.parametrize("key", SMALL)
def test_fits_under_autocast_add_up_in_the_type_of_the_parameters(key: str, kind: Any) -> None:
    """Only the model is called under it: the fit, and what a step in training collects, are those of its rows."""
    (model, x), loss = network("mlp"), nn.CrossEntropyLoss()
    options: Any = {"kind": kind, "output": Tensor.float, "engine": "autograd"}

    def fresh() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(0)} if kind == "mc" else {}

    training = Preconditioner(model, loss, key, kind=kind, damping=0.1, seed=0, kl_clip=None)
    with torch.autocast("cpu", torch.bfloat16):
        fit = STRUCTURES[key].fit(model, loss, (x, LABELS), **options, **fresh())
        # A root at the output, before the sweep or after it, rounds otherwise.
        rows, kept = (
            sqrt_fisher(model, loss, x, LABELS, keep_jacobian=keep, **options, **fresh())
            for keep in (not STRUCTURES[key].averages, True)
        )
        with training.collect():
            loss(model(x).float(), LABELS).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        training.precondition()
    assert fit.dtype == torch.float32
    assert error(fit.to_dense(), STRUCTURES[key]().update(rows).to_dense().double()) < 1e-5
    step = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert error(step, STRUCTURES[key]().update(kept).solve(gradient, 0.1).double()) < 1e-4  # type: ignore[union-attr]


class Mixed(nn.Module):
    """A body in one type and a head in another."""

    def __init__(self, body: torch.dtype, head: torch.dtype) -> None:
        super().__init__()
        self.types = body, head
        self.body, self.head = nn.Linear(20, 16).to(body), nn.Linear(16, 5).to(head)

    def forward(self, x: Tensor) -> Tensor:
        body, head = self.types
        return self.head(self.body(x.to(body)).tanh().to(head))


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_rows_of_parameters_of_several_types_are_in_the_widest(types: tuple[torch.dtype, ...], kind: str) -> None:
    model, x = Mixed(*types), torch.randn(12, 20)
    rows = rows_of(model, x, kind)
    assert {layer.dtype for layer in rows.layers} == {rows.sample_weights.dtype} == {types[1]}
    exact = Mixed(torch.float64, torch.float64)
    exact.load_state_dict(model.state_dict())
    if kind != "mc":
        tolerance = 3 * HALF if torch.bfloat16 in types else 1e-6
        assert error(rows.gram(), rows_of(exact, x.double(), kind).gram()) < tolerance
    assert curvlab.jacobian(model, x).dense().dtype == types[1]
