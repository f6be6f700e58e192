"""Checkpoints of runs: a file that cannot be taken up is set aside, and the run starts afresh."""

import copy
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Resumed = TypeVar("Resumed")

log = logging.getLogger(__name__)


def take_up(
    path: Path | None, rehearse: Callable[[dict[str, Any]], None], restore: Callable[[dict[str, Any]], Resumed]
) -> Resumed | None:
    """Take up what a checkpoint holds; nothing in it is executed.

    A checkpoint that is damaged, or is not one of this run, is renamed to `<name>.damaged`, with a warning in the log.

    Args:
        path: its file; None keeps nothing.
        rehearse: goes on from the content in a copy of the run, and raises where that is not possible.
        restore: takes the content up in the run itself.

    Returns:
        What `restore` returns; None if there is no file or it was set aside, with the run untouched.

    Cost: that of the rehearsal.
    """
    if path is None or not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    try:
        state: dict[str, Any] = torch.load(content, weights_only=True)
        rehearse(copy.deepcopy(state))  # optimisers keep the tensors that they are given, and change them
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        reason = str(error).partition("\n")[0]
        log.warning(
            "The checkpoint %s cannot be taken up (%s: %s). It is now %s, and the run is computed again.",
            path, type(error).__name__, reason, aside.name,
        )  # fmt: skip
        return None
    return restore(state)
