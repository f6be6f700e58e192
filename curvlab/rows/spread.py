"""Layers that all samples share, such as a table of positions.

What such a layer is called on has no samples on its first axis, so that the gradient at its output is a sum over samples. Where its
input is repeated for every sample, its output has the samples in front; a model that adds it to what has samples anyway, by
broadcasting, computes the same. Then its rows are factored as those of any layer. Whether the model does is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Known:
    """What passes have told of a model.

    Attributes:
        signatures: what their graphs have, by digests.
        shared: layers that all samples share.
        probed: whether a pass of the user's own has been preceded by one that looks for these.
    """

    signatures: Signatures = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)
    probed: bool = False


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


@dataclass(frozen=True)
class Observed:
    """What a forward pass has shown.

    Attributes:
        outputs: what the model returned.
        recorder: has recorded what its layers were called on.
    """

    outputs: Sequence[Tensor]
    recorder: Recorder

    def same_as(self, other: Observed) -> bool:
        """Whether all layers saw the same as in another pass, maybe repeated for every sample, and the model returned it.

        What a model returns alone would not tell, where it ends in a layer of zeros.
        """
        mine, theirs = ([x for call in seen.recorder.made for x in call.inputs] for seen in (self, other))
        return (
            len(self.outputs) == len(other.outputs)
            and len(mine) == len(theirs)
            and all(x.shape == y.shape and _alike(x, y) for x, y in zip(self.outputs, other.outputs, strict=True))
            and all(map(_alike, mine, theirs))
        )


def probe(known: Known, model: nn.Module, arguments: Arguments, owners: Sequence[Owner], samples: Samples) -> None:
    """Find out in a pass of its own, before the first one that counts, which layers all samples share; see `learn`.

    Cost: up to two forward passes, with random numbers of their own.
    """
    known.probed = True
    args, kwargs = arguments
    devices = list({p.device for p in model.parameters() if p.is_cuda})

    def call() -> list[Tensor]:
        with torch.random.fork_rng(devices), left_as_found(model):
            torch.manual_seed(0)
            returned = model(*args, **kwargs)
        leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
        return [x for x in leaves if isinstance(x, Tensor)]

    with torch.enable_grad():
        plain = observed(call, owners)
    N = samples.before()
    outputs = (x for x in plain.outputs if x.is_floating_point() and x.ndim > 1 and samples.count(len(x)) == N)
    z = next(map(samples.lay_out, outputs), None)
    if z is not None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        signature = signature_of(z, plain.recorder.made, parameters, N, known.signatures)
        learn(known.shared, call, plain, owners, samples, plain.recorder.shared(samples, len(z), signature))


def observed(call: Callable[[], list[Tensor]], owners: Sequence[Owner]) -> Observed:
    """Run a forward pass, and record what the layers of owners are called on."""
    recorder = Recorder(owners)
    with ExitStack() as hooks:
        for handle in recorder.hook():
            hooks.callback(handle.remove)
        return Observed(call(), recorder)


def learn(
    shared: Shared,
    call: Callable[[], list[Tensor]],
    plain: Observed,
    owners: Sequence[Owner],
    samples: Samples,
    calls: Sequence[Call],
) -> bool:
    """Find out of which layers that all samples share the inputs can be repeated, one after the other if not of all.

    Args:
        shared: what is known; what is found is added.
        call: calls the model as in the pass that was observed, random numbers included, and returns its outputs.
        plain: that pass.
        owners: those of the layers that are looked at.
        samples: what a sample is.
        calls: of layers that all samples share, one each.

    Returns:
        Whether any was found.

    Cost: a forward pass, one more for each layer if the model does not allow it of all.
    """
    N = samples.before()
    found = {call.use: Repeat.of(call.inputs[0]) for call in calls if call.use.name not in shared}
    if N is None or not found:
        return False

    def allows(tried: Mapping[nn.Module, Repeat]) -> bool:
        try:
            with torch.no_grad(), spread(tried, lambda: N):
                return plain.same_as(observed(call, owners))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # A model can fail in any way where a tensor has an axis more.
            return False

    together = allows({use.module: how for use, how in found.items()})
    for use, how in found.items():
        shared[use.name] = how if together or (len(found) > 1 and allows({use.module: how})) else None
    return any(shared[use.name] is not None for use in found)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another one, repeated for every sample or not."""
    try:
        one = one.detach().expand_as(other)
    except RuntimeError:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=torch.finfo(one.dtype).eps ** 0.5, equal_nan=True)
