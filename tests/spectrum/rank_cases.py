"""What tests of ranks share: rows that are a matrix of given singular values, a network and its data."""

import torch
from oracle import DOUBLE
from torch import Tensor, nn

import curvlab
from curvlab.rows import Rows


def orthogonal(n: int, k: int, seed: int = 0) -> Tensor:
    Q: Tensor = torch.linalg.qr(torch.randn(n, k, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))[0]
    return Q


def matrix(R: int, P: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with given singular values, those left out being zero."""
    k = len(values)
    return (orthogonal(R, k, seed) * torch.tensor(values, dtype=DOUBLE)) @ orthogonal(P, k, seed + 1).T


def rows_of(A: Tensor) -> Rows:
    """Rows that are a given matrix: the inputs of a linear function are its Jacobian."""
    return curvlab.jacobian(nn.Linear(A.shape[1], 1, bias=False).to(A.dtype), A)


def network(inputs: int = 6, width: int = 40, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def data(N: int = 10, inputs: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(N, inputs, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
