"""Data as users hand them over: one pair (inputs, targets), or an iterable of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from curvlab.rows.packed import is_packed, length, together

Data = Sequence[Any] | Iterable[Sequence[Any]]
"""One pair (inputs, targets), or an iterable of pairs such as a DataLoader."""


def as_batches(data: Data) -> Any:
    """Return the batches of data: a list of one pair, or the iterable itself.

    A pair has targets in a tensor, or in a mapping as `curvlab.nn.MultiTask` takes them, or inputs that are no pair themselves,
    such as a tensor beside targets in a tuple.

    Raises:
        ValueError: for a data set, whose entries are samples.
    """
    if _holds_samples(data):
        raise ValueError(
            f"The data are a {type(data).__name__}, which holds samples and no batches: wrap it in DataLoader(data, batch_size=…), "
            "with batch_size=None if what it holds are batches."
        )
    if not isinstance(data, tuple | list) or len(data) != 2:
        return data
    inputs, targets = data
    of_one = is_packed(inputs) or not isinstance(inputs, tuple | list)
    return [data] if of_one or isinstance(targets, Tensor | Mapping) else data


def _holds_samples(data: object) -> bool:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def as_pair(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"A batch is a pair (inputs, targets), got a {type(batch).__name__}{size}. Inputs may be a tuple of arguments or a "
            "dict of keywords: make pairs of yours, as in [({'x': b['x']}, b['y']) for b in loader]."
        )
    inputs, targets = batch
    return inputs, targets


def pairs_of(data: Any, most: int | None = None) -> list[tuple[Any, Any]]:
    """Return the first batches of data, all if there is no limit.

    Raises:
        ValueError: the data are neither a pair nor pairs, or none.
    """
    if isinstance(data, Tensor | str) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is a pair (inputs, targets) or an iterable of pairs such as a DataLoader, got a {type(data).__name__}."
        )
    pairs = list(map(as_pair, islice(as_batches(data), most)))
    if not pairs:
        raise ValueError("The data hold no batch.")
    return pairs


def joined(data: Any) -> Any:
    """Return one pair (inputs, targets) of all samples.

    Raises:
        ValueError: the data are neither a pair nor pairs, or none.
    """
    pairs = pairs_of(data)
    return pairs[0] if len(pairs) == 1 else tree_map(_together, *pairs, is_leaf=is_packed)


def _together(*parts: Any) -> Any:
    return together(parts) if length(parts[0]) is not None else parts[0]


def shuffles(data: Data) -> bool:
    """Whether data are a loader whose order is random."""
    sampler = getattr(data, "sampler", None)
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler) or bool(
        getattr(sampler, "shuffle", False)
    )
