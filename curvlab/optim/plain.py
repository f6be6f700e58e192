"""Which parameters keep their plain gradient, by the user's choice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from curvlab.errors import UnsupportedModel, unknown_name
from curvlab.nn.modes import check_module
from curvlab.rows.owners import Owner, owners_of


def preconditioned(model: nn.Module, plain: Sequence[str]) -> list[Owner]:
    """Return the owners of parameters that are not left to the plain gradient."""
    check_module(model)
    known = [*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_modules() if name)]
    for name in plain:
        if name not in known:
            raise unknown_name("module or parameter in plain", name, known)

    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and name not in plain:
            raise UnsupportedModel(
                f"{name} has sparse gradients, which a structure would fill up: make it with sparse=False, or leave it to the "
                f"plain gradient: plain=({name!r},)."
            )
    left = {n for n, _ in model.named_parameters() if any(n == name or n.startswith(f"{name}.") for name in plain)}
    owners = owners_of(model, fixed=False, without=left)
    if not owners:
        raise UnsupportedModel("All parameters are left to the plain gradient: there is nothing to precondition.")
    return owners
