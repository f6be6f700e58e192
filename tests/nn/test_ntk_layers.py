"""NTK-parameterised layers: scales, initialisation, activations, refusals."""

from math import sqrt

import pytest
import torch
from scipy.special import erf
from torch import nn

from curvlab.nn import ACTIVATIONS, Erf, NTKLinear, ntk_mlp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_scales_standard_normal_parameters_in_the_forward_pass(leading, bias):
    layer = NTKLinear(
        7, 3, bias, weight_std=1.3, bias_std=0.4 if bias else None, generator=generator(), dtype=torch.float64
    )
    x = torch.randn(*leading, 7, dtype=torch.float64)
    expected = 1.3 / sqrt(7) * torch.einsum("...i,oi->...o", x, layer.weight)
    if bias:
        expected = expected + 0.4 * layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight_scale == pytest.approx(1.3 / sqrt(7))
    assert layer.bias_scale == (0.4 if bias else 0.0)
    assert (layer.bias is not None) == bias


def test_parameters_are_standard_normal():
    layer = NTKLinear(400, 300, bias=True, generator=generator(), dtype=torch.float64)
    assert layer.weight.mean().abs() < 5 / sqrt(layer.weight.numel())
    assert (layer.weight.var() - 1).abs() < 5 * sqrt(2 / layer.weight.numel())
    assert (layer.bias.var() - 1).abs() < 5 * sqrt(2 / 300)
    assert layer.bias_std == 1.0


def test_one_seed_gives_one_network_in_every_dtype():
    double, single = (
        ntk_mlp((5, 20, 20, 2), bias_std=0.1, generator=generator(3), dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for a, b in zip(double.parameters(), single.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.float(), b)


def test_generator_is_used_in_place_of_the_default_one():
    state = torch.get_rng_state()
    first = NTKLinear(4, 4, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    second, third = NTKLinear(4, 4, generator=generator(1)), NTKLinear(4, 4, generator=generator(2))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)


def test_default_scale_preserves_the_mean_square_through_relu_layers():
    model = ntk_mlp((10, 4000, 4000, 1), generator=generator(), dtype=torch.float64)
    x = torch.randn(8, 10, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    first, second = model[0](x), model[:3](x)
    torch.testing.assert_close(second.square().mean(1), first.square().mean(1), rtol=0.15, atol=0.0)


def test_mlp_alternates_layers_and_activations_with_a_linear_output():
    model = ntk_mlp((6, 5, 4, 3), activation="tanh", weight_std=1.5, bias_std=0.2)
    assert [type(module) for module in model] == [NTKLinear, nn.Tanh, NTKLinear, nn.Tanh, NTKLinear]
    assert [(m.in_features, m.out_features) for m in model if isinstance(m, NTKLinear)] == [
        (6, 5),
        (5, 4),
        (4, 3),
    ]
    assert all(m.weight_std == 1.5 and m.bias_std == 0.2 for m in model if isinstance(m, NTKLinear))
    assert all("bias" not in name for name, _ in ntk_mlp((6, 5, 3)).named_parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_named_activation_acts_element_by_element(activation):
    model = ntk_mlp((3, 4, 2), activation, generator=generator(), dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    functions = {
        "relu": lambda u: u.clamp(min=0),
        "tanh": torch.tanh,
        "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / sqrt(2))),
        "erf": lambda u: torch.from_numpy(erf(u.detach().numpy())),
        "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
        "softplus": lambda u: torch.log(1 + torch.exp(u)),
        "identity": lambda u: u,
        "linear": lambda u: u,
    }
    torch.testing.assert_close(model(x), model[2](functions[activation](model[0](x))))


def test_erf_is_differentiable():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Erf(), (x,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0, "out_features": 2}, "sizes must be at least 1, not 0 -> 2"),
        (
            {"in_features": 2, "out_features": 2, "weight_std": 0.0},
            "weight_std must be a finite number above 0",
        ),
        ({"in_features": 2, "out_features": 2, "weight_std": float("nan")}, "weight_std must be a finite"),
        ({"in_features": 2, "out_features": 2, "bias_std": 0.1}, "bias=False contradicts bias_std=0.1"),
        ({"in_features": 2, "out_features": 2, "bias": True, "bias_std": 0.0}, "bias=True contradicts"),
        (
            {"in_features": 2, "out_features": 2, "bias": True, "bias_std": float("inf")},
            "contradicts bias_std",
        ),
    ],
)
def test_layer_refuses_what_it_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTKLinear(**arguments)


def test_mlp_refuses_bad_arguments():
    with pytest.raises(ValueError, match="at least input and output"):
        ntk_mlp((3,))
    with pytest.raises(ValueError, match="Did you mean 'relu'"):
        ntk_mlp((3, 2), activation="rellu")
    with pytest.raises(ValueError, match=r"bias_std=-0\.1"):
        ntk_mlp((3, 2), bias_std=-0.1)


def test_repr_states_sizes_and_scales():
    layer = NTKLinear(4, 2, weight_std=1.5)
    assert repr(layer) == "NTKLinear(in_features=4, out_features=2, weight_std=1.5, bias_std=0)"
