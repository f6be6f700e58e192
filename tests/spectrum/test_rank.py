"""Numerical rank, on matrices and networks whose rank is known."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ARCHITECTURES, DOUBLE, Architecture, architecture
from rank_cases import data, matrix, network, rows_of
from torch import Tensor, nn

import curvlab
from curvlab.errors import NotPositiveDefinite
from curvlab.spectrum import Rank, rank
from curvlab.testing.oracle import dense_jacobian, outputs

EPS = torch.finfo(DOUBLE).eps


class TestConstructions:
    """Matrices of known rank."""

    @pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
    @pytest.mark.parametrize("method", ["auto", "gram", "svd"])
    def test_prescribed_singular_values(self, shape: tuple[int, int], method: Any) -> None:
        values = [3.0, 1.0, 0.5, 0.2, 0.01]
        found = rank(rows_of(matrix(*shape, values)), method=method)
        assert found.rank == found.lower == 5
        assert (found.rows, found.columns, found.attainable) == (*shape, 12)
        assert found.singular_values[:5].tolist() == pytest.approx(values, rel=1e-9)
        assert len(found.singular_values) == 12
        assert found.above == pytest.approx(0.01, rel=1e-9)
        assert found.condition == pytest.approx(300, rel=1e-9)
        assert found.standard_error == 0
        if method == "gram":
            assert (found.upper, found.undecided) == (12, 7)
            assert found.full is (None if shape[0] <= shape[1] else False)
        else:
            assert found.method == "svd"
            assert (found.upper, found.undecided, found.full) == (5, 0, False)

    @pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
    def test_a_given_gram_matrix(self, shape: tuple[int, int]) -> None:
        A = matrix(*shape, [3.0, 1.0, 0.5, 0.2, 0.01])
        found = rank(A @ A.T)
        assert (found.rank, found.lower, found.upper) == (5, 5, shape[0])
        assert (found.rows, found.columns, found.attainable, found.structural_zeros) == (shape[0], None, shape[0], 0)
        assert found.full is None
        assert found.above == pytest.approx(0.01, rel=1e-9)
        assert rank(A.T @ A).singular_values[:5].tolist() == pytest.approx(found.singular_values[:5].tolist())

    def test_a_full_gram_matrix_is_full(self) -> None:
        found = rank(torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=DOUBLE)))
        assert (found.rank, found.upper, found.full, found.below) == (3, 3, True, None)
        assert found.singular_values.tolist() == [2.0, 1.0, 0.5]

    def test_nothing_at_all(self) -> None:
        for found in (rank(torch.zeros(3, 3, dtype=DOUBLE)), rank(rows_of(torch.zeros(3, 5, dtype=DOUBLE)))):
            assert (found.rank, found.upper, found.full) == (0, 0, False)
            assert (found.above, found.margin) == (None, math.inf)
            assert math.isnan(found.condition)
            assert "rank 0 of 3 rows" in str(found)
        assert rank(rows_of(torch.zeros(3, 5, dtype=DOUBLE)), method="lanczos").rank == 0

    @settings(max_examples=30, deadline=None)
    @given(
        R=st.integers(1, 14),
        P=st.integers(1, 14),
        share=st.floats(0, 1),
        decades=st.floats(0, 5),
        scale=st.floats(-6, 6),
        seed=st.integers(0, 2**20),
    )
    def test_drawn_ranks(self, R: int, P: int, share: float, decades: float, scale: float, seed: int) -> None:
        r = round(share * min(R, P))
        values = [10 ** (scale - decades * k / max(r - 1, 1)) for k in range(r)]
        A = matrix(R, P, values, seed)
        found = rank(rows_of(A))
        assert found.rank == found.lower == found.upper == r
        assert found.full is (r == R)
        assert found.method == ("gram" if r == min(R, P) and r else "svd")
        by_gram = rank(A @ A.T)
        assert by_gram.rank == r
        assert (by_gram.upper == R) or not r

    def test_rows_that_are_zero_are_not_undecided(self) -> None:
        A = matrix(12, 30, [1.0] * 12)
        A[[2, 7]] = 0
        found = rank(rows_of(A), method="gram")
        assert (found.rank, found.upper, found.attainable, found.full) == (10, 10, 10, False)
        assert found.structural_zeros == 0

    def test_a_lookup_of_the_first_entry_is_not_a_zero_row(self) -> None:
        model = nn.Sequential(nn.Embedding(3, 2), nn.Flatten(), nn.Tanh()).double()
        found = rank(curvlab.jacobian(model, torch.tensor([[0], [1], [2]])))
        assert (found.rank, found.attainable, found.full) == (6, 6, True)

    @pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
    def test_dense_rows_may_come_in_parts(self, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
        rows = rows_of(matrix(*shape, [1.0] * 11 + [1e-10]))
        whole = rank(rows, method="svd")
        monkeypatch.setattr("curvlab.rows.products.CHUNK_ELEMENTS", 40)
        parts = rank(rows, method="svd")
        assert parts.rank == whole.rank == 12
        assert parts.singular_values.tolist() == pytest.approx(whole.singular_values.tolist(), rel=1e-4)


class TestNearTheThreshold:
    @pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
    @pytest.mark.parametrize("tail", [1e-6, 1e-9, 1e-13])
    def test_what_a_gram_matrix_cannot_see(self, shape: tuple[int, int], tail: float) -> None:
        R, P = shape
        rows = rows_of(matrix(R, P, [1.0] * 11 + [tail]))
        squared, straight, chosen = (rank(rows, method=method) for method in ("gram", "svd", "auto"))
        seen = tail == 1e-6
        assert squared.rank == squared.lower == (12 if seen else 11)
        assert squared.upper == 12
        assert squared.undecided == (0 if seen else 1)
        assert squared.full is (False if P < R else True if seen else None)
        assert squared.cut == pytest.approx((R * EPS) ** 0.5, rel=1e-6)
        assert (straight.rank, straight.undecided) == (12, 0)
        assert straight.above == pytest.approx(tail, rel=1e-2)
        assert straight.cut == pytest.approx(30 * EPS)
        assert straight.margin == pytest.approx(math.log10(tail / (30 * EPS)), abs=0.01)
        assert chosen.method == ("gram" if seen else "svd")
        assert chosen.rank == 12

    def test_what_nobody_can_see(self) -> None:
        rows = rows_of(matrix(12, 30, [1.0] * 11 + [1e-17]))
        assert rank(rows, method="gram").full is None
        assert rank(rows, method="svd").full is False
        assert rank(rows).rank == 11

    def test_a_threshold_of_the_user(self) -> None:
        values = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
        rows = rows_of(matrix(6, 9, values))
        for k in range(1, 6):
            found = rank(rows, rtol=10 ** (0.3 - k))
            assert (found.rank, found.undecided, found.full, found.method) == (k, 0, False, "gram")
            round_off = 6 * EPS / (2 * 100.0**-k)
            assert found.margin == pytest.approx(0.3, abs=1e-6)
            assert found.above == pytest.approx(10.0 ** (1 - k), rel=1e-6)
            assert found.below == pytest.approx(10.0**-k, rel=1e-12 + round_off)
            assert found.condition_of_all == math.inf
        gram = rows.gram()
        assert rank(gram, rtol=2e-2).rank == 2, "rtol is one of the rows' singular values, not of eigenvalues"

    def test_a_value_on_the_threshold_is_undecided(self) -> None:
        gram = torch.diag(torch.tensor([1.0, 1e-6 + 1e-17, 1e-12], dtype=DOUBLE))
        found = rank(gram, rtol=1e-3)
        assert (found.lower, found.upper, found.undecided) == (1, 2, 1)

    def test_a_threshold_below_what_the_route_resolves(self) -> None:
        rows = rows_of(matrix(6, 9, [1.0] * 5))
        for rtol in (0.0, EPS):
            found = rank(rows, rtol=rtol, method="svd")
            assert (found.lower, found.upper, found.full) == (5, 6, None)

    def test_a_negative_eigenvalue_shows_the_error_of_a_gram_matrix(self) -> None:
        gram = torch.diag(torch.tensor([1.0, 1e-3, 1e-11, -1e-10], dtype=DOUBLE))
        found = rank(gram)
        assert (found.lower, found.upper) == (2, 4)
        assert found.cut == pytest.approx(1e-5)


class TestNetworks:
    @pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
    def test_agrees_with_the_dense_rows(self, case: Architecture) -> None:
        model, x = case.make(N=4)
        expected = int(torch.linalg.matrix_rank(dense_jacobian(model, x, case.pick)))
        for engine in case.engines:
            rows = curvlab.jacobian(model, x, output=case.output, engine=engine)
            found = rank(rows)
            assert found.lower <= expected <= found.upper
            assert found.rank == expected
            assert found.rank == rank(rows, method="svd").rank
            assert rank(rows.gram()).lower <= expected

    @pytest.mark.parametrize("name", ["mlp", "attention", "conv2d-grid", "embedding", "tied"])
    def test_agrees_under_a_cross_entropy(self, name: str) -> None:
        case = architecture(name)
        model, x = case.make(N=4)
        z = outputs(model, x)
        targets = torch.arange(z[:, 0].numel()).view(z[:, 0].shape) % z.shape[1]
        rows = curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, targets)
        found = rank(rows)
        assert found.structural_zeros == targets.numel()
        assert found.rank == int(torch.linalg.matrix_rank(rows.dense()))

    def test_a_duplicate_breaks_full_rank_by_exactly_one(self) -> None:
        model, x = network(outputs=1), data(N=20)
        assert rank(curvlab.jacobian(model, x)).full is True
        x[13] = x[4]
        rows = curvlab.jacobian(model, x)
        found = rank(rows)
        assert (found.rank, found.undecided, found.full) == (19, 0, False)
        assert found.margin > 1
        assert found.condition_of_all == math.inf
        unsure = rank(rows, method="gram")
        assert (unsure.rank, unsure.undecided, unsure.full) == (19, 1, None)
        assert math.isnan(unsure.condition_of_all)

    def test_a_duplicate_costs_a_row_an_output(self) -> None:
        x = data()
        x[3] = x[5]
        assert rank(curvlab.jacobian(network(), x)).rank == 27

    def test_the_zeros_of_a_cross_entropy(self) -> None:
        model, x = network(), data()
        y = torch.arange(10) % 3
        for method in ("auto", "gram", "svd", "lanczos"):
            found = rank(curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y), method=method)
            assert (found.rank, found.undecided, found.full) == (20, 0, True)
            assert (found.rows, found.structural_zeros, found.attainable) == (30, 10, 20)
            assert found.condition_of_all == found.condition
        x[3] = x[5]
        found = rank(curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, y))
        assert (found.rank, found.upper, found.full) == (18, 18, False)

    def test_samples_that_are_ignored(self) -> None:
        model, x = network(), data()
        y = torch.arange(10) % 3
        y[:2] = -100
        loss = nn.CrossEntropyLoss()
        exact, empirical = (curvlab.sqrt_fisher(model, loss, x, y), curvlab.sqrt_fisher(model, loss, x, y, "empirical"))
        for found, rows, zeros in ((rank(exact), 30, 3 * 2 + 8), (rank(empirical), 10, 2)):
            assert (found.rows, found.structural_zeros) == (rows, zeros)
            assert (found.rank, found.full) == (rows - zeros, True)

    def test_a_dead_network_has_no_structural_zeros(self) -> None:
        model, x = network(), data()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        rows = curvlab.jacobian(model, x)
        found = rank(rows, parameters=["0.weight", "0.bias"])
        assert (found.rank, found.structural_zeros, found.full) == (0, 0, False)
        assert rank(rows).rank == 3, "the last bias is all that acts"

    def test_other_losses_have_no_structural_zeros(self) -> None:
        model, x = network(), data()
        for loss in (nn.MSELoss(), nn.BCEWithLogitsLoss()):
            found = rank(curvlab.sqrt_fisher(model, loss, x, torch.zeros(10, 3, dtype=DOUBLE)))
            assert (found.rank, found.structural_zeros, found.full) == (30, 0, True)

    def test_fewer_parameters_than_rows(self) -> None:
        model, x = network(inputs=2, width=2), data(N=12, inputs=2)
        rows = curvlab.jacobian(model, x)
        found = rank(rows)
        assert (found.rows, found.columns, found.attainable) == (36, 15, 15)
        assert found.rank == int(torch.linalg.matrix_rank(rows.dense()))
        assert found.full is False
        assert "which 15 columns cannot give" in str(found)

    def test_a_layer_is_its_parameters(self) -> None:
        model, x = network(width=3), data()
        rows = curvlab.jacobian(model, x)
        dense_first, dense_last = rows.dense().split([21, 12], dim=1)
        first = rank(rows, parameters=["0.bias", "0.weight"])
        last = rank(rows, parameters=["2.weight", "2.bias"])
        bias = rank(rows, parameters=["2.bias"])
        assert (first.columns, last.columns, bias.columns) == (21, 12, 3)
        assert first.rank == int(torch.linalg.matrix_rank(dense_first))
        assert last.rank == int(torch.linalg.matrix_rank(dense_last))
        assert bias.rank == 3
        assert bias.singular_values.tolist() == pytest.approx([10**0.5] * 3)

    def test_merged_batches(self) -> None:
        model, x = network(), data()
        y = torch.arange(10) % 3
        parts = [curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x[s], y[s]) for s in (slice(0, 4), slice(4, 10))]
        found = rank(parts[0] + parts[1])
        assert (found.rank, found.structural_zeros, found.full) == (20, 10, True)

    def test_saturated_outputs_have_no_weight(self) -> None:
        model, x = network(), data()
        with torch.no_grad():
            model.get_parameter("2.bias").add_(torch.tensor([5000.0, 0.0, -5000.0], dtype=DOUBLE))
        found = rank(curvlab.sqrt_fisher(model, nn.CrossEntropyLoss(), x, torch.zeros(10, dtype=torch.long)))
        assert (found.rank, found.structural_zeros, found.attainable) == (0, 30, 0)


class TestPrecision:
    def test_round_off_of_float32_rows_is_allowed_for(self) -> None:
        model, x = network(outputs=1), data(N=20)
        x[13] = x[4]
        double = rank(curvlab.jacobian(model, x))
        rows = curvlab.jacobian(model.float(), x.float())
        assert (double.rank, double.full) == (19, False)
        for method in ("auto", "gram", "svd"):
            single = rank(rows, method=method)
            assert (single.rank, single.undecided, single.full) == (19, 1, None)
            assert single.singular_values.dtype == DOUBLE
        assert rank(rows).method == "gram", "the dense rows could not decide more"
        norm = float(rows.dense().double().norm())
        assert rank(rows, method="svd").cut == pytest.approx(torch.finfo(torch.float32).eps * norm, rel=1e-5)

    @pytest.mark.parametrize(("tail", "decided"), [(1e-4, True), (1e-5, True), (1e-7, False), (1e-9, False)])
    def test_decisions_in_both_precisions(self, tail: float, decided: bool) -> None:
        A = matrix(12, 30, [1.0] * 11 + [tail])
        assert rank(rows_of(A)).full is True
        single = rank(rows_of(A.float()))
        assert single.full is (True if decided else None)
        assert single.lower == (12 if decided else 11)
        assert single.upper == 12

    def test_the_allowance_covers_what_float32_does_to_a_network(self) -> None:
        model, x = network(width=200).float(), data(N=20).float()
        rough = curvlab.jacobian(model, x).dense().double()
        exact = curvlab.jacobian(model.double(), x.double()).dense()
        error = float(torch.linalg.matrix_norm(rough - exact, 2))
        assert 0 < error < torch.finfo(torch.float32).eps * float(exact.norm())

    def test_a_float32_gram_matrix_has_its_own_round_off(self) -> None:
        A = matrix(12, 30, [1.0] * 11 + [1e-4])
        assert rank(A @ A.T).full is True
        single = rank((A @ A.T).float())
        assert (single.lower, single.upper) == (11, 12)

    def test_a_threshold_decides_for_float32(self) -> None:
        found = rank(rows_of(matrix(12, 30, [1.0] * 11 + [1e-9]).float()), rtol=1e-4)
        assert (found.rank, found.undecided, found.full) == (11, 0, False)


class TestText:
    def test_says_what_was_decided(self) -> None:
        rows = rows_of(matrix(6, 9, [1.0] * 5 + [1e-3]))
        assert str(rank(rows)) == (
            "rank 6 of 6 rows and 9 columns; full row rank. Cut at 3.65e-08 (1.00e-03 above it, margin 4.4 decades), "
            "condition 1.00e+03, by gram."
        )
        text = str(rank(rows_of(matrix(6, 9, [1.0] * 5 + [1e-9])), method="gram"))
        assert text.startswith("rank 5 of 6 rows and 9 columns, between 5 and 6: 1 undecided; full row rank undecided.")
        assert "of 6 rows; full row rank" in str(rank(torch.eye(6, dtype=DOUBLE)))

    def test_names_the_redundant_rows(self) -> None:
        rows = curvlab.sqrt_fisher(network(), nn.CrossEntropyLoss(), data(), torch.arange(10) % 3)
        assert "rank 20 of 30 rows (10 redundant by the loss) and 403 columns; full row rank." in str(rank(rows))


class TestErrors:
    GRAM = torch.eye(3, dtype=DOUBLE)

    @pytest.mark.usefixtures("unchecked_types")
    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match=r"Unknown method 'lanzcos'\. Did you mean 'lanczos'\? Known: auto, gram"):
            rank(self.GRAM, method="lanzcos")  # type: ignore[arg-type]
        rows = curvlab.jacobian(network(), data())
        with pytest.raises(ValueError, match=r"Unknown parameter '0\.weigth'\. Did you mean '0\.weight'\?"):
            rank(rows, parameters=["0.weigth"])

    @pytest.mark.parametrize("rtol", [-1e-3, 1.0, math.nan, math.inf])
    def test_thresholds(self, rtol: float) -> None:
        with pytest.raises(ValueError, match="rtol is a share of the largest singular value, at least 0 and below 1"):
            rank(self.GRAM, rtol)

    @pytest.mark.parametrize(("option", "value"), [("memory", 0), ("probes", 1), ("steps", 0)])
    def test_options(self, option: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{option} must be at least {value + 1}, got {value}"):
            rank(self.GRAM, **{option: value})  # type: ignore[arg-type]

    def test_what_a_gram_matrix_does_not_have(self) -> None:
        with pytest.raises(ValueError, match=r"method='svd' needs rows.*Pass a curvlab\.Rows"):
            rank(self.GRAM, method="svd")
        with pytest.raises(ValueError, match="parameters= needs rows"):
            rank(self.GRAM, parameters=["weight"])

    def test_empty_data(self) -> None:
        with pytest.raises(ValueError, match="The Gram matrix is empty"):
            rank(torch.zeros(0, 0, dtype=DOUBLE))
        rows = curvlab.jacobian(network(), data())
        none = replace(rows, layers=tuple(layer.select(slice(0, 0)) for layer in rows.layers))
        with pytest.raises(ValueError, match=r"There are no rows.*the data are empty"):
            rank(none)
        with pytest.raises(ValueError, match="no parameter was chosen"):
            rank(rows, parameters=[])

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gram_matrix_that_is_not_finite(self, bad: float) -> None:
        gram = torch.eye(4, dtype=DOUBLE)
        gram[2, 2] = bad
        with pytest.raises(ValueError, match="The Gram matrix is not finite, first in row 2"):
            rank(gram)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_rows_that_are_not_finite(self, bad: float) -> None:
        rows = curvlab.jacobian(network(), data())
        first, last = rows.layers
        *shared, g = (factor.clone() for factor in first.factors)
        g[1, 4] = bad
        broken = replace(rows, layers=(first._with_factors(*shared, g), last))
        with pytest.raises(ValueError, match=r"Row 14 \(v = 1 of 3, sample 4\) of layer '0' is not finite"):
            rank(broken)
        a, g = (factor.clone() for factor in last.factors)
        a[7] = bad
        broken = replace(rows, layers=(first, last._with_factors(a, g)))
        with pytest.raises(ValueError, match=r"Row 7 \(v = 0 of 3, sample 7\) of layer '2' is not finite"):
            rank(broken)

    @pytest.mark.usefixtures("unchecked_types")
    @pytest.mark.parametrize(
        "wrong", [torch.ones(2, 3, dtype=DOUBLE), torch.ones(3, dtype=torch.long).diag(), torch.ones(2, 2, 2)]
    )
    def test_what_is_not_a_matrix(self, wrong: Tensor) -> None:
        with pytest.raises(ValueError, match="A Gram matrix is a square matrix of floating-point numbers, got torch"):
            rank(wrong)

    def test_a_matrix_that_is_not_symmetric(self) -> None:
        gram = torch.eye(3, dtype=DOUBLE)
        gram[0, 1] = 1e-4
        with pytest.raises(ValueError, match=r"differs from its transpose by 1\.0e-04.*pass \(G \+ G\.T\) / 2"):
            rank(gram)
        gram[0, 1] = 1e-12
        assert rank(gram).rank == 3

    @pytest.mark.parametrize("method", ["auto", "lanczos"])
    def test_an_indefinite_matrix(self, method: Any) -> None:
        with pytest.raises(NotPositiveDefinite, match=r"eigenvalue -1\.000e-0[56] beside the largest, 1\.000e\+00"):
            rank(torch.diag(torch.tensor([1.0, 0.5, -1e-5], dtype=DOUBLE)), method=method)


def test_a_rank_is_frozen() -> None:
    found = rank(torch.eye(2, dtype=DOUBLE))
    assert isinstance(found, Rank)
    with pytest.raises(AttributeError, match="cannot assign"):
        found.rank = 1  # type: ignore[misc]
