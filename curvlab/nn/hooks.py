"""The user's hooks while curvlab differentiates a model.

Hooks on gradients are no part of the function that a model computes. The passes of curvlab bring many rows at once, as tensors
of a transform that cannot be used after it; a hook that kept one would hold a dead tensor, and one that counts or changes
gradients would take rows for them. So they stay out of these passes, and act in those that the user runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ON_GRADIENTS = ("backward_hooks", "backward_pre_hooks")
_sweeping = ContextVar("sweeping", default=False)


def is_sweeping() -> bool:
    """Whether some watch is kept quiet: calls of models belong to no pass of the user's then."""
    return _sweeping.get()


def is_users(hook: Any) -> bool:
    """Whether a hook is the user's own, neither torch's nor ours."""
    while isinstance(hook, partial | _Unless):
        hook = hook.func
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.partition(".")[0] not in ("torch", "curvlab")


def has_forward_hooks(*functions: Any) -> bool:
    """Whether there are hooks of the user's on what modules, of models and losses, are called on or return."""
    return any(
        is_users(hook) for hooks in _hooks(functions, ("forward_hooks", "forward_pre_hooks")) for hook in hooks.values()
    )


class _Unless:
    """A hook that acts unless a watch keeps it quiet."""

    def __init__(self, watch: HookWatch, func: Callable[..., Any]) -> None:
        self.watch, self.func = watch, func

    def __call__(self, *arguments: Any) -> Any:
        return None if self.watch.quiet else self.func(*arguments)


class HookWatch(TorchFunctionMode):
    """Sees to it that the user's hooks on gradients act only while they are not to be quiet.

    As a context it sees the hooks on tensors that are registered within, at the cost of a call of Python for every one of
    torch.

    Attributes:
        quiet: whether they are, at present.
        registered: whether there are any.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        self.quiet, self.registered = quiet, False
        self._retained: list[ref[Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        if func is Tensor.register_hook and is_users(hook := [*args, *(kwargs or {}).values()][1]):
            self.registered = True
            return func(args[0], _Unless(self, hook))
        if func is Tensor.retain_grad:
            self._retained.append(ref(args[0]))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def kept_quiet(self) -> Iterator[None]:
        """Let no hook act on passes within the block, which retain no gradients and are not the user's."""
        token, self.quiet = _sweeping.set(True), True
        try:
            yield
        finally:
            self.quiet = False
            _sweeping.reset(token)
            for tensor in [found() for found in self._retained]:
                if tensor is not None:
                    tensor.grad = None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch the hooks on gradients that a model's modules have; those that it registers, only where this is a context."""
        changed = []
        for hooks in _hooks([model], _ON_GRADIENTS):
            for key, hook in hooks.items():
                if is_users(hook):
                    changed.append((hooks, key, hook))
                    hooks[key] = _Unless(self, hook)
        self.registered = bool(changed)
        try:
            yield
        finally:
            for hooks, key, hook in changed:
                if key in hooks:
                    hooks[key] = hook


@contextmanager
def unwatched(function: Any) -> Iterator[None]:
    """Keep the user's hooks on gradients out of calls of a model or loss within the block, and of what follows from them."""
    changed = [hooks for hooks in _hooks([function], _ON_GRADIENTS) if any(map(is_users, hooks.values()))]
    content = [dict(hooks) for hooks in changed]
    for hooks in changed:
        for key in [key for key, hook in hooks.items() if is_users(hook)]:
            del hooks[key]
    try:
        with HookWatch(quiet=True):
            yield
    finally:
        for hooks, before in zip(changed, content, strict=True):
            hooks.clear()
            hooks.update(before)


def _hooks(functions: Iterable[Any], names: Iterable[str]) -> Iterator[dict[int, Any]]:
    """Yield the hooks of some kinds on the modules among functions, on all modules inside them, and on all there are."""
    inside = [module for function in functions if isinstance(function, nn.Module) for module in function.modules()]
    for name in names:
        yield getattr(nn.modules.module, f"_global_{name}")
        yield from (getattr(module, f"_{name}") for module in inside)
