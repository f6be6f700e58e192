"""Models that `torch.distributed.fsdp.fully_shard` has cut up.

Between passes a parameter is a `DTensor`, of which every process has some rows. In a pass it is whole for as long as its module
needs it, as another `Parameter` that the module has in its place; its memory is given back before the reverse pass, which asks
for it anew. All processes run the same passes together, so none may run one more than the others.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

if distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is one of which every process has a part."""
    return distributed.is_available() and isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a model or to modules inside."""
    return distributed.is_available() and any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Give back the memory of parameters that are whole; not to be called between forward and backward pass."""
    if is_sharded(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor that was cut up; others as they are."""
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that was cut up, for which all processes have to call; others as they are."""
    return tensor.full_tensor() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def whole(model: nn.Module) -> nn.Module:
    """Return the model as functions of its parameters take it: not wrapped to average gradients, and not cut up.

    A model that `fully_shard` has cut up is copied, with its parameters gathered: all processes have to make the call.

    Memory: the parameters of a sharded model, in every process, for as long as the copy is there.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not is_sharded(model):
        return model
    reshard(model)
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        shared[id(p)] = nn.Parameter(gathered(p).detach(), requires_grad=p.requires_grad)
    return _without_shards(model, shared)


def _without_shards(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module tree, without what `fully_shard` has put on it; it forbids copies by its classes."""
    classes: set[Any] = {type(module) for module in model.modules() if isinstance(module, FSDPModule)}
    kinds = {kind: kind.__deepcopy__ for kind in classes}

    def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        plain: Any = type(module).__mro__[2]
        memo[id(module)] = found = plain.__new__(plain)
        for name, value in vars(module).items():
            if not name.startswith("__composable_api"):
                is_hooks = name.endswith("_hooks") and isinstance(value, dict)
                kept = {key: hook for key, hook in value.items() if _is_own(hook)} if is_hooks else value
                found.__dict__[name] = copy.deepcopy(type(value)(kept) if is_hooks else kept, memo)
        return found  # type: ignore[no-any-return]

    for kind in kinds:
        kind.__deepcopy__ = copied
    try:
        return copy.deepcopy(model, memo)
    finally:
        for kind, forbids in kinds.items():
            kind.__deepcopy__ = forbids


def _is_own(hook: Any) -> bool:
    """Whether a hook is not one by which `fully_shard` follows the passes."""
    return not (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.distributed.")
