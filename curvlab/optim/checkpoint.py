"""Checkpoints by `torch.distributed.checkpoint`, which open at any number of processes.

    torch.distributed.checkpoint.save({"model": …, "natural": ByLayer(optimizer)}, checkpoint_id=path)
    torch.distributed.checkpoint.load({"model": …, "natural": ByLayer(optimizer)}, checkpoint_id=path)

Every layer's curvature is one item, which its holder writes, and whoever holds the layer then reads.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from curvlab.fisher.by_layer import in_parts, put_together
from curvlab.optim.natural_gradient import NaturalGradient
from curvlab.optim.preconditioner import Preconditioner
from curvlab.tools.shown import line

COMMON = "common"
"""Item of what belongs to no layer; no parameter has the name."""


class ByLayer:
    """The state of a preconditioner or optimiser by layer, as `torch.distributed.checkpoint` takes it.

    Momentum is saved as the parameters are, cut up or whole. What the quadratic model knows of the last step is not.

    Args:
        of: the preconditioner or optimiser, of the same configuration where the checkpoint is opened.
    """

    def __init__(self, of: Preconditioner | NaturalGradient) -> None:
        self.optimizer = of if isinstance(of, NaturalGradient) else None
        self.preconditioner = of.preconditioner if isinstance(of, NaturalGradient) else of

    def __repr__(self) -> str:
        return line(self, of=self.optimizer or self.preconditioner)

    def state_dict(self) -> dict[str, Any]:
        """Return the items of this process: its layers' as bytes, empty before the first update, and momentum."""
        state = self.preconditioner.state_dict()
        parts: dict[str, dict[str, Any]] = {}
        if state["structure"] is not None:
            state["structure"], parts = in_parts(state["structure"])
        if self.optimizer is not None:
            state |= self.optimizer.numbers()
        layers = {first: _packed(parts[first]) if first in parts else b"" for first in self.preconditioner.held_layers}
        momentum = {} if self.optimizer is None else self.optimizer.momentum()
        return {COMMON: _packed(state), "layers": layers, "momentum": momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the items that were read.

        Raises:
            ValueError: if they are those of another structure or configuration.
        """
        common = _unpacked(state[COMMON])
        if common["structure"] is not None:
            parts = {first: _unpacked(packed) for first, packed in state["layers"].items()}
            common["structure"] = put_together(common["structure"], parts)
        self.preconditioner.load_state_dict(common)
        if self.optimizer is not None:
            self.optimizer.take_up(common, state.get("momentum", {}))


def _packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)
