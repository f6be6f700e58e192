"""Which module owns a parameter, which modules use it, and which are not fixed functions of a sample."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from curvlab.errors import UnsupportedModel
from curvlab.nn.modes import check_module, randomness
from curvlab.rows.modules import (
    OWN,
    Composite,
    LayerUse,
    Names,
    Project,
    Projection,
    composite_for,
    decomposed,
    layout_of,
    rule_for,
)
from curvlab.rows.parameters import Layout


@dataclass(frozen=True, eq=False)
class Owner:
    """A module with trainable parameters of its own, which form one block.

    Attributes:
        module: the module, or the stand-in for a linear map inside one.
        name: its name in the model, empty for the model itself.
        names: local names of its trainable parameters to their names in the model; a tied parameter is listed by its
            first owner only.
        layout: how these are laid out in units.
        uses: the modules that use any of them, itself included.
    """

    module: nn.Module
    name: str
    names: Names
    layout: Layout
    uses: Sequence[LayerUse]

    @property
    def label(self) -> str:
        """The names of its parameters, as messages list them."""
        return ", ".join(self.names.values())

    @property
    def ruled(self) -> bool:
        """Whether all modules that use its parameters have rules."""
        return all(rule_for(use.module) is not None for use in self.uses)

    @property
    def calls_layers(self) -> bool:
        """Whether its rows take calls of a layer of somebody's own, with the numbers of its parameters."""
        return any(rule_for(use.module) is OWN for use in self.uses)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, in `named_parameters()` order.

    Raises:
        UnsupportedModel: for what is no module, if there are none, a lazy module has not made its own yet, they have no numbers
            or complex ones, and for compiled TorchScript.
    """
    check_module(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UnsupportedModel("The model has no trainable parameter: set requires_grad on those to analyse.")
    unborn = [name for name, p in parameters.items() if isinstance(p, UninitializedParameter)]
    if unborn:
        raise UnsupportedModel(f"{', '.join(unborn)} have no shape yet: call the model on a batch first.")
    complex_ = [name for name, p in parameters.items() if p.is_complex()]
    if complex_:
        raise UnsupportedModel(
            f"{', '.join(complex_)} are complex: curvature is that of real parameters. Keep real and imaginary part, as of "
            "torch.view_as_real, and join them in forward."
        )
    empty = [name for name, p in parameters.items() if p.is_meta]
    if empty:
        raise UnsupportedModel(
            f"{', '.join(empty)} are on the meta device and have no numbers: call model.to_empty(device=…) and load a state_dict."
        )
    return parameters


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating-point type that holds all entries of several tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def owners_of(model: nn.Module, *, fixed: bool = True, without: Collection[str] = ()) -> list[Owner]:
    """List the modules that own trainable parameters, in the order of the parameters.

    Args:
        model: any module.
        fixed: whether to refuse modules in training mode that make the model random or let samples interact.
        without: names of parameters to leave out.

    Raises:
        UnsupportedModel: if a module cannot be treated in its mode or with its options.
    """
    names = {id(p): name for name, p in trainable(model).items() if name not in without}
    for name, module in model.named_modules():
        if fixed:
            _check_mode(module, name)
        rule = rule_for(module)
        if rule is not None and rule.check is not None:
            rule.check(module, name)
    uses = list(_uses(model, names))
    found: list[Owner] = []
    taken: set[str] = set()
    for use in uses:
        fresh = {local: name for local, name in use.names.items() if name not in taken}
        taken |= set(fresh.values())
        if fresh:
            users = [user for user in uses if not set(fresh.values()).isdisjoint(user.names.values())]
            found.append(Owner(use.module, use.name, fresh, layout_of(use.module, fresh), users))
    return found


def _uses(model: nn.Module, names: dict[int, str]) -> Iterator[LayerUse]:
    """Yield the modules that hold parameters with given names by id; a composite one in place of what it bypasses."""
    bypassed: set[tuple[str, str]] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for part, stand_in in _projections(module).items():
            inside = {prefix + path: local for local, path in stand_in.locals.items()}
            bypassed |= {(path.rpartition(".")[0], path.rpartition(".")[2]) for path in inside}
            own = {k: names[id(p)] for k in stand_in.locals if id(p := getattr(stand_in, k)) in names}
            if own:
                yield LayerUse(stand_in, prefix + part, own, layout_of(stand_in, own))
        left = {
            k: names[id(p)]
            for k, p in module._parameters.items()
            if p is not None and id(p) in names and (name, k) not in bypassed
        }
        if left:
            yield LayerUse(module, name, left, layout_of(module, left))


def _projections(module: nn.Module) -> Project:
    composite = composite_for(module)
    return {} if composite is None else composite.projections(module)


def no_rows_beside(coupled: Sequence[str], without: tuple[str, ...]) -> UnsupportedModel:
    """Return the error for parameters without factored rows in a model whose samples interact."""
    return UnsupportedModel(
        f"{', '.join(coupled)} normalise by the batch, so {', '.join(without)}, which have no factored rows, have none at all. "
        f"Call eval() on the former, or leave the latter to the plain gradient: plain={without}."
    )


def no_rows_of_shards(left: Iterable[Owner]) -> UnsupportedModel:
    """Return the error for owners without factored rows in a sharded model."""
    names = tuple(name for owner in left for name in owner.names.values())
    return UnsupportedModel(
        f"The parameters {', '.join(names)} have no factored rows, and others take calls of the model or of a layer on single "
        f"samples, which fully_shard does not allow. Leave them to the plain gradient: plain={names}."
    )


@contextmanager
def decomposing(model: nn.Module, owners: Iterable[Owner]) -> Iterator[None]:
    """Run composite modules in decomposed form, with the stand-ins of owners where there are any."""
    known = {
        (use.module.owner, use.module.part): use.module
        for owner in owners
        for use in owner.uses
        if isinstance(use.module, Projection)
    }
    pairs: list[tuple[Composite, Project]] = []
    for module in model.modules():
        composite = composite_for(module)
        if composite is not None:
            project = composite.projections(module)
            pairs.append((composite, {part: known.get((module, part), own) for part, own in project.items()}))
    with decomposed(pairs), contiguous_gradients(model):
        yield


@contextmanager
def contiguous_gradients(model: nn.Module) -> Iterator[None]:
    """Give normalisations gradients in contiguous memory, as torch's backward of one sample is wrong for others."""

    def on_output(_: nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad and len(output) == 1:
            output.register_hook(lambda gradient: gradient.contiguous())

    handles = [m.register_forward_hook(on_output) for m in model.modules() if isinstance(m, _NormBase)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_mode(module: nn.Module, name: str) -> None:
    reason = randomness(module)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} is in training mode, so the model is not a fixed function of each "
            f"sample: {reason}. Call model.eval() first."
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise UnsupportedModel(
            f"{type(module).__name__} {name!r} has no running statistics, so samples interact and rows per sample do "
            "not exist. Build it with track_running_stats=True."
        )
