"""Two batches of data: the one that is measured and stepped on, and a second one that takes no part in the steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from curvlab.rows.batches import Data, pairs_of
from curvlab.rows.loss import held_by_sample
from curvlab.rows.packed import lengths, part_of

Batch = tuple[Any, Any]
"""Inputs and targets."""


@dataclass(frozen=True)
class Batches:
    """The batch that is measured, and the second one.

    Attributes:
        first: inputs and targets that rows, gradients and steps are made of.
        second: inputs and targets that only the loss is looked at, if there are any.
        origin: where the second batch comes from, or why there is none, in words.
    """

    first: Batch
    second: Batch | None
    origin: str


@contextmanager
def randomness_kept(data: Any) -> Iterator[None]:
    """Give all sources of random numbers, a loader's own generators included, the states that they had before the block."""
    sampler = getattr(data, "sampler", None)
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    found = {id(x): x for x in (getattr(holder, "generator", None) for holder in (data, sampler, inner))}
    generators = [(x, x.get_state()) for x in found.values() if isinstance(x, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # what data sets draw from
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def two_batches(data: Data, loss: nn.Module, *, splits: bool, wants_second: bool) -> Batches:
    """Take two batches off data, whose order stays as it is for whoever iterates next.

    Args:
        data: a pair (inputs, targets), or an iterable of pairs such as a DataLoader.
        loss: decides whether a pair can be halved: not if it holds an entry for every sample.
        splits: whether a single batch may be halved, as one of a graph may not.
        wants_second: whether there is to be a second batch at all.

    Raises:
        ValueError: the data are neither a pair nor pairs, or none.
    """
    pairs = pairs_of(data, 2 if wants_second else 1)
    first = pairs[0]
    if not wants_second:
        return Batches(first, None, "none was asked for")
    if len(pairs) == 2:
        return Batches(first, pairs[1], "the second of the data")
    total = samples_of_batch(first, loss) if splits else None
    if total is None or total < 2:
        return Batches(first, None, "there is none: the data are one batch that cannot be halved")
    half = (total + 1) // 2
    return Batches(
        part_of(first, slice(0, half), total),
        part_of(first, slice(half, total), total),
        f"the last {total - half} of the {total} samples, held out",
    )


def samples_of_batch(batch: Batch, loss: nn.Module) -> int | None:
    """Return how many samples a batch has, if its tensors can be cut by them."""
    inputs, folded = map(lengths, batch)
    if len(inputs) != 1 or 0 in inputs:
        return None
    (total,) = inputs
    fits = all(n and n % total == 0 for n in folded) and not any(held_by_sample(part, total) for part in loss.modules())
    return total if fits else None
