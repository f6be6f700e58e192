"""Call a model with other tensors in place of its parameters and buffers.

`torch.func.functional_call` swaps and restores by name. A parameter with several names, as in a module that a model holds
twice, is then restored from a tensor that was put in its place. Here tensors are replaced wherever they are found, by
identity, and every dictionary gets back what it held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import Tensor, nn

from curvlab.nn.embedding_bag import differentiable_bags
from curvlab.nn.hooks import unwatched
from curvlab.nn.weight_norm import differentiable_weight_norm


def called_with(
    model: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Call a model with tensors in place of its parameters and buffers, and leave it as it was found.

    It may be differentiated, vectorised and nested; the user's hooks on gradients do not act. What the call stores on the model
    is lost; what it does to the numbers of buffers that are not in `state` stays.

    Args:
        model: any module.
        state: tensors by any of the names that the model has for a parameter or buffer; all its other names, and the
            parametrisations that are computed from it, follow. What is left out keeps its own.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        ValueError: for a name that the model does not have, and for two tensors in place of one.
    """
    with holding(model, state), unwatched(model), differentiable_weight_norm(model), differentiable_bags(model):
        return model(*args, **(kwargs or {}))


@contextmanager
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Have a model hold other tensors as its parameters and buffers within the block; it is left as it was found.

    Args:
        model: any module.
        state: see `called_with`. With `Parameter` objects it is, within the block, the same model at other weights.

    Raises:
        ValueError: as `called_with`.
    """
    with attributes_kept(model):
        _put(model, state)
        yield


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module back the attributes, parameters and buffers that it had before the block, the same objects.

    Lists, dictionaries and sets that are attributes get their entries back. What a forward pass does elsewhere, to objects
    inside those or to files, stays.
    """
    found: list[tuple[Any, Any]] = []
    for module in model.modules():
        held = vars(module)
        found += [(holder, dict(holder)) for holder in (held, module._parameters, module._buffers)]
        found += [(value, copy(value)) for value in held.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for holder, content in found:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(content)


_CONTAINERS = (list, dict, set)


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    new: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"{type(model).__name__} has no parameter or buffer {name!r}.")
        if new.setdefault(id(own[name]), tensor) is not tensor:
            raise ValueError(f"There are two tensors for {name!r}, which the model has under several names: give one.")
    for module in model.modules():
        holders: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
        for holder in holders:
            holder.update({key: new[id(value)] for key, value in holder.items() if id(value) in new})
