"""Modules that hold several linear maps: attention and recurrent networks, decomposed.

torch runs them in fused kernels that show neither what a linear map inside sees nor the gradient at its output, and of
which some have no batched derivative. Inside a sweep they run in a decomposed form, which calls a `Projection` for
every linear map: a stand-in module with the weight and bias of one map, a layer like any other. A map that is called
several times, as at every step of a recurrent network, is a layer that is used several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """One linear map of a module; weight and bias are those that the module has when it is called.

    Attributes:
        owner: the module.
        part: name of the map.
        locals: where weight and bias are in the module; one without a bias lacks it.
        inner: the stand-in for the same map that this one runs, of a sweep around the one that this is for.
    """

    owner: nn.Module
    inner: Projection | None

    def __init__(self, owner: nn.Module, part: str, names: Mapping[str, str]) -> None:
        super().__init__()
        # Past nn.Module's registration, as the owner is no child.
        object.__setattr__(self, "owner", owner)
        self.run(None)
        self.part, self.locals = part, dict(names)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]`."""
        found: Tensor = attrgetter(self.locals["weight"])(self.owner)
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias `[out]`, if the map has one."""
        found: Tensor | None = attrgetter(self.locals["bias"])(self.owner) if "bias" in self.locals else None
        return found

    def run(self, inner: Projection | None) -> None:
        """Run another stand-in, or none."""
        object.__setattr__(self, "inner", inner)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to the last axis; the first one is the sample."""
        if self.inner is not None:
            found: Tensor = self.inner(x)
            return found
        return F.linear(x, self.weight, self.bias)


Project = Mapping[str, Projection]
"""The projections of a module, by part."""


@dataclass(frozen=True)
class Composite:
    """How a kind of module is decomposed.

    Attributes:
        parts: names of a module's linear maps, and where weight and bias of each are.
        forward: the forward pass, `(module, project, *args, **kwargs)`.
        stand_in: class of the stand-ins.
    """

    parts: Callable[[Any], Mapping[str, Mapping[str, str]]]
    forward: Callable[..., Any]
    stand_in: type[Projection] = Projection

    def projections(self, module: nn.Module) -> Project:
        """Return stand-ins for the module's linear maps."""
        found = self.parts(module)
        return {part: self.stand_in(module, part, names) for part, names in found.items()}


@contextmanager
def decomposed(pairs: Iterable[tuple[Composite, Project]]) -> Iterator[None]:
    """Run modules in decomposed form within the block; in one within another, both see every linear map."""
    with ExitStack() as leave:
        for composite, project in pairs:
            owner = next(iter(project.values())).owner
            around = vars(owner).get("forward")
            for part, stand_in in project.items():
                running = None if around is None else around.args[1][part]
                if running is not stand_in:
                    stand_in.run(running)
                    leave.callback(stand_in.run, None)
            if around is None:
                leave.callback(vars(owner).pop, "forward")
            else:
                leave.callback(setattr, owner, "forward", around)
            owner.forward = partial(composite.forward, owner, project)
        yield
