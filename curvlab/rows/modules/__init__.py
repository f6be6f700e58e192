"""The table of supported layers: how a module's inputs and back-propagated rows become `LayerRows`.

A new layer is one entry of `RULES`, by `register`: its exact forward pass (a subclass that overrides `forward` is not covered), how
its parameters are laid out in units, and how its rows follow from its inputs and from the rows at its output; or of
`COMPOSITES`, for a module that consists of linear maps. Both engines read this table, and so do the tests and the
documentation.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import Tensor, nn

from curvlab.nn import NTKLinear
from curvlab.rows.modules.attention import ATTENTION
from curvlab.rows.modules.composite import Composite, Project, Projection, decomposed
from curvlab.rows.modules.convolution import CONVOLUTION, TRANSPOSED_CONVOLUTION
from curvlab.rows.modules.elementwise import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, PRELU, RMS_NORM
from curvlab.rows.modules.experts import EXPERTS, ROUTED, RoutedProjection, is_experts
from curvlab.rows.modules.linear import BILINEAR, INPUT_FIRST_LINEAR, LINEAR
from curvlab.rows.modules.lookup import EMBEDDING, EMBEDDING_BAG
from curvlab.rows.modules.own import OWN, is_own
from curvlab.rows.modules.recurrent import CELL, RECURRENT
from curvlab.rows.modules.rule import Inputs, LayerUse, Names, Rule
from curvlab.rows.parameters import Layout
from curvlab.tools.registry import BrokenPlugin, load

__all__ = [
    "COMPOSITES",
    "OWN",
    "RULES",
    "Composite",
    "Inputs",
    "LayerUse",
    "Names",
    "Project",
    "Projection",
    "Rule",
    "composite_for",
    "decomposed",
    "is_batch",
    "layout_of",
    "register",
    "rule_for",
    "supported_layers",
]

Entry = TypeVar("Entry", Rule, Composite)

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LINEAR,
    NTKLinear: LINEAR,
    nn.Bilinear: BILINEAR,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.ConvTranspose1d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose2d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose3d: TRANSPOSED_CONVOLUTION,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.PReLU: PRELU,
    nn.Embedding: EMBEDDING,
    nn.EmbeddingBag: EMBEDDING_BAG,
}

COMPOSITES: dict[type[nn.Module], Composite] = {
    nn.MultiheadAttention: ATTENTION,
    nn.LSTM: RECURRENT,
    nn.GRU: RECURRENT,
    nn.RNN: RECURRENT,
    nn.LSTMCell: CELL,
    nn.GRUCell: CELL,
    nn.RNNCell: CELL,
}

_ELSEWHERE = {
    ("torch_geometric.nn.dense.linear", "Linear"): LINEAR,
    ("transformers.pytorch_utils", "Conv1D"): INPUT_FIRST_LINEAR,
}
"""Layers of libraries that are looked up where their user has imported them: importing them here would cost seconds."""


def register(kind: type[nn.Module], entry: Rule | Composite) -> None:
    """Add a layer, or replace what is known of it.

    An installed package adds layers by an entry point of the group ``curvlab.layers``, a mapping of their classes to what
    this function takes.

    Args:
        kind: its class; a subclass with a `forward` of its own is another layer. Parameters beside `weight` and `bias` are
            beyond a rule: such a module has the rows of `OWN`.
        entry: the rule by which its rows are formed, or how it consists of linear maps.
    """
    table: dict[type[nn.Module], Any] = COMPOSITES if isinstance(entry, Composite) else RULES
    table[kind] = entry


@cache
def load_plugins() -> None:
    """Add the layers of installed packages; one that cannot be loaded is warned of by name."""
    for point in entry_points(group="curvlab.layers"):
        try:
            for kind, entry in load(point, "layers").items():
                register(kind, entry)
        except BrokenPlugin as error:
            warnings.warn(str(error), stacklevel=2)


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of a module: that of the table if its forward pass and its parameters are those there.

    Another layer without modules inside has `OWN`; what is left has None.
    """
    known = _entry(_rules(), module) if module._parameters.keys() <= {"weight", "bias"} else None
    return OWN if known is None and is_own(module) and composite_for(module) is None else known


def is_batch(module: nn.Module, x: Tensor) -> bool:
    """Whether an input of a module with a rule has an axis before those of features; indices have none of these."""
    rule = rule_for(module)
    if rule is not None and rule.axes is not None:
        return x.ndim == rule.axes(module)
    return x.ndim > int(x.is_floating_point())


def composite_for(module: nn.Module) -> Composite | None:
    """Return how a module is decomposed, or None if it is not, or its forward pass is not that in the table."""
    load_plugins()
    return _unless_replaced(EXPERTS, module) if is_experts(module) else _entry(COMPOSITES, module)


def _entry(table: Mapping[type[nn.Module], Entry], module: nn.Module) -> Entry | None:
    for kind, entry in table.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return _unless_replaced(entry, module)
    return None


def _unless_replaced(entry: Entry, module: nn.Module) -> Entry | None:
    """Return an entry unless the module has a forward pass of its own, other than that in decomposed form."""
    own = vars(module).get("forward")
    runs_decomposed = isinstance(entry, Composite) and isinstance(own, partial) and own.func is entry.forward
    return entry if own is None or runs_decomposed else None


def _rules() -> Mapping[type[nn.Module], Rule]:
    load_plugins()
    loaded = {
        getattr(library, name): rule
        for (path, name), rule in _ELSEWHERE.items()
        if (library := sys.modules.get(path)) is not None
    }
    return {**RULES, Projection: LINEAR, RoutedProjection: ROUTED, **loaded}


def supported_layers() -> list[str]:
    """Return the names of the layers in the table."""
    load_plugins()
    return [kind.__name__ for kind in (*RULES, *COMPOSITES)]


def layout_of(module: nn.Module, names: Names) -> Layout:
    """Lay out a module's trainable parameters; a module without a rule forms one unit."""
    rule = rule_for(module)
    shapes = {name: getattr(module, local).shape for local, name in names.items()}
    if rule is None:
        return Layout.of(1, shapes)
    groups = {names["weight"]: rule.input_first(module)} if rule.input_first and "weight" in names else None
    return Layout.of(rule.units(module), shapes, groups)
