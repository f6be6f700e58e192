"""Linear maps among which every entry has its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlab.nn.routed import RoutedLinear
from curvlab.testing.oracle import assert_close

DOUBLE = torch.float64


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    y = torch.einsum("moi,mi->mo", weight[index], x)
    return y if bias is None else y + bias[index]


@pytest.mark.parametrize("index", [[0, 2, 2, 0, 2], [1, 1, 1, 1, 1], [3, 2, 1, 0, 3]], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients(index: Any, biased: bool) -> None:
    """Also where some map is not used, and for many gradients at once."""
    torch.manual_seed(0)
    at = torch.tensor(index)
    x, weight, bias = (torch.randn(*shape, dtype=DOUBLE, requires_grad=True) for shape in ((5, 3), (4, 2, 3), (4, 2)))
    inputs = (x, weight, bias) if biased else (x, weight)
    y, expected = (f(x, weight, bias if biased else None, at) for f in (RoutedLinear.apply, reference))
    assert_close(y.detach(), expected.detach())
    g = torch.randn(6, *y.shape, dtype=DOUBLE)
    for one, other in zip(
        torch.autograd.grad(y, inputs, g, is_grads_batched=True),
        torch.autograd.grad(expected, inputs, g, is_grads_batched=True),
        strict=True,
    ):
        assert_close(one, other)
