"""Mixtures of experts: the weights of all in one parameter, of which a token meets those that it was sent to."""

from typing import Any

import pytest
import torch
from oracle import DOUBLE
from torch import Tensor, nn
from transformer_cases import FAMILIES, SAMPLES, SINGLE, per_token

from curvlab.fisher import KFAC, Full
from curvlab.rows import sqrt_fisher
from curvlab.rows.factored import KroneckerRows
from curvlab.testing.oracle import assert_close


def test_experts_have_factored_rows(transformers: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x, pick, y = FAMILIES["mixtral"](transformers)
    loss, options = nn.CrossEntropyLoss(), {"kind": "empirical", "output": pick}
    rows = sqrt_fisher(model, loss, x, y, **options)
    g = per_token(model, x, y)
    assert_close(rows.dense().T @ rows.dense(), g.T @ g / len(g), SINGLE)
    experts = [layer for layer in rows.layers if ".experts." in layer.name]
    assert [layer.name.rpartition(".")[2] for layer in experts] == ["gate_up_proj", "down_proj"]
    for layer in experts:
        assert isinstance(layer, KroneckerRows)
        assert layer.lengths is not None
        assert layer.lengths.sum(1).tolist() == [y.shape[1] * model.config.num_experts_per_tok] * SAMPLES
        assert layer.a.shape[1] == int(layer.lengths.max())
    assert "for every batch" not in caplog.text
    whole = sqrt_fisher(model, loss, x, y, rows="batch", **options)
    assert_close(whole.dense()[0], g.sum(0) / len(g), SINGLE)


def test_experts_in_batches_of_different_lengths(transformers: Any) -> None:
    """On the side of rows, which are kept together."""
    model, x, pick, y = FAMILIES["mixtral"](transformers)
    parts = [({k: v[:1] for k, v in x.items()}, y[:1]), ({k: v[1:, :4] for k, v in x.items()}, y[1:, :4])]
    by_sample = [
        per_token(model, {k: v[n : n + 1] for k, v in x_.items()}, y_[n : n + 1]).sum(0)
        for x_, y_ in parts
        for n in range(len(y_))
    ]
    S = torch.stack(by_sample)
    count = sum(int((y_ >= 0).sum()) for _, y_ in parts)
    how: Any = {"kind": "empirical", "rows": "sample", "side": "rows", "output": pick}
    assert_close(Full.fit(model, nn.CrossEntropyLoss(), parts, **how).to_dense(), S.T @ S / count, SINGLE)


def test_kfac_of_experts(transformers: Any) -> None:
    """One pair of factors an expert, over the tokens that it was sent, against an own forward pass of the experts."""
    model, x, pick, y = FAMILIES["mixtral"](transformers)
    loss, T = nn.CrossEntropyLoss(), y.shape[1]
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    count, width, size = experts.gate_up_proj.shape
    seen: dict[str, Any] = {}

    def forward(h: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(h)
        seen["sent"] = [(t, int(e)) for t, own in enumerate(index) for e in own]
        seen["inputs"], seen["inside"] = [], []
        for (t, e), w in zip(seen["sent"], weights.flatten(), strict=True):
            inside = experts.gate_up_proj[e] @ h[t]
            seen["inputs"].append(h[t].detach())
            seen["inside"].append(inside)
            total[t] = total[t] + w * (experts.down_proj[e] @ experts._apply_gate(inside[None])[0])
        return total

    experts.forward = forward
    values = nn.CrossEntropyLoss(reduction="none")(pick(model(**x)), y)
    omega = (y >= 0).sum(1).to(DOUBLE)
    g = torch.zeros(int(omega.sum()), len(seen["sent"]), width, dtype=DOUBLE)
    for row, value in zip(g, values[y >= 0], strict=True):
        row.copy_(torch.stack(torch.autograd.grad(value, seen["inside"], retain_graph=True, materialize_grads=True)))
    del experts.forward
    blocks = []
    for e in range(count):
        own = [k for k, (_, other) in enumerate(seen["sent"]) if other == e]
        B = torch.einsum("rko,rkp->op", g[:, own], g[:, own]) / omega.sum()
        A = torch.zeros(size, size, dtype=DOUBLE)
        for n in range(SAMPLES):
            mine = [seen["inputs"][k] for k in own if seen["sent"][k][0] // T == n]
            A += omega[n] / omega.sum() * sum(torch.outer(a, a) for a in mine) / max(len(mine), 1)
        blocks.append(torch.kron(B, A))
    options: Any = {"kind": "empirical", "output": pick}
    for structure in (
        KFAC().update(sqrt_fisher(model, loss, x, y, **options)),
        KFAC.fit(model, loss, (x, y), **options),
    ):
        dense, start = structure.to_dense(), 0
        for name, shape in structure.space.shapes.items():
            if name.endswith("gate_up_proj"):
                break
            start += shape.numel()
        part = slice(start, start + shape.numel())
        assert_close(dense[part, part], torch.block_diag(*blocks), SINGLE)
