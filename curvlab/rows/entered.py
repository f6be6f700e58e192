"""What a model was called on, with which it can be called once more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curvlab.errors import UnsupportedModel
from curvlab.nn.modes import RandomState, random_state
from curvlab.rows.sweep import Arguments, detached


@dataclass(frozen=True)
class Entered:
    """The beginning of a pass.

    Attributes:
        arguments: of the call, detached.
        random: the states from which the pass draws.
        versions: how often each tensor among the arguments had been changed in place.
    """

    arguments: Arguments
    random: RandomState
    versions: list[int]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        """Note a call that is about to be made."""
        arguments = detached((args, kwargs))
        return cls(arguments, random_state(model), _versions(arguments))

    def unchanged(self) -> Arguments:
        """Return the arguments.

        Raises:
            UnsupportedModel: if they were changed in place since.
        """
        if _versions(self.arguments) != self.versions:
            raise UnsupportedModel(
                "The model's inputs were changed in place after it was called on them, so that its pass cannot be repeated. "
                "Give it copies, or call precondition() or step() before the next batch takes their memory."
            )
        return self.arguments


def _versions(arguments: Arguments) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [x._version for x in tree_leaves(arguments) if isinstance(x, Tensor) and not x.is_inference()]
