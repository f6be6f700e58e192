"""The state of a structure, cut into parts of single layers, and put together from them.

Processes that hold the curvature of some layers each save theirs, and open those of the layers that they hold then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_parts(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Cut a structure's state into what is of no layer, and the parts of layers by their first parameters.

    Blocks that span several layers belong to none.
    """
    layers = {_first(layer): layer for layer in state["shapes"]["layers"]}
    of = {name: first for first, layer in layers.items() for name in layer["parameters"]}
    apart = all(len({of[name] for name in names}) == 1 for _, names, *_ in state["blocks"])
    parts: dict[str, dict[str, Any]] = {
        first: {
            "kept": [_layer(packed, first) for _, packed in state["kept"]],
            "blocks": [block for block in state["blocks"] if apart and of[block[1][0]] == first],
        }
        for first in layers
    }
    kept = [(decay, {**packed, "layers": [], "jacobian": None, "root": None}) for decay, packed in state["kept"]]
    return {**state, "kept": kept, "blocks": [] if apart else state["blocks"]}, parts


def put_together(common: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state with the parts of some layers; rows of the others that are kept are without numbers."""
    layers = {_first(layer): layer for layer in common["shapes"]["layers"]}
    kept = [
        (decay, {**packed, "layers": [parts[f]["kept"][number] if f in parts else layers[f] for f in layers]})
        for number, (decay, packed) in enumerate(common["kept"])
    ]
    found = [block for first in layers if first in parts for block in parts[first]["blocks"]]
    return {**common, "kept": kept, "blocks": common["blocks"] or found}


def _first(layer: Mapping[str, Any]) -> str:
    return str(next(iter(layer["parameters"])))


def _layer(packed: Mapping[str, Any], first: str) -> Any:
    return next(layer for layer in packed["layers"] if _first(layer) == first)
