"""Modules that are not a fixed function of each sample as they stand, and modes of torch under which models are called."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from curvlab.errors import UnsupportedModel
from curvlab.tools.text import what_was_given


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models as the modules that they were made from, as they would run past hooks on layers."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Types of devices for which autocast is looked for."""

_casting = ContextVar[dict[str, torch.dtype]]("casting", default={})  # noqa: B039


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types that tensors have, as products of rows and factors must, whatever autocast is on; see `as_cast`."""
    on = {device: torch.get_autocast_dtype(device) for device in DEVICES if torch.is_autocast_enabled(device)}
    if not on:
        yield
        return
    token = _casting.set(on)
    try:
        with ExitStack() as off:
            for device in on:
                off.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _casting.reset(token)


@contextmanager
def as_cast() -> Iterator[None]:
    """Call a model under the autocast that `without_autocast` has found."""
    with ExitStack() as on:
        for device, dtype in _casting.get().items():
            on.enter_context(torch.autocast(device, dtype=dtype))
        yield


def check_module(model: nn.Module) -> None:
    """Refuse what is no module, and TorchScript, whose parameters are not in dictionaries.

    Raises:
        UnsupportedModel: naming what it is, or the module.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"The model is a torch.nn.Module, got {what_was_given(model)}: pass the module itself, not its parameters, its class "
            "or its outputs."
        )
    modules = model.named_modules()
    scripted = next(
        (name or type(model).__name__ for name, m in modules if isinstance(m, torch.jit.ScriptModule)), None
    )
    if scripted is not None:
        raise UnsupportedModel(
            f"{scripted} is scripted or traced (TorchScript), which hides what happens inside. Use the module in Python that it "
            "was made from, with its state_dict."
        )


def randomness(module: nn.Module) -> str | None:
    """Say what makes a module's output in its present mode depend on chance, on the batch or on earlier calls, if any."""
    if not module.training:
        return None
    if _drop_rate(module) > 0:
        return "it drops at random"
    if isinstance(module, nn.RReLU) and module.lower < module.upper:
        return "it draws slopes at random"
    if isinstance(module, _BatchNorm):
        return "it normalises by the statistics of the batch"
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "every call changes its running statistics"
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks):
        return "every call takes a step of power iteration"
    return None


def _drop_rate(module: nn.Module) -> float:
    rate = 0.0
    if isinstance(module, _DropoutNd):
        rate = module.p
    elif isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and module.num_layers > 1):
        rate = module.dropout
    return rate


RandomState = Mapping[torch.device, Tensor]
"""States of random number generators by device."""


def random_state(model: nn.Module) -> RandomState:
    """Return the states from which a pass of the model draws; none in evaluation mode."""
    if not any(module.training for module in model.modules()):
        return {}
    devices = {torch.device("cpu"), *(p.device for p in model.parameters())}
    return {device: _module(device).get_rng_state(*_index(device)) for device in devices}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and every module in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def replayed(states: RandomState) -> Iterator[None]:
    """Let passes draw from given states, and afterwards on from where generators were."""
    before = {device: _module(device).get_rng_state(*_index(device)) for device in states}
    try:
        for device, state in states.items():
            _module(device).set_rng_state(state, *_index(device))
        yield
    finally:
        for device, state in before.items():
            _module(device).set_rng_state(state, *_index(device))


def _module(device: torch.device) -> Any:
    return torch if device.type == "cpu" else getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return (device,) if device.type in ("cuda", "xpu") else ()
