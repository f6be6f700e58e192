"""The first-order expansion of a model in its parameters, as a module."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.nn.modes import check_module, randomness


class Linearized(nn.Module):
    """f(x; θ₀) + J(x; θ₀)(θ − θ₀) as a function of θ; made by `linearize`.

    The parameters θ carry exactly the names of the expanded model's `named_parameters()`. The frozen model
    at θ₀ is `base`; it follows `.to()`, copies and pickles, and its state, buffers included, is kept in
    `state_dict()` under `_extra_state`. `train()` and `eval()` do not reach it: the expansion is of the model
    in the mode that it was found in.
    """

    _base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        trainable = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        # Past nn.Module's registration, so that the base adds no parameter, buffer or module name.
        object.__setattr__(self, "_base", base.requires_grad_(False))
        for name, parameter in base.named_parameters():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(parameter.detach().clone(), trainable[name]))

    @property
    def base(self) -> nn.Module:
        """The frozen model at θ₀."""
        return self._base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the expansion at the model's own arguments, in the structure of the model's own output.

        Cost: one forward pass with tangents, about two to three plain ones.
        """
        origin = dict(self._base.named_parameters())
        present = dict(self.named_parameters(remove_duplicate=False))
        step = {name: present[name] - origin[name] for name in origin}

        def outputs(parameters: dict[str, Tensor]) -> Any:
            return called_with(self._base, parameters, args, kwargs)

        with differentiable_attention():
            values, changes = jvp(outputs, (origin,), (step,))[:2]
        return tree_map(torch.add, values, changes)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the frozen model: θ₀ and buffers."""
        return self._base.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore θ₀ and the buffers."""
        self._base.load_state_dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linearized":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._base._apply(fn, recurse)
        return self

    def __repr__(self) -> str:
        return f"Linearized({self._base!r})"


def linearize(model: nn.Module) -> Linearized:
    """Return the first-order expansion of a model at its present parameters θ₀.

    It tells *the theorem fails* from *the network is not linear*: whatever a theory says about training in
    the NTK regime must hold for the expansion without any condition on the width. The Jacobian with respect
    to θ is that of the model at θ₀, for every θ. Tied parameters stay tied.

    Args:
        model: Any module that `torch.func` can differentiate and whose outputs are floating-point tensors, in
            any structure. It is copied, left as it was found, and shares no storage with the result.

    Raises:
        UnsupportedModel: The model is not a deterministic function of one sample as it stands (a batch
            normalisation or dropout in training mode), cannot be copied, or has a parameter or submodule
            called `base`, which would hide the frozen model.
    """
    check_module(model)
    noisy = [name or type(model).__name__ for name, module in model.named_modules() if randomness(module)]
    if noisy:
        raise UnsupportedModel(
            f"linearize: {', '.join(noisy)} in training mode: batch statistics or dropout make the output "
            "depend on the batch or on chance. Call model.eval() first."
        )
    if any(name.split(".")[0] == "base" for name, _ in model.named_parameters()):
        raise UnsupportedModel(
            "linearize: a parameter or submodule of the model is called 'base', the name under which the "
            "expansion holds the frozen model. Rename it."
        )
    try:
        frozen = copy.deepcopy(model)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"linearize: {type(model).__name__} cannot be copied ({error}). Computed tensors kept as "
            "attributes are the usual reason: compute them in forward or by torch.nn.utils.parametrizations."
        ) from error
    return Linearized(frozen)


@contextmanager
def differentiable_attention(*, fused: bool = False) -> Iterator[None]:
    """Hold attention to implementations that can be differentiated.

    Args:
        fused: whether a plain backward pass is all that follows, so that attention that never forms its weights may be used. It has
            neither a forward-mode derivative nor a rule for several rows at once.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
