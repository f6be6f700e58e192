"""The type checks of the test run find what does not fit, in arrays and in anything else."""

from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from torch import nn

import curvlab
from curvlab.fisher import Diagonal, natural_gradient_step
from curvlab.fisher.damping import absolute
from curvlab.nn import HalfSquaredError
from curvlab.rows import Rows


@pytest.fixture
def rows() -> Rows:
    return curvlab.sqrt_fisher(nn.Linear(3, 2), HalfSquaredError(), torch.randn(4, 3), torch.randn(4, 2))


def test_what_fits_passes(rows: Rows) -> None:
    assert Diagonal().update(rows).lift(torch.ones(rows.R), 1.0)["bias"].shape == (2,)


@pytest.mark.parametrize("coefficients", ["ones", torch.ones(8, dtype=torch.long)])
def test_arrays(rows: Rows, coefficients: Any) -> None:
    with pytest.raises(TypeCheckError):
        rows.rmatvec(coefficients)


def test_functions_and_methods(rows: Rows) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        Diagonal().update(rows.dense())  # type: ignore[arg-type]
    with pytest.raises(BeartypeCallHintViolation):
        absolute(None, lambda: 1.0)  # type: ignore[arg-type]
    with pytest.raises(BeartypeCallHintViolation):
        natural_gradient_step("diagonal", nn.Linear(3, 2), HalfSquaredError(), torch.ones(1, 3), torch.ones(1, 2))  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked_types")
def test_they_can_be_switched_off(rows: Rows) -> None:
    with pytest.raises(ValueError, match="from a Tensor"):
        Diagonal().update(rows.dense())  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        rows.rmatvec("ones")  # type: ignore[arg-type]
