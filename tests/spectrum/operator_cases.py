"""What tests of operators share: a network and its data."""

import torch
from oracle import DOUBLE, chain
from torch import Tensor, nn


def network(seed: int = 0, inputs: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return chain(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples(N: int, seed: int = 0, inputs: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, inputs, dtype=DOUBLE, generator=generator), torch.randint(3, (N,), generator=generator)
