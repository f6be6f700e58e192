"""The table of supported layers: how a module's input and back-propagated rows become `LayerRows`.

A new layer is one entry of `RULES`: its exact forward pass (a subclass that overrides `forward` is not covered), how
its parameters are laid out in units, and how its rows follow from its input and from the rows at its output. Both
engines read this table, and so do the tests and the documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlab.errors import UnsupportedModel
from curvlab.nn import NTKLinear
from curvlab.rows.layer import DenseRows, EmbeddingRows, KroneckerRows, LayerRows
from curvlab.rows.parameters import Layout

Names = Mapping[str, str]
"""Local names of a module's trainable parameters (`weight`) to their names in the model (`0.weight`)."""


@dataclass(frozen=True)
class Rule:
    """How the rows of a kind of module are formed.

    Attributes:
        units: number of units of a module (output channels, scale-shift pairs, table rows).
        rows: `(module, layout, names, input, g [V, N, *output])` to rows.
        check: raises `UnsupportedModel` for settings that the rule does not cover, if there are any.
    """

    units: Callable[[Any], int]
    rows: Callable[[nn.Module, str, Layout, Names, Tensor, Tensor], LayerRows]
    check: Callable[[nn.Module, str], None] | None = None


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of a module, or None if its forward pass or its parameters are not those in the table."""
    altered = "forward" in vars(module) or not module._parameters.keys() <= {"weight", "bias"}
    for kind, rule in _rules().items():
        if isinstance(module, kind) and type(module).forward is kind.forward and not altered:
            return rule
    return None


def _rules() -> Mapping[type[nn.Module], Rule]:
    """Return the table and, where its user has imported torch-geometric, that library's own Linear.

    Importing torch-geometric here would cost everyone seconds.
    """
    graphs = sys.modules.get("torch_geometric.nn.dense.linear")
    return RULES if graphs is None else {**RULES, graphs.Linear: RULES[nn.Linear]}


def supported_layers() -> list[str]:
    """Return the names of the layers with a rule."""
    return [kind.__name__ for kind in RULES]


def layout_of(module: nn.Module, names: Names) -> Layout:
    """Lay out a module's trainable parameters; a module without a rule forms one unit."""
    rule = rule_for(module)
    shapes = {name: getattr(module, local).shape for local, name in names.items()}
    return Layout.of(rule.units(module) if rule else 1, shapes)


def _bias_column(a: Tensor, names: Names, bias_scale: float = 1.0) -> Tensor:
    """Drop the input's columns if the weight is frozen, append the bias' column if the bias is not."""
    columns = [a] if "weight" in names else []
    if "bias" in names:
        columns.append(a.new_full((*a.shape[:-1], 1), bias_scale))
    return torch.cat(columns, dim=-1)


def _linear(module: nn.Module, name: str, layout: Layout, names: Names, x: Tensor, g: Tensor) -> LayerRows:
    scales = (module.weight_scale, module.bias_scale) if isinstance(module, NTKLinear) else (1.0, 1.0)
    V, N = g.shape[:2]
    T = x.shape[1:-1].numel()
    a = _bias_column(x.reshape(N, T, 1, x.shape[-1]) * scales[0], names, scales[1])
    return KroneckerRows(name, layout, a, g.reshape(V, N, T, 1, g.shape[-1]))


def _pad(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _convolution(module: nn.Module, name: str, layout: Layout, names: Names, x: Tensor, g: Tensor) -> LayerRows:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    V, N = g.shape[:2]
    padded = _pad(module, x)
    lift = (1,) * (2 - len(module.kernel_size))
    if lift:
        padded = padded.unsqueeze(2)
    patches = F.unfold(
        padded,
        kernel_size=lift + module.kernel_size,
        dilation=lift + module.dilation,
        stride=lift + module.stride,
    )
    Q = module.groups
    a = patches.reshape(N, Q, -1, patches.shape[-1]).permute(0, 3, 1, 2)
    rows = g.reshape(V, N, Q, g.shape[2] // Q, -1).permute(0, 1, 4, 2, 3)
    return KroneckerRows(name, layout, _bias_column(a, names), rows)


def _embedding(
    module: nn.Module,
    name: str,
    layout: Layout,
    names: Names,  # noqa: ARG001
    x: Tensor,
    g: Tensor,
) -> LayerRows:
    assert isinstance(module, nn.Embedding)
    V, N = g.shape[:2]
    T = x.shape[1:].numel()
    index, rows = x.reshape(N, T), g.reshape(V, N, T, g.shape[-1])
    if module.padding_idx is not None:
        rows = rows * (index != module.padding_idx)[..., None]
    return EmbeddingRows(name, layout, index.clone(), rows)


def _check_embedding(module: nn.Module, name: str) -> None:
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.scale_grad_by_freq:
        option = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        raise UnsupportedModel(
            f"Embedding {name!r} uses {option}, which is not part of the model's derivative. Build it without."
        )


def _scale_shift(name: str, layout: Layout, names: Names, normalised: Tensor, g: Tensor) -> LayerRows:
    """Rows of an elementwise scale and shift; `normalised` [N, T, U], `g` [V, N, T, U]."""
    columns = []
    if "weight" in names:
        columns.append((g * normalised).sum(2))
    if "bias" in names:
        columns.append(g.sum(2))
    return DenseRows(name, layout, torch.stack(columns, dim=-1))


def _batch_norm(module: nn.Module, name: str, layout: Layout, names: Names, x: Tensor, g: Tensor) -> LayerRows:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    statistics = (None, None) if module.training else (module.running_mean, module.running_var)
    plain = F.batch_norm(x, *statistics, training=module.training, eps=module.eps)
    (V, N, U), T = g.shape[:3], x.shape[2:].numel()
    return _scale_shift(
        name, layout, names, plain.reshape(N, U, T).transpose(1, 2), g.reshape(V, N, U, T).transpose(2, 3)
    )


def _layer_norm(module: nn.Module, name: str, layout: Layout, names: Names, x: Tensor, g: Tensor) -> LayerRows:
    assert isinstance(module, nn.LayerNorm)
    plain = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    (V, N), T = g.shape[:2], x.shape[1:].numel() // layout.units
    return _scale_shift(name, layout, names, plain.reshape(N, T, layout.units), g.reshape(V, N, T, layout.units))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(lambda m: m.weight.shape[0], _linear),
    NTKLinear: Rule(lambda m: m.out_features, _linear),
    nn.Conv1d: Rule(lambda m: m.out_channels, _convolution),
    nn.Conv2d: Rule(lambda m: m.out_channels, _convolution),
    nn.BatchNorm1d: Rule(lambda m: m.num_features, _batch_norm),
    nn.BatchNorm2d: Rule(lambda m: m.num_features, _batch_norm),
    nn.LayerNorm: Rule(lambda m: torch.Size(m.normalized_shape).numel(), _layer_norm),
    nn.Embedding: Rule(lambda m: m.num_embeddings, _embedding, _check_embedding),
}
