"""The two-layer network: its formula, what of it is trained, its rows, K-FAC's leverage law, refusals."""

from math import sqrt

import pytest
import torch
from torch import nn

import curvlab
from curvlab import theory
from curvlab.errors import UnsupportedModel
from curvlab.fisher import KFAC
from curvlab.nn import Erf, HalfSquaredError, TwoLayer, linearize
from curvlab.rows.factored import KroneckerRows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_inputs(samples: int, features: int) -> torch.Tensor:
    x = torch.randn(samples, features, generator=generator(9), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def slopes(model: TwoLayer, x: torch.Tensor) -> torch.Tensor:
    u = x @ model.hidden.weight.detach().T
    derivative = 2 / sqrt(torch.pi) * torch.exp(-(u**2)) if isinstance(model.activation, Erf) else (u > 0).double()
    return model.signs * derivative / sqrt(len(model.signs))


@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_forward_is_the_formula(activation):
    model = TwoLayer(4, 7, activation, 0.8, generator(), torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    phi = {"relu": lambda u: u.clamp(min=0), "erf": torch.erf, "tanh": torch.tanh}[activation]
    expected = sum(a * phi(x @ w) for a, w in zip(model.signs, model.hidden.weight, strict=True)) / sqrt(7)
    assert model(x).shape == (5, 1)
    torch.testing.assert_close(model(x)[:, 0], expected)


def test_only_the_hidden_weights_are_trained():
    model = TwoLayer(4, 7)
    assert [(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()] == [
        ("hidden.weight", [7, 4], True)
    ]
    assert list(model.state_dict()) == ["signs", "hidden.weight"]
    other = TwoLayer(4, 7, generator=generator(5))
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


def test_initial_distribution():
    model = TwoLayer(50, 4000, weight_std=0.3, generator=generator(), dtype=torch.float64)
    weight = model.hidden.weight.detach()
    assert weight.mean().abs() < 5 * 0.3 / sqrt(weight.numel())
    assert (weight.var() / 0.09 - 1).abs() < 5 * sqrt(2 / weight.numel())
    assert set(model.signs.tolist()) == {-1.0, 1.0}
    assert model.signs.mean().abs() < 5 / sqrt(4000)


def test_one_seed_gives_one_network_in_every_dtype_and_leaves_the_default_generator_alone():
    state = torch.get_rng_state()
    double, single = (TwoLayer(5, 9, generator=generator(3), dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(double.state_dict().values(), single.state_dict().values(), strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        assert torch.equal(a.float(), b)
    assert not torch.equal(
        double.hidden.weight, TwoLayer(5, 9, generator=generator(4), dtype=torch.float64).hidden.weight
    )


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_rows_are_kronecker_products_of_patterns_and_inputs(activation):
    model, x = TwoLayer(4, 30, activation, 1.0, generator(), torch.float64), unit_inputs(6, 4)
    rows = curvlab.jacobian(model, x)
    (layer,) = rows.layers
    assert isinstance(layer, KroneckerRows)
    S = slopes(model, x)
    torch.testing.assert_close(layer.g[0, :, 0, 0], S)
    torch.testing.assert_close(layer.a[:, 0, 0], x)
    reference = torch.func.jacrev(lambda w: torch.func.functional_call(model, {"hidden.weight": w}, x))(
        model.hidden.weight.detach()
    )
    torch.testing.assert_close(rows.dense(), reference.flatten(1))
    gram = theory.two_layer_gram(S.numpy(), x.numpy())
    torch.testing.assert_close(rows.gram(), torch.from_numpy(gram))


def test_rows_agree_with_backpack_on_the_same_network_as_a_chain():
    model, x = TwoLayer(4, 30, generator=generator(), dtype=torch.float64), unit_inputs(6, 4)
    with pytest.raises(UnsupportedModel, match="TwoLayer '' is not in BackPACK's chain rules"):
        curvlab.jacobian(model, x, engine="backpack")
    chain = nn.Sequential(model.hidden, model.activation, nn.Linear(30, 1, bias=False, dtype=torch.float64))
    chain[2].weight = nn.Parameter(model.signs[None] / sqrt(30), requires_grad=False)
    torch.testing.assert_close(chain(x), model(x))
    peer = curvlab.jacobian(chain, x, engine="backpack")
    torch.testing.assert_close(curvlab.jacobian(model, x).gram(), peer.gram())


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_kfac_answers_with_the_leverages(activation):
    """With factors averaged over samples and a mean gradient the response is n·diag(h)."""
    model, x = TwoLayer(4, 500, activation, 1.0, generator(), torch.float64), unit_inputs(9, 4)
    fisher = KFAC().update(curvlab.sqrt_fisher(model, HalfSquaredError(), x, torch.zeros(9, 1, dtype=torch.float64)))
    response = fisher.response(curvlab.jacobian(model, x), 0.0)
    expected = 9 * torch.from_numpy(theory.leverages(x.numpy())).diag()
    torch.testing.assert_close(response, expected, rtol=0.0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_linearisation_keeps_the_rows_when_the_weights_move():
    model, x = TwoLayer(4, 30, generator=generator(), dtype=torch.float64), unit_inputs(6, 4)
    before = curvlab.jacobian(model, x).dense()
    frozen = linearize(model)
    step = torch.randn(30, 4, generator=generator(1), dtype=torch.float64)
    with torch.no_grad():
        for network in (model, frozen):
            network.get_parameter("hidden.weight").add_(step)
    torch.testing.assert_close(curvlab.jacobian(frozen, x).dense(), before)
    assert not torch.allclose(curvlab.jacobian(model, x).dense(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "sizes must be at least 1, not 3 -> 0"),
        ({"in_features": 0}, "sizes must be at least 1, not 0 -> 2"),
        ({"activation": "rellu"}, "Unknown activation 'rellu'. Did you mean 'relu'"),
        ({"weight_std": 0.0}, "weight_std must be a finite number above 0, not 0.0"),
        ({"weight_std": float("nan")}, "weight_std must be a finite number"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoLayer(**{"in_features": 3, "width": 2, **arguments})
