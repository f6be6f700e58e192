"""Ranks that are estimated by Lanczos runs, against exact ones."""

import pytest
import torch
from rank_cases import matrix, rows_of

from curvlab.spectrum import rank

SPECTRA = {
    "flat": [1.0] * 60,
    "gap": [1.0] * 25 + [1e-4] * 35,
    "deficient": [1.0, 0.5, 0.2] * 15,
    "decay": [0.8**k for k in range(60)],
    "nearly full": [1.0] * 59,
}


class TestLanczos:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("rtol", [None, 1e-2])
    @pytest.mark.parametrize("name", SPECTRA)
    def test_the_estimate_holds_the_exact_count(self, name: str, rtol: float | None, seed: int) -> None:
        values = SPECTRA[name]
        rows = rows_of(matrix(60, 90, values))
        generator = torch.Generator().manual_seed(seed)
        found = rank(rows, rtol, method="lanczos", probes=12, steps=40, generator=generator)
        expected = sum(value > (1e-2 if rtol else 1e-7) for value in values)
        assert found.method == "lanczos"
        assert found.lower <= expected
        assert expected <= found.upper
        assert abs(found.rank - expected) <= 3 * found.standard_error + 0.5
        assert float(found.multiplicity.sum()) == pytest.approx(60)
        assert rank(rows, rtol, method="gram").lower == expected
        if rtol is None:
            assert found.upper == 60, "what a Gram matrix cannot see stays undecided"
        elif len(set(values)) < 10:
            assert found.upper - found.lower < 12

    def test_full_rank_has_no_variance(self) -> None:
        found = rank(rows_of(matrix(60, 90, [1.0 + k / 60 for k in range(60)])), method="lanczos", steps=60)
        assert (found.rank, found.lower, found.full, found.standard_error) == (60, 60, True, 0.0)
        assert "±" not in str(found)

    def test_any_deficiency_shows_in_every_probe(self) -> None:
        found = rank(rows_of(matrix(60, 90, [1.0] * 59)), rtol=1e-3, method="lanczos")
        assert found.upper == 59
        assert found.full is False
        assert found.standard_error > 0
        assert f"± {found.standard_error:.2g}" in str(found)

    def test_fewer_columns_than_rows(self) -> None:
        rows = rows_of(matrix(90, 40, [1.0] * 30 + [0.5] * 10))
        found = rank(rows, method="lanczos")
        assert (found.rank, found.lower, found.upper, found.attainable) == (40, 40, 40, 40)
        short = rank(rows_of(matrix(90, 40, [1.0] * 30)), rtol=1e-3, method="lanczos", probes=64)
        assert short.lower <= 30 <= short.upper < 40
        assert abs(short.rank - 30) <= 3 * short.standard_error + 0.5

    def test_few_steps_bound_what_they_cannot_tell(self) -> None:
        rows = rows_of(matrix(60, 90, [10 ** (-k / 10) for k in range(60)]))
        exact = rank(rows, rtol=1e-3)
        for steps in (1, 4, 8, 16):
            found = rank(rows, rtol=1e-3, method="lanczos", steps=steps, probes=24)
            assert found.lower <= exact.rank <= found.upper

    def test_a_gram_matrix(self) -> None:
        A = matrix(60, 90, [1.0] * 40)
        found = rank(A @ A.T, method="lanczos", probes=40)
        assert found.lower <= 40 <= found.upper
        assert abs(found.rank - 40) <= 3 * found.standard_error + 0.5

    def test_the_generator_decides(self) -> None:
        rows = rows_of(matrix(60, 90, [1.0] * 40))
        state = torch.get_rng_state()

        def estimate(seed: int | None) -> float:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return rank(rows, method="lanczos", generator=generator).standard_error

        assert estimate(None) == estimate(None)
        assert estimate(3) == estimate(3)
        assert estimate(3) != estimate(4)
        assert torch.equal(state, torch.get_rng_state())

    def test_memory_decides_between_routes(self) -> None:
        rows = rows_of(matrix(60, 90, [1.0] * 40))
        assert rank(rows).method == "svd"
        gram = 8 * 3 * 60**2
        assert rank(rows, memory=gram).method == "gram"
        assert rank(rows, memory=gram).full is None
        assert rank(rows, memory=gram - 1).method == "lanczos"
        dense = 8 * 3 * (60**2 + 60 * 90)
        assert rank(rows, memory=dense - 1).method == "gram"
        assert rank(rows, memory=dense).method == "svd"

    def test_effective_dimension_is_estimated_too(self) -> None:
        rows = rows_of(matrix(60, 90, SPECTRA["decay"]))
        exact = rank(rows).effective_dimension(1e-3)
        assert rank(rows, method="lanczos", probes=24, steps=30).effective_dimension(1e-3) == pytest.approx(
            exact, rel=0.1
        )
