"""Data as users hand them over: one pair (inputs, targets), or an iterable of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

Data = Sequence[Any] | Iterable[Sequence[Any]]
"""One pair (inputs, targets), or an iterable of pairs such as a DataLoader."""


def as_batches(data: Data) -> Any:
    """Return the batches of data: a list of one pair, or the iterable itself.

    A pair has targets in a tensor, or in a mapping as `curvlab.nn.MultiTask` takes them.
    """
    pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor | Mapping)
    return [data] if pair else data


def shuffles(data: Data) -> bool:
    """Whether data are a loader whose order is random."""
    sampler = getattr(data, "sampler", None)
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler) or bool(
        getattr(sampler, "shuffle", False)
    )
