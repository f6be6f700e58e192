"""Networks in the NTK parameterisation: standard normal parameters, scales in the forward pass."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from curvlab.errors import unknown_name


class Erf(nn.Module):
    """The error function, element by element: the smooth activation whose NTK has a closed form."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return erf(x)."""
        return torch.erf(x)


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "erf": Erf,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
    "linear": nn.Identity,
}
"""Activations by name; "linear" and "identity" give a deep linear network."""


class NTKLinear(nn.Module):
    """A dense layer in the NTK parameterisation: y = (s_w/√M_in) x Wᵀ + s_b b with W, b ~ N(0, 1).

    Parameters are drawn in float64 and then rounded, so that one generator state gives the same layer in
    every dtype.

    Attributes:
        weight: W, [out_features, in_features].
        bias: b, [out_features], or None.

    Args:
        in_features: M_in.
        out_features: M_out.
        bias: Whether there is a bias.
        weight_std: s_w > 0, dimensionless; √2 keeps the scale through ReLU layers.
        bias_std: s_b, positive with a bias (1 if not given) and 0 without.
        generator: Source of the initial parameters; torch's default generator if None.
        dtype: Of the parameters; torch's default dtype if None.
        device: Of the parameters.

    Raises:
        ValueError: A size is not positive, a scale is not a finite number above 0, or `bias_std` contradicts
            `bias`.

    Source: Karakida & Osawa 2020, section 2 (u_l, the pre-activations).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        weight_std: float = sqrt(2.0),
        bias_std: float | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bias_std is None:
            bias_std = 1.0 if bias else 0.0
        if min(in_features, out_features) < 1:
            raise ValueError(f"NTKLinear: sizes must be at least 1, not {in_features} -> {out_features}.")
        if not (isfinite(weight_std) and weight_std > 0.0):
            raise ValueError(f"NTKLinear: weight_std must be a finite number above 0, not {weight_std}.")
        if not (isfinite(bias_std) and bias_std >= 0.0) or bias != (bias_std > 0.0):
            raise ValueError(
                f"NTKLinear: bias={bias} contradicts bias_std={bias_std}. A bias needs a finite "
                "bias_std above 0; without a bias leave bias_std out or set it to 0."
            )
        self.in_features, self.out_features = in_features, out_features
        self.weight_std, self.bias_std = weight_std, bias_std
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.reset_parameters(generator)

    @property
    def weight_scale(self) -> float:
        """The factor s_w/√M_in that stands before the weight."""
        return self.weight_std / sqrt(self.in_features)

    @property
    def bias_scale(self) -> float:
        """The factor s_b that stands before the bias."""
        return self.bias_std

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias anew from N(0, 1), in that order."""
        device = torch.device("cpu") if generator is None else generator.device
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device=device)
            parameter.copy_(drawn)

    def forward(self, x: Float[Tensor, "*leading M_in"]) -> Float[Tensor, "*leading M_out"]:
        """Return (s_w/√M_in) x Wᵀ + s_b b."""
        bias = None if self.bias is None else self.bias_scale * self.bias
        return functional.linear(self.weight_scale * x, self.weight, bias)

    def extra_repr(self) -> str:
        """Return sizes and scales."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weight_std={self.weight_std:.6g}, bias_std={self.bias_std:.6g}"
        )


def ntk_mlp(
    sizes: Sequence[int],
    activation: str = "relu",
    weight_std: float = sqrt(2.0),
    bias_std: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """Return a multilayer perceptron in the NTK parameterisation, with a linear output.

    Args:
        sizes: (M_0, …, M_L): input, hidden widths, output; L weight layers.
        activation: A name in `ACTIVATIONS`, used after every layer but the last.
        weight_std: s_w of every layer.
        bias_std: s_b of every layer; 0 leaves the biases out.
        generator: Source of the initial parameters, drawn layer by layer from the input on; torch's default
            generator if None.
        dtype: Of the parameters; torch's default dtype if None.
        device: Of the parameters.

    Returns:
        A Sequential of `NTKLinear` and activation modules in turn.

    Raises:
        ValueError: Fewer than two sizes, an unknown activation, or what `NTKLinear` refuses.

    Source: Karakida & Osawa 2020, section 2.
    """
    if len(sizes) < 2:
        raise ValueError(f"ntk_mlp: sizes must name at least input and output, not {tuple(sizes)}.")
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = NTKLinear(
            fan_in,
            fan_out,
            bias=bias_std != 0.0,
            weight_std=weight_std,
            bias_std=bias_std,
            generator=generator,
            dtype=dtype,
            device=device,
        )
        modules += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])
