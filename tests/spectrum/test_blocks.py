"""Maps of off-block mass against dense matrices, and partitions against names and shapes."""

import pytest
import torch
from torch import nn

import curvlab
from curvlab import spectrum
from curvlab.rows.parameters import ParameterSpace
from curvlab.spectrum import DenseOperator, Partition, block_map, by_layer, by_tensor, by_unit, rows_block_map
from curvlab.spectrum.blocks import dense_block_map

SPACE = ParameterSpace(
    {"0.weight": torch.Size([4, 3]), "0.bias": torch.Size([4]), "scale": torch.Size([]), "1.weight": torch.Size([2, 4])}
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(7, 4).double(), torch.arange(7) % 3)


class Products(spectrum.Operator):
    """An operator that is known by its products only."""

    def __init__(self, dense):
        self.matrix, self.space, self.dtype, self.device = dense.matrix, dense.space, dense.dtype, dense.device

    def matmat(self, block):
        return block @ self.matrix


def random_operator(space=SPACE, seed=0):
    half = torch.randn(space.size, space.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return DenseOperator(half + half.T, space)


def naive(matrix, partition):
    B = len(partition)
    at = [partition.indices(b) for b in range(B)]
    return torch.tensor([[float(matrix[at[b]][:, at[c]].square().sum()) for c in range(B)] for b in range(B)])


def test_partitions_follow_layers_tensors_units_and_groups():
    assert by_layer(SPACE).names == ("0", "scale", "1")
    assert by_layer(SPACE).labels.tolist() == [0] * 16 + [1] + [2] * 8
    assert by_tensor(SPACE).names == tuple(SPACE.shapes)
    units = by_unit(SPACE)
    assert units.names == ("0[0]", "0[1]", "0[2]", "0[3]", "scale[0]", "1[0]", "1[1]")
    assert units.labels[:16].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0, 1, 2, 3], "a bias is of its neuron"
    assert by_unit(SPACE, {"0": 2}).labels[:16].tolist() == [0] * 6 + [1] * 6 + [0, 0, 1, 1]
    with pytest.raises(ValueError, match="3 groups"):
        by_unit(SPACE, {"0": 3})


@pytest.mark.parametrize("partition", [by_layer(SPACE), by_tensor(SPACE), by_unit(SPACE)])
def test_the_exact_map_is_that_of_all_blocks(partition):
    operator = random_operator()
    mass = naive(operator.matrix, partition)
    at_hand, by_products = block_map(operator, partition), block_map(Products(operator), partition, probes=100)
    assert (at_hand.products, by_products.products) == (0, operator.size)
    for found in (at_hand, by_products):
        torch.testing.assert_close(found.mass, mass, check_dtype=False)
        assert found.standard_error == 0
    assert found.share == pytest.approx(float(1 - mass.diagonal().sum() / mass.sum()))
    assert float(found.relative.sum()) == pytest.approx(1)


def test_random_signs_estimate_the_map_within_its_error():
    space = ParameterSpace({"a": torch.Size([60]), "b": torch.Size([90]), "c": torch.Size([100])})
    operator = random_operator(space)
    exact = dense_block_map(operator.matrix, by_tensor(space))
    errors = []
    for seed in range(10):
        found = block_map(
            Products(operator), by_tensor(space), probes=20, generator=torch.Generator().manual_seed(seed)
        )
        torch.testing.assert_close(found.mass, exact.mass, rtol=0.3, atol=0)
        assert found.products == 60
        errors.append((found.share - exact.share) / found.standard_error)
    assert 0.3 < torch.tensor(errors).square().mean().sqrt() < 2.5


def test_gram_matrices_give_the_map_of_the_fisher_matrix(network):
    model, loss, data = network
    rows = curvlab.sqrt_fisher(model, loss, *data)
    S = rows.dense()
    found = rows_block_map(rows)
    exact = dense_block_map(S.T @ S, by_layer(rows.space))
    assert found.names == exact.names
    torch.testing.assert_close(found.mass, exact.mass)


def test_the_diagonal_part_multiplies_as_the_masked_matrix(network):
    model, loss, data = network
    hessian = spectrum.Hessian(model, loss, data)
    partition = by_layer(hessian.space)
    dense = hessian.to_dense()
    masked = dense * (partition.labels[:, None] == partition.labels)
    block = torch.randn(3, hessian.size, dtype=torch.float64)
    for operator in (hessian, DenseOperator(dense, hessian.space)):
        torch.testing.assert_close(spectrum.diagonal_part(operator, partition).matmat(block), block @ masked)


def test_a_matrix_of_zeros_has_no_share():
    operator = DenseOperator(torch.zeros(25, 25, dtype=torch.float64), SPACE)
    assert torch.tensor(block_map(operator, by_layer(SPACE)).share).isnan()


def test_what_does_not_fit_is_refused(network):
    model, loss, data = network
    other = Partition(("all",), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 parameters"):
        block_map(random_operator(), other)
    with pytest.raises(ValueError, match="3 parameters"):
        dense_block_map(torch.eye(4), other)
    with pytest.raises(ValueError, match="probes"):
        block_map(random_operator(), by_layer(SPACE), probes=1)
    hessian = spectrum.Hessian(model, loss, data)
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in hessian.space.shapes.items()}
    pencil = spectrum.Preconditioned(hessian, spectrum.DiagonalPreconditioner(ones), 1.0)
    with pytest.raises(ValueError, match="inner product"):
        spectrum.diagonal_part(pencil, by_layer(hessian.space))
