"""Effective dimensions and condition numbers, of eigenvalues, rows and Gram matrices."""

import math

import pytest
import torch
from oracle import DOUBLE
from rank_cases import matrix, rows_of

from curvlab.errors import NotPositiveDefinite
from curvlab.spectrum import condition_number, effective_dimension, rank


class TestNumbersOfASpectrum:
    VALUES = torch.tensor([4.0, 1.0, 0.25, 0.01], dtype=DOUBLE)

    @pytest.mark.parametrize("damping", [0.1, 1.0, "rel:1e-2"])
    def test_effective_dimension(self, damping: float | str) -> None:
        rho = 0.04 if isinstance(damping, str) else damping
        expected = sum(value / (value + rho) for value in self.VALUES.tolist())
        A = matrix(6, 9, self.VALUES.sqrt().tolist())
        for source in (self.VALUES, self.VALUES.flip(0), rows_of(A), A @ A.T):
            assert effective_dimension(source, damping) == pytest.approx(expected, rel=1e-9)

    def test_without_damping_it_is_the_rank(self) -> None:
        rows = rows_of(matrix(6, 9, self.VALUES.sqrt().tolist()))
        for source in (self.VALUES, rows, rows.gram(), torch.cat([self.VALUES, torch.tensor([1e-17, -1e-17])])):
            assert effective_dimension(source, 0) == 4
        assert rank(rows).effective_dimension(0.0) == 4

    def test_condition_numbers(self) -> None:
        rows = rows_of(matrix(4, 9, self.VALUES.sqrt().tolist()))
        for source in (self.VALUES, self.VALUES.flip(0), rows, rows.gram()):
            assert condition_number(source) == pytest.approx(400, rel=1e-9)
        assert rank(rows).condition == pytest.approx(20, rel=1e-9)
        assert rank(rows).condition_of_all == pytest.approx(20, rel=1e-9)

    def test_bad_eigenvalues(self) -> None:
        for values in (torch.zeros(0, dtype=DOUBLE), torch.tensor([1.0, math.nan])):
            with pytest.raises(ValueError, match="at least one finite floating-point number"):
                effective_dimension(values, 1.0)
        with pytest.raises(NotPositiveDefinite, match=r"eigenvalue -1\.000e-03 beside the largest, 1\.000e"):
            condition_number(torch.tensor([1.0, -1e-3], dtype=DOUBLE))
        with pytest.raises(ValueError, match="finite and not negative"):
            effective_dimension(self.VALUES, -1.0)
