"""Memory of tensors, and the functions of torch that ran, as a dispatch mode sees them."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it.

    Attributes:
        peak: most bytes that were held at once.
        functions: names of what ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._held = 0
        self.functions: set[str] = set()
        self._sizes: dict[int, int] = {}

    def _forget(self, storage: int) -> None:
        self._held -= self._sizes.pop(storage)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        self.functions.add(function.name())
        for storage in (_storage(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self._held += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self._held)
        return result


def _storage(x: torch.Tensor) -> Any:
    return x.untyped_storage()
