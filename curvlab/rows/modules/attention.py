"""Multi-head attention, decomposed into its projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import UnsupportedModel
from curvlab.rows.modules.composite import Composite, Project


def _parts(module: nn.MultiheadAttention) -> Mapping[str, Mapping[str, str]]:
    """Name the projections of queries, keys and values, packed in one weight if they have one size, and of the output."""
    if module._qkv_same_embed_dim:
        bias = {} if module.in_proj_bias is None else {"bias": "in_proj_bias"}
        inner: dict[str, Mapping[str, str]] = {"in_proj": {"weight": "in_proj_weight", **bias}}
    else:
        inner = {f"{k}_proj": {"weight": f"{k}_proj_weight"} for k in "qkv"}
    bias = {} if module.out_proj.bias is None else {"bias": "out_proj.bias"}
    return {**inner, "out_proj": {"weight": "out_proj.weight", **bias}}


def _forward(
    module: nn.MultiheadAttention,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend as `nn.MultiheadAttention` does; `is_causal` is a hint about a mask that is given."""
    if query.ndim != 3 or (is_causal and attn_mask is None):
        what = "an input without a sample axis" if query.ndim != 3 else "is_causal=True without attn_mask"
        raise UnsupportedModel(
            f"MultiheadAttention was called on {what}. Call it on queries, keys and values [N, T, E], with its mask."
        )
    q, k, v = _projected(module, project, query, key, value)
    mask = _merged(attn_mask, key_padding_mask, len(q), module.num_heads, q)
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    drop = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), drop)
        attended = weights @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, drop)
    output = project["out_proj"](attended.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return _sample_first(module, output), weights


def _projected(
    module: nn.MultiheadAttention, project: Project, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Float[Tensor, "N T E"], Float[Tensor, "N S E"], Float[Tensor, "N S E"]]:
    """Project queries, keys and values; equal ones at once."""
    first = {x: _sample_first(module, x) for x in (query, key, value)}
    if "in_proj" not in project:
        biases = (0.0,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        q, k, v = (
            project[f"{name}_proj"](first[x]) + b for name, x, b in zip("qkv", (query, key, value), biases, strict=True)
        )
        return q, k, v
    packed = {x: project["in_proj"](own).chunk(3, dim=-1) for x, own in first.items()}
    return packed[query][0], packed[key][1], packed[value][2]


def _sample_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Exchange the first two axes, unless the sample is the first of the module's arguments and results."""
    return x if module.batch_first else x.transpose(0, 1)


def _merged(attention: Tensor | None, padding: Tensor | None, N: int, heads: int, like: Tensor) -> Tensor | None:
    """Add up the masks `[T, S]` or `[N·heads, T, S]` and `[N, S]`, to `[…, T, S]`."""
    masks = []
    if attention is not None:
        attention = _additive(attention, like)
        masks.append(attention.unflatten(0, (N, heads)) if attention.ndim == 3 else attention)
    if padding is not None:
        masks.append(_additive(padding, like)[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask of what to leave out into one that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


ATTENTION = Composite(_parts, _forward)
