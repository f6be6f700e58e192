"""Mixtures of experts as the transformers library stacks them: weights `[E, out, in]`, of which a token uses those of its experts.

The linear maps of all experts are one layer in E groups. Its positions are, group by group, the tokens of a sample that the group
was sent: `KroneckerRows` with numbers of positions `[N, E]`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.nn.routed import RoutedLinear
from curvlab.rows.factored import KroneckerRows
from curvlab.rows.grouping import Grouping
from curvlab.rows.layer import LayerRows
from curvlab.rows.modules.composite import Composite, Project, Projection
from curvlab.rows.modules.rule import Inputs, LayerUse, Rule, augmented


class RoutedProjection(Projection):
    """One linear map of every expert."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the map of an expert to every entry `[M, in]`, that of its number in `index` `[M]`."""
        if self.inner is not None:
            found: Tensor = self.inner(x, index)
            return found
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        output: Tensor = RoutedLinear.apply(x, weight, bias, index)  # type: ignore[no-untyped-call]
        return output


def is_experts(module: nn.Module) -> bool:
    """Whether the library dispatches the module's forward pass, and its weights have the outputs first."""
    library = sys.modules.get("transformers.integrations.moe")
    dispatched = library is not None and getattr(type(module).forward, "__globals__", None) is vars(library)
    return dispatched and not (module.is_transposed or module._is_expert_parallel)


def _parts(module: Any) -> Mapping[str, Mapping[str, str]]:
    parts = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return {part: {"weight": part, **({"bias": f"{part}_bias"} if module.has_bias else {})} for part in parts}


def _forward(
    module: Any, project: Project, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Send every token to its experts, and add up what they return; as `batched_mm_experts_forward` of the library."""
    first, last = project.values()
    tokens, chosen = top_k_index.shape
    index = top_k_index.flatten()
    x = hidden_states[:, None].expand(-1, chosen, -1).reshape(tokens * chosen, -1)
    inside = first(x, index)
    y = last(module._apply_gate(inside) if module.has_gate else module.act_fn(inside), index)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    weighted: Tensor = y * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def _rows(use: LayerUse, inputs: Inputs, g: Tensor, grouping: Grouping) -> LayerRows:
    """Return rows whose positions are those that a group was sent."""
    x, index = inputs
    N, E = grouping.samples, use.layout.units // g.shape[-1]
    sent = Grouping(grouping.sample * E + index, N * E)
    a = sent.spread(augmented(x, use.names), 0).unflatten(0, (N, E)).transpose(1, 2)
    by_group = sent.spread(g, 1).unflatten(1, (N, E)).transpose(2, 3)
    return KroneckerRows(use.name, use.layout, a, by_group, sent.lengths.view(N, E))


def _of_entries(use: LayerUse, inputs: Inputs, g: Tensor) -> LayerRows:
    """Return the rows of entries that are a sample each."""
    return _rows(use, inputs, g, Grouping(torch.arange(len(inputs[0]), device=g.device), len(inputs[0])))


EXPERTS = Composite(_parts, _forward, RoutedProjection)
ROUTED = Rule(lambda m: m.weight.shape[:2].numel(), _of_entries, of_samples=_rows)
