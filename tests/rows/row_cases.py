"""What tests of rows share: the Fisher matrix of rows, draws, passes and losses of a user's own."""

from typing import Any

import torch
from torch import Tensor, nn

from curvlab.optim import Preconditioner
from curvlab.rows import Rows, sqrt_fisher
from curvlab.testing.oracle import assert_close


def fisher(rows: Rows) -> Tensor:
    S = rows.dense()
    return S.T @ S


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_passes(
    model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, kind: Any, times: int, **options: Any
) -> Preconditioner:
    """Check the rows of several passes of a user's own against those of a sweep, which comes after them."""
    training = Preconditioner(model, loss, "block-diagonal", kind=kind, seed=3, **{"kl_clip": None} | options)
    found = []
    for _ in range(times):
        training._generator.manual_seed(3)
        model.zero_grad()
        with training.collect():
            loss(model(x), y).backward()
        rows = training._passes[0].rows
        assert rows is not None
        found.append(rows.dense())
        training.precondition()
    expected = sqrt_fisher(model, loss, x, y, kind, **({"generator": generator(3)} if kind == "mc" else {}), **options)
    for of_pass in found:
        assert_close(of_pass, expected.dense())
    return training


def log_cosh(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).cosh().log().flatten(1).sum(1)


class Skipping(nn.CrossEntropyLoss):
    """A subclass of a loss that skips targets."""
