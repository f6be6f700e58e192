"""The two-layer network of the convergence theorems: only its hidden weights are trained."""

from math import isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from curvlab.errors import unknown_name
from curvlab.nn.ntk import ACTIVATIONS


class TwoLayer(nn.Module):
    """f(x) = m^{-½} Σ_r a_r φ(w_rᵀx) with w_r ~ N(0, ν²I) and signs a_r = ±1 that are not trained.

    There are no biases. The Jacobian is that of the hidden layer alone: its rows are s ⊗ x with s = a ∘
    φ'(Wx)/√m. Parameters are drawn in float64 and then rounded, so that one generator state gives the same
    network in every dtype.

    Attributes:
        hidden: the layer that holds W, [width, in_features].
        signs: a, [width], a buffer.

    Args:
        in_features: d.
        width: m.
        activation: φ, a name in `ACTIVATIONS`; the limit Gram matrix has a closed form for "relu" and "erf".
        weight_std: ν > 0.
        generator: Source of W and then a; torch's default generator if None.
        dtype: Of the parameters; torch's default dtype if None.

    Raises:
        ValueError: A size is not positive, ν is not a finite number above 0, or the activation is unknown.

    Source: Zhang, Martens & Grosse 2019, section 4; Du et al. 2019.
    """

    signs: Tensor

    def __init__(
        self,
        in_features: int,
        width: int,
        activation: str = "relu",
        weight_std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, width) < 1:
            raise ValueError(f"TwoLayer: sizes must be at least 1, not {in_features} -> {width}.")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if not (isfinite(weight_std) and weight_std > 0.0):
            raise ValueError(f"TwoLayer: weight_std must be a finite number above 0, not {weight_std}.")
        device = torch.device("cpu") if generator is None else generator.device
        weight = torch.randn(width, in_features, generator=generator, dtype=torch.float64, device=device) * weight_std
        signs = torch.randint(2, (width,), generator=generator, device=device) * 2 - 1
        self.hidden = skip_init(nn.Linear, in_features, width, bias=False, dtype=dtype)
        with torch.no_grad():
            self.hidden.weight.copy_(weight)
        self.activation = ACTIVATIONS[activation]()
        self.register_buffer("signs", signs.to(self.hidden.weight))

    def forward(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N 1"]:
        """Return f(x)."""
        activations: Tensor = self.activation(self.hidden(x))
        return (activations @ self.signs / sqrt(len(self.signs)))[:, None]
