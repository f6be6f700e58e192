"""A rule for a layer of one's own: its rows stay factored, and every structure, K-FAC too, knows it.

python examples/layer.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvlab
from curvlab.fisher import KFAC
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules import Inputs, LayerUse, Rule, register
from curvlab.rows.modules.rule import augmented
from curvlab.testing import check_layer


class StandardisedLinear(nn.Linear):
    """A linear layer on inputs that are standardised, sample by sample."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map `[N, in]` to `[N, out]`."""
        return F.linear(F.layer_norm(input, input.shape[-1:]), self.weight, self.bias)


def rows(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    """Form the rows from what the layer saw, `[N, in]`, and the gradients at its output, g `[V, N, out]`.

    A linear map has rows g ⊗ a, with a what its weight multiplies. The axes between are positions (T) and groups (Q): one.
    """
    x = F.layer_norm(inputs[0], inputs[0].shape[-1:])
    a = augmented(x[:, None, None], use.names)  # [N, T, Q, in + 1]: a column of ones for the bias
    return KroneckerRows(use.name, use.layout, a, g[:, :, None, None])


register(StandardisedLinear, Rule(units=lambda module: module.out_features, rows=rows))


def main() -> None:
    """Check the rule, and use it."""
    check_layer(StandardisedLinear(4, 3), torch.randn(5, 4), factored=True)
    model = nn.Sequential(StandardisedLinear(4, 8), nn.Tanh(), StandardisedLinear(8, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    print(KFAC().update(curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y)))


if __name__ == "__main__":
    main()
