"""Rows and blocks as plain containers, for `torch.load` with `weights_only=True`, and rows without numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlab.fisher.block import Block, BlockState
from curvlab.rows import Rows
from curvlab.rows.factored import EmbeddingRows, KroneckerRows
from curvlab.rows.layer import DenseRows, LayerRows, blank
from curvlab.rows.loss import restored
from curvlab.rows.parameters import Layout, ParameterSpace
from curvlab.rows.tied import TiedRows

PackedBlock = tuple[str, list[str], Tensor, BlockState]
"""What a block is called, the parameters and the entries of its layer that it covers, and its state."""

_FORMS: dict[str, type[LayerRows]] = {
    form.__name__: form for form in (KroneckerRows, EmbeddingRows, TiedRows, DenseRows)
}


def without_numbers(rows: Rows) -> Rows:
    """Return rows of zeros with the same layers, shapes, type and device, which take no memory."""
    return replace(
        rows,
        layers=tuple(layer.without_numbers() for layer in rows.layers),
        sample_weights=blank(rows.sample_weights),
        root=None,
        _jacobian=None,
    )


def pack_rows(rows: Rows) -> dict[str, Any]:
    """Return the rows as a dictionary that `unpack_rows` understands."""
    return {
        "layers": [
            {
                "form": type(layer).__name__,
                "name": layer.name,
                "units": layer.layout.units,
                "parameters": {slot.name: list(slot.shape) for slot in layer.layout.slots},
                "input_first": {slot.name: slot.input_first for slot in layer.layout.slots},
                "factors": list(layer.factors),
            }
            for layer in rows.layers
        ],
        "shapes": {name: list(shape) for name, shape in rows.space.shapes.items()},
        "kind": rows.kind,
        "count": rows.count,
        "terms": rows.terms,
        "reduction": rows.reduction,
        "per": rows.per,
        "sample_weights": rows.sample_weights,
        "jacobian": None if rows._jacobian is None else pack_rows(rows._jacobian),
        "root": None if rows.root is None else rows.root.state(),
    }


def unpack_rows(packed: dict[str, Any]) -> Rows:
    """Return the rows that `pack_rows` packed."""
    layers = []
    for layer in packed["layers"]:
        shapes = {name: torch.Size(shape) for name, shape in layer["parameters"].items()}
        layout = Layout.of(layer["units"], shapes, layer["input_first"])
        layers.append(_FORMS[layer["form"]].of(layer["name"], layout, *layer["factors"]))
    return Rows(
        layers=tuple(layers),
        space=ParameterSpace({name: torch.Size(shape) for name, shape in packed["shapes"].items()}),
        kind=packed["kind"],
        count=packed["count"],
        terms=packed["terms"],
        reduction=packed["reduction"],
        per=packed["per"],
        sample_weights=packed["sample_weights"],
        _jacobian=None if packed["jacobian"] is None else unpack_rows(packed["jacobian"]),
        root=None if packed["root"] is None else restored(packed["root"]),
    )


def pack_blocks(blocks: Sequence[Block]) -> list[PackedBlock]:
    """Return the states of blocks in a list that `restore_blocks` understands."""
    return [(repr(block), list(block.names), block.covered(), block.state()) for block in blocks]


def restore_blocks(blocks: Sequence[Block], packed: Sequence[PackedBlock]) -> None:
    """Bring the states of blocks back, in whatever order they were packed.

    Raises:
        ValueError: if these are not the blocks that were packed; none is changed then.
    """
    made, saved = [repr(block) for block in blocks], [name for name, *_ in packed]
    if sorted(made) != sorted(saved):
        raise ValueError(f"The state has the blocks {saved}, but this configuration makes {made}.")
    alike: dict[str, list[PackedBlock]] = {name: [] for name in saved}
    for of_block in packed:
        alike[of_block[0]].append(of_block)
    ordered = [alike[name].pop(0) for name in made]
    for block, (name, names, entries, _) in zip(blocks, ordered, strict=True):
        if list(block.names) != names or not torch.equal(block.covered(), entries):
            raise ValueError(
                f"The state's {name} covers other parameters than that of this configuration, which cuts them by another "
                "partition. Load the state into a structure with the same one."
            )
    for block, (*_, content) in zip(blocks, ordered, strict=True):
        block.restore(content)
