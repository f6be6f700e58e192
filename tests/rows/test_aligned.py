"""Memory whose rows start at cache lines."""

import pytest
import torch
from torch import Tensor

from curvlab.rows.aligned import LINE, NARROW, PAGE, aligned, padded_columns, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 255, 256, 785, 1024, 1025, 4096])
def test_rows_start_a_number_of_lines_apart_but_not_of_pages(columns: int, dtype: torch.dtype) -> None:
    width = padded_columns(columns, dtype)
    if columns < NARROW:
        assert width == columns
    else:
        assert columns <= width < columns + 2 * LINE // dtype.itemsize
        assert width * dtype.itemsize % LINE == 0 < width * dtype.itemsize % PAGE


@pytest.mark.parametrize("columns", [3, 300, 1024])
def test_product_is_that_of_other_memory(columns: int) -> None:
    like = torch.randn(5, 7, dtype=torch.float64)
    right = torch.randn(7, columns, dtype=torch.float64)
    assert torch.allclose(product(like, right), like @ right, rtol=1e-14)
    made: Tensor = aligned((2, 3, columns), like)
    assert made.shape == (2, 3, columns)
    assert made.stride() == (3 * padded_columns(columns, made.dtype), padded_columns(columns, made.dtype), 1)
