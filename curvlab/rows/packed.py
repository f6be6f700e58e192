"""Samples of tensors, on their first axis, and of packed sequences, which hold the steps of all samples one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils._pytree import tree_flatten, tree_map


def is_packed(x: Any) -> bool:
    """Whether something is a packed sequence, which is a leaf and not the tuple that torch makes it of."""
    return isinstance(x, PackedSequence)


def length(x: Any) -> int | None:
    """Return the number of samples that a tensor or a packed sequence may hold; None for anything else."""
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    return len(x) if isinstance(x, Tensor) and x.ndim else None


def leaves(arguments: Any) -> list[Any]:
    """Return what arguments consist of, packed sequences whole."""
    return tree_flatten(arguments, is_leaf=is_packed)[0]


def lengths(arguments: Any) -> set[int]:
    """Return how many samples the tensors and packed sequences in arguments may hold."""
    return {found for found in map(length, leaves(arguments)) if found is not None}


def taken(x: Any, part: slice) -> Any:
    """Return some of the samples."""
    if isinstance(x, PackedSequence):
        return pack_sequence(unpack_sequence(x)[part], enforce_sorted=x.sorted_indices is None)
    return x[part]


def entries_of(part: slice, along: int, total: int) -> slice:
    """Return the entries of some samples along an axis that holds an equal number of each."""
    each = along // total
    return slice(each * part.start, each * part.stop)


def part_of(arguments: Any, part: slice, total: int) -> Any:
    """Return some of the samples of all tensors in arguments, which may have positions folded into their first axis."""

    def entries(x: Any) -> Any:
        found = length(x)
        return x if found is None else taken(x, entries_of(part, found, total))

    return tree_map(entries, arguments, is_leaf=is_packed)


def together(parts: Sequence[Any]) -> Any:
    """Return the samples of several tensors or packed sequences in one."""
    if is_packed(parts[0]):
        return pack_sequence([one for part in parts for one in unpack_sequence(part)], enforce_sorted=False)
    return torch.cat(list(parts))
