"""Independent streams of random numbers from one seed: what plays another part in an experiment draws from another stream."""

import hashlib
import operator
from typing import SupportsIndex

import numpy as np
import torch


def stream(seed: SupportsIndex, role: str, *which: str | SupportsIndex) -> int:
    """Return the seed of a role's own stream, for torch and NumPy alike.

    Streams of different seeds or roles are independent of each other, and of those that start from small numbers, as
    the weights of a problem do (`numpy.random.SeedSequence`). They are the same in every process.

    Args:
        seed: The cell's, at least 0.
        role: What is drawn, such as ``"probes"``.
        which: Which of them, where one is not enough: ``"batches", epoch``.
    """
    named = (role, *(part if isinstance(part, str) else operator.index(part) for part in which))
    key = int.from_bytes(hashlib.sha256(repr(named).encode()).digest(), "little")
    state = np.random.SeedSequence([operator.index(seed), key]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def generator(
    seed: SupportsIndex, role: str, *which: str | SupportsIndex, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator that draws a role's own stream; see `stream`."""
    return torch.Generator(device).manual_seed(stream(seed, role, *which))
