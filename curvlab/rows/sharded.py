"""Models that `torch.distributed.fsdp.fully_shard` has cut up.

Between passes a parameter is a `DTensor`, of which every process has some rows. In a pass it is whole for as long as its module
needs it, as another `Parameter` that the module has in its place; its memory is given back before the reverse pass, which asks
for it anew. All processes run the same passes together, so none may run one more than the others.
"""

from __future__ import annotations

from torch import Tensor, distributed, nn

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
