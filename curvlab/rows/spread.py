"""Layers that all samples share, such as a table of positions.

What such a layer is called on has no samples on its first axis, so that the gradient at its output is a sum over samples. Where its
input is repeated for every sample, its output has the samples in front; a model that adds it to what has samples anyway, by
broadcasting, computes the same. Then its rows are factored as those of any layer. Whether the model does is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curvlab.rows.graph_signature import Signatures, signature_of
from curvlab.rows.owners import Owner
from curvlab.rows.record import Call, Recorder
from curvlab.rows.samples import Samples
from curvlab.rows.sweep import Arguments, left_as_found


@dataclass(frozen=True)
class Repeat:
    """How the input of a layer is repeated for every sample.

    Attributes:
        axes: of an input that all samples share.
        holds_place: whether the first one of them has one entry, in place of the samples.
    """

    axes: int
    holds_place: bool

    @classmethod
    def of(cls, x: Tensor) -> Repeat:
        """Return how an input that all samples share is repeated."""
        return cls(x.ndim, x.ndim > 1 and len(x) == 1)

    def __call__(self, x: Tensor, samples: int) -> Tensor:
        """Repeat an input, unless what it was computed from has been."""
        if x.ndim != self.axes or (self.holds_place and len(x) != 1):
            return x
        return x.expand(samples, *x.shape[self.holds_place :])


Shared = dict[str, Repeat | None]
"""Layers that all samples share, by name, and how their inputs are repeated; None where the model does not allow that."""


@contextmanager
def spread(repeats: Mapping[nn.Module, Repeat], samples: Callable[[], int | None]) -> Iterator[None]:
    """Repeat what modules are called on within the block, once for every sample.

    Args:
        repeats: layers that all samples share.
        samples: their number N when a module is called; None to leave the inputs.
    """

    def on_call(how: Repeat, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        N = samples()
        if N is None:
            return args, kwargs
        if args and isinstance(args[0], Tensor):
            return (how(args[0], N), *args[1:]), kwargs
        return args, {name: how(x, N) if isinstance(x, Tensor) else x for name, x in kwargs.items()}

    handles = [
        module.register_forward_pre_hook(partial(on_call, how), with_kwargs=True) for module, how in repeats.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repeats(owners: Sequence[Owner], shared: Shared) -> dict[nn.Module, Repeat]:
    """Return the layers of owners that are known to allow it, and how their inputs are repeated."""
    uses = [use for owner in owners for use in owner.uses]
    return {use.module: how for use in uses if (how := shared.get(use.name)) is not None}


def probe(
    shared: Shared, model: nn.Module, arguments: Arguments, owners: Sequence[Owner], samples: Samples, known: Signatures
) -> None:
    """Find out in a pass of its own, before the first one that counts, which layers all samples share; see `learn`.

    Cost: up to three forward passes, with random numbers of their own.
    """
    recorder = Recorder(owners)
    with torch.enable_grad():
        returned = _called(model, arguments, recorder)
    N = samples.before()
    outputs = (x for x in returned if x.is_floating_point() and x.ndim > 1 and samples.count(len(x)) == N)
    z = next(outputs, None)
    if z is not None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        signature = signature_of(samples.lay_out(z), recorder.made, parameters, N, known)
        learn(shared, model, arguments, owners, samples, recorder.shared(samples, len(samples.lay_out(z)), signature))


def learn(
    shared: Shared,
    model: nn.Module,
    arguments: Arguments,
    owners: Sequence[Owner],
    samples: Samples,
    calls: Sequence[Call],
) -> bool:
    """Find out of which layers that all samples share the inputs can be repeated, one after the other if not of all.

    Args:
        shared: what is known; what is found is added.
        model: the model.
        arguments: what it was called on.
        owners: those of the layers that are looked at.
        samples: what a sample is.
        calls: of layers that all samples share, one each.

    Returns:
        Whether any was found.
    """
    N = samples.before()
    found = {call.use: Repeat.of(call.inputs[0]) for call in calls if call.use.name not in shared}
    if N is None or not found:
        return False
    together = _allows(model, arguments, owners, {use.module: how for use, how in found.items()}, N)
    for use, how in found.items():
        alone = together or (len(found) > 1 and _allows(model, arguments, owners, {use.module: how}, N))
        shared[use.name] = how if alone else None
    return any(shared[use.name] is not None for use in found)


def _allows(
    model: nn.Module, arguments: Arguments, owners: Sequence[Owner], tried: Mapping[nn.Module, Repeat], samples: int
) -> bool:
    """Whether all layers see the same, and a model returns it, where the inputs of some are repeated for every sample.

    What a model returns alone would not tell, where it ends in a layer of zeros.
    """
    plain, other = Recorder(owners), Recorder(owners)
    with torch.no_grad():
        wanted = _called(model, arguments, plain)
        try:
            with spread(tried, lambda: samples):
                found = _called(model, arguments, other)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # A model can fail in any way where a tensor has an axis more.
            return False
    seen = [[x for call in recorder.made for x in call.inputs] for recorder in (plain, other)]
    return (
        len(wanted) == len(found)
        and len(seen[0]) == len(seen[1])
        and all(x.shape == y.shape and _alike(x, y) for x, y in zip(wanted, found, strict=True))
        and all(map(_alike, *seen))
    )


def _called(model: nn.Module, arguments: Arguments, recorder: Recorder) -> list[Tensor]:
    """Call a model, with the same random numbers every time, and return the tensors in what it returns."""
    args, kwargs = arguments
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), left_as_found(model), ExitStack() as hooks:
        for handle in recorder.hook():
            hooks.callback(handle.remove)
        torch.manual_seed(0)
        returned = model(*args, **kwargs)
    leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
    return [x for x in leaves if isinstance(x, Tensor)]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another one, repeated for every sample or not."""
    try:
        one = one.expand_as(other)
    except RuntimeError:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=torch.finfo(one.dtype).eps ** 0.5, equal_nan=True)
