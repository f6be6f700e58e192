"""Tables: embeddings, and bags of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlab.errors import UnsupportedModel
from curvlab.rows.factored import EmbeddingRows
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule


def _embedding(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    (V, N), (x, *_) = g.shape[:2], inputs
    T = x.shape[1:].numel()
    index, rows = x.reshape(N, T), g.reshape(V, N, T, g.shape[-1])
    if module.padding_idx is not None:
        rows = rows * (index != module.padding_idx)[..., None]
    return EmbeddingRows(use.name, use.layout, index.clone(), rows)


def check_table(module: Any, name: str) -> None:
    """Refuse an embedding, or a bag of them, whose gradients are not its derivative."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        option = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} uses {option}, which is not part of the model's derivative. Build it "
            "without."
        )


def _bag(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    module: Any = use.module
    index, *weights = inputs
    if index.ndim != 2:
        raise UnsupportedModel(
            f"EmbeddingBag {use.name!r} was called on one axis with offsets, so its first axis is not the sample. Call "
            "it on indices [N, T], padded with padding_idx."
        )
    share = weights[0] if weights else torch.ones_like(index, dtype=g.dtype)
    if module.padding_idx is not None:
        share = share * (index != module.padding_idx)
    if module.mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1)
    return EmbeddingRows(use.name, use.layout, index.clone(), g[:, :, None] * share[..., None])


def _check_bag(module: Any, name: str) -> None:
    check_table(module, name)
    if module.mode == "max":
        raise UnsupportedModel(f"EmbeddingBag {name!r} has mode 'max', which has no rule. Use 'sum' or 'mean'.")


EMBEDDING = Rule(lambda m: m.num_embeddings, _embedding, check_table)
EMBEDDING_BAG = Rule(lambda m: m.num_embeddings, _bag, _check_bag)
