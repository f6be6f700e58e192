"""Attention that never forms its weights: kept in sweeps of one row a sample, left out where rows go back together."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.fisher import KFAC, Diagonal
from curvlab.rows import Rows, sqrt_fisher
from curvlab.testing.oracle import assert_close
from curvlab.tools.live_memory import Live

FUSED = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}


class Attentive(nn.Module):
    """Logits `[N, C, T]` behind attention to the tokens so far, with a parameter that is no layer's if `bare`."""

    def __init__(self, heads: int, width: int, *, bare: bool = False) -> None:
        super().__init__()
        self.heads, self.qkv, self.head = heads, nn.Linear(width, 3 * width), nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.ones(width)) if bare else 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.scale * mixed).transpose(1, 2)


def problem(*, bare: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Attentive(2, 8, bare=bare).double(), torch.randn(3, 6, 8).double(), torch.randint(5, (3, 6))


def rows(model: nn.Module, x: Tensor, y: Tensor, kind: Any, per: Any) -> Rows:
    drawn = {"generator": torch.Generator().manual_seed(1)} if kind == "mc" or per == "signs" else {}
    return sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, kind, rows=per, **drawn)


ONE_A_SAMPLE = [("mc", "sample"), ("empirical", "sample"), ("empirical", "signs"), ("empirical", "batch")]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("kind", "per"), ONE_A_SAMPLE)
def test_one_row_a_sample_comes_through_fused_attention_and_is_that_of_plain_attention(
    kind: Any, per: Any, bare: bool
) -> None:
    with Live() as live:
        found = rows(*problem(bare=bare), kind, per)
    assert live.functions >= FUSED
    with sdpa_kernel(SDPBackend.MATH), Live() as live:
        expected = rows(*problem(bare=bare), kind, per)
    assert not live.functions & FUSED
    assert_close(found.dense(), expected.dense(), 1e-12)


@pytest.mark.parametrize(("kind", "per"), [("exact", None), ("empirical", "term"), ("mc", "term")])
def test_several_rows_a_sample_go_back_through_plain_attention(kind: Any, per: Any) -> None:
    model, x, y = problem()
    rows(model, x, y, kind, per)
    with Live() as live:
        rows(model, x, y, kind, per)
    assert not live.functions & FUSED


@pytest.mark.parametrize("structure", [KFAC, Diagonal])
def test_a_fit_on_a_long_context_takes_less_memory_than_with_plain_attention(structure: Any) -> None:
    """Of 1024 tokens and 8 heads, whose weights are 32 MiB."""
    torch.manual_seed(0)
    model, x, y = Attentive(8, 32), torch.randn(1, 1024, 32), torch.randint(5, (1, 1024))
    peaks = []
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
        with sdpa_kernel(backends), Live() as live:
            structure.fit(model, nn.CrossEntropyLoss(), (x, y), kind="mc", generator=torch.Generator().manual_seed(0))
        peaks.append(live.peak)
    assert peaks[0] < 8 << 20 < 64 << 20 < peaks[1]
