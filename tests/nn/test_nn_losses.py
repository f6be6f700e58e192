"""The half squared error: value, output Hessian, refusal to broadcast."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import hessian

from curvlab.nn import HalfSquaredError, WeightedCrossEntropy


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 10),
)
def test_value_is_half_the_squared_error_over_samples_only(shape, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    samples = [0.5 * sum(float(d) ** 2 for d in (a - b).flatten()) for a, b in zip(z, y, strict=True)]
    expected = sum(samples) / (len(samples) if reduction == "mean" else 1)
    assert HalfSquaredError(reduction)(z, y).item() == pytest.approx(expected, rel=1e-12)


def test_output_hessian_is_the_identity_over_count():
    z, y = torch.randn(2, 3, 2, dtype=torch.float64)
    H = hessian(lambda outputs: HalfSquaredError()(outputs, y))(z).reshape(6, 6)
    torch.testing.assert_close(H, torch.eye(6, dtype=torch.float64) / 3)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 1), (4,)), ((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4,), (4,)), ((), ())]
)
def test_shapes_are_never_broadcast(outputs, targets):
    with pytest.raises(ValueError, match="Nothing is broadcast"):
        HalfSquaredError()(torch.zeros(outputs), torch.zeros(targets))


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'none'"):
        HalfSquaredError("none")


def test_repr_names_the_reduction():
    assert repr(HalfSquaredError("sum")) == "HalfSquaredError(reduction='sum')"


def test_weighted_cross_entropy_is_torchs_with_samples_repeated():
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    counts = torch.tensor([2, 1, 0, 3])
    loss = WeightedCrossEntropy(counts.double())
    expected = torch.nn.functional.cross_entropy(z.repeat_interleave(counts, 0), y.repeat_interleave(counts))
    torch.testing.assert_close(loss(z, y), expected)
    assert repr(loss) == "WeightedCrossEntropy(4 samples)"
    with pytest.raises(ValueError, match="4 weights for 3 samples"):
        loss(z[:3], y[:3])
