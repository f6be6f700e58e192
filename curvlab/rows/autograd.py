"""The autograd engine: rows of any architecture by hooks and batched reverse passes.

The forward pass records, for every layer in the table, its inputs and the edge of the graph at its output; one batched
`torch.autograd.grad` then brings the cotangents to those edges. Parameters that are used elsewhere, or in a layer whose
inputs have no sample axis in front, get dense rows per sample by `torch.func` (functorch, now part of torch).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from curvlab.errors import UnsupportedModel
from curvlab.nn.functional import called_with
from curvlab.nn.hooks import has_forward_hooks, unwatched
from curvlab.nn.linearize import differentiable_attention
from curvlab.rows.graph_signature import GraphSignature, Signatures, deepest, signature_of
from curvlab.rows.layer import DenseRows, LayerRows
from curvlab.rows.owners import Owner, decomposing, owners_of, trainable
from curvlab.rows.packed import is_packed, length, taken
from curvlab.rows.passes import ModelInputs
from curvlab.rows.products import chunks
from curvlab.rows.record import Call, Recorder, form
from curvlab.rows.spread import Observed, Shared, learn, repeats, spread
from curvlab.rows.sweep import (
    Arguments,
    MakeCotangents,
    PickOutput,
    SweepResult,
    in_parameter_order,
    left_as_found,
    select_output,
    unhooked,
)

logger = logging.getLogger("curvlab")

MESSAGES = 8
"""Elements of messages along the edges of a graph relative to those of the largest output of a layer, at a guess."""

FIXED = (
    ". The model was traced: if it was exported, do so for any number of samples, with dynamic_shapes=({0: "
    "torch.export.Dim('N')},), or use the module that it was exported from, whose layers have factored rows."
)
"""What helps a graph of operations that was recorded for one number of samples."""


def sweep(
    model: nn.Module,
    inputs: ModelInputs,
    make_cotangents: MakeCotangents,
    known: Signatures,
    shared: Shared,
    without: Collection[str] = (),
) -> SweepResult:
    """Propagate the cotangents through the model and keep the rows factored, but for parameters named in `without`.

    What its graph tells is looked up in `known`, or added; layers that all samples share in `shared`, see `curvlab.rows.spread`.

    Raises:
        UnsupportedModel: naming the layer and the remedy.
    """
    with prepared(model, inputs, make_cotangents, known, shared, without) as forward:
        layers, graph_signature = forward.layers()
        graph = None if graph_signature.unknown is None else forward.z
        in_order = in_parameter_order(trainable(model), layers)
        return SweepResult(forward.chosen.detach(), forward.cotangents, in_order, graph_signature, graph)


@contextmanager
def prepared(
    model: nn.Module,
    inputs: ModelInputs,
    make_cotangents: MakeCotangents,
    known: Signatures,
    shared: Shared,
    without: Collection[str] = (),
) -> Iterator[Forward]:
    """Run the forward pass of a sweep; within the block, cotangents can go back through it. See `sweep`."""
    owners = owners_of(model)
    samples = inputs.samples
    with decomposing(model, owners), differentiable_attention(), ExitStack() as leave:
        ruled = [o for o in owners if o.ruled and not set(without) & set(o.names.values())]
        recorder, chosen, z = _called(model, inputs, ruled, shared, leave)
        signature = signature_of(z, recorder.made, trainable(model), samples.along_first(len(z)), known)
        of_all = recorder.shared(samples, len(z), signature)

        def call() -> list[Tensor]:
            with left_as_found(model), unwatched(model):
                return [inputs.outputs(model)]

        repeated = learn(shared, call, Observed([chosen], recorder), ruled, samples, of_all)
        if repeated:
            leave.close()
            recorder, chosen, z = _called(model, inputs, ruled, shared, leave)
            signature = signature_of(z, recorder.made, trainable(model), samples.along_first(len(z)), known)
        N = len(z)
        factored = recorder.calls(samples, N, signature)
        others = [owner for owner in owners if owner not in factored]
        yield Forward(model, inputs, chosen, z, make_cotangents(chosen.detach()), signature, factored, others, repeated)


def _called(
    model: nn.Module, inputs: ModelInputs, ruled: Sequence[Owner], shared: Shared, leave: ExitStack
) -> tuple[Recorder, Tensor, Tensor]:
    """Call a model; returns what the layers of owners were called on, the chosen outputs, and these in the layout of rows.

    Until `leave` is closed, the graph holds the calls, which hold the graph.
    """
    recorder, samples = Recorder(ruled), inputs.samples

    def on_call(call: Call, output: Tensor) -> None:
        if output.requires_grad:
            leave.callback(output.register_hook(call.take_if_awaited).remove)

    with spread(repeats(ruled, shared), samples.before), ExitStack() as hooks:
        for handle in recorder.hook(on_call):
            hooks.callback(handle.remove)
        with torch.enable_grad(), unwatched(model):
            chosen = inputs.outputs(model)
            return recorder, chosen, samples.lay_out(chosen)


@dataclass(frozen=True)
class Forward:
    """A forward pass, through whose graph cotangents can go back.

    Attributes:
        model: the model.
        inputs: what it was called on.
        chosen: outputs that carry rows, as the loss takes them.
        z: these in the layout of rows.
        cotangents: rows at the outputs.
        signature: what the graph tells.
        factored: the calls of every owner with factored rows.
        others: owners whose rows are formed otherwise.
        repeated: whether another pass is known to have returned the same.
    """

    model: nn.Module
    inputs: ModelInputs
    chosen: Tensor
    z: Tensor
    cotangents: Float[Tensor, "V N C ..."]
    signature: GraphSignature
    factored: Mapping[Owner, Sequence[Call]]
    others: Sequence[Owner]
    repeated: bool

    @property
    def calls(self) -> list[Call]:
        """Those of all factored layers, each once."""
        return list(dict.fromkeys(call for own in self.factored.values() for call in own))

    def layers(self) -> tuple[list[LayerRows], GraphSignature]:
        """Return the rows of all layers, and what is known of the pass now."""
        z, samples, cotangents, signature = self.z, self.inputs.samples, self.cotangents, self.signature
        edges = [call.edge for call in self.calls]
        if samples.interact:
            largest = max((call.shape.numel() for call in self.calls), default=1)
            pieces = chunks(len(cotangents), MESSAGES * largest)
            gradients, dense = backward_over_graphs(z, edges, cotangents, self.others, pieces)
        else:
            dense = []
            if self.others:
                label = self.others[0].label
                signature = replace(signature, unknown=f"{label}, whose rows are formed by calls on single samples")
                at_output = cotangents_at(self.chosen, z, cotangents)
                arguments, pick = self.inputs.arguments, self.inputs.output
                dense = dense_rows(self.model, arguments, pick, self.chosen.detach(), at_output, len(z), self.others)
            gradients = backward(z, edges, cotangents, keep=signature.unknown is not None)
        at = {call: self._or_zero(call, g) for call, g in zip(self.calls, gradients, strict=True)}
        layers = [self._form(owner, {call: at[call] for call in own}) for owner, own in self.factored.items()]
        return [*layers, *dense], signature

    @property
    def streams(self) -> bool:
        """Whether rows can be taken layer by layer: one a sample, of samples that stay apart, all of them factored."""
        return len(self.cotangents) == 1 and not self.others and not self.inputs.samples.interact

    def stream(self, take: Callable[[LayerRows], None], *, keep: bool) -> None:
        """Hand on the rows of every layer as soon as the reverse pass has reached it, and forget them.

        Args:
            take: called with the rows of one layer after the other.
            keep: whether another pass through the graph follows; what layers were called on is kept, too.
        """
        waiting = {owner: len(own) for owner, own in self.factored.items()}
        users: dict[Call, list[Owner]] = {}
        for owner, own in self.factored.items():
            for call in own:
                users.setdefault(call, []).append(owner)

        def arrived(call: Call) -> None:
            for owner in users[call]:
                waiting[owner] -= 1
                if waiting[owner] == 0:
                    hand_on(owner)

        def hand_on(owner: Owner) -> None:
            own = self.factored[owner]
            take(
                self._form(owner, {c: self._or_zero(c, None if c.gradient is None else c.gradient[None]) for c in own})
            )
            del waiting[owner]
            for call in own:
                if all(other not in waiting for other in users[call]):
                    call.forget(inputs=not keep)

        for call in users:
            call.arrived = arrived
        try:
            edges = deepest([call.edge for call in users if call.edge is not None])
            # What is returned has arrived.
            backward(self.z, edges, self.cotangents, keep=keep)
            for owner in list(waiting):
                hand_on(owner)
        finally:
            for call in users:
                call.arrived = None

    def _or_zero(self, call: Call, gradient: Tensor | None) -> Tensor:
        return self.cotangents.new_zeros(len(self.cotangents), *call.shape) if gradient is None else gradient

    def _form(self, owner: Owner, gradients: Mapping[Call, Tensor]) -> LayerRows:
        return form(owner, gradients, self.inputs.samples, len(self.z))


def backward(
    z: Tensor, edges: Sequence[GradientEdge | Tensor | None], cotangents: Tensor, *, keep: bool = False
) -> list[Tensor | None]:
    """Bring the cotangents to the edges, all rows in one pass; a single one as autograd's own, without a batch of one.

    One row after the other where torch cannot vectorise a layer's reverse pass, as that of a GroupNorm on channels-last data.
    """
    reached: Any = [edge for edge in edges if edge is not None]
    if not reached or not z.requires_grad:
        return [None for _ in edges]

    def pulled(cotangents: Tensor, *, batched: bool, keep: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            z, reached, cotangents, is_grads_batched=batched, allow_unused=True, retain_graph=keep
        )
        return found

    with unhooked(reached), _named_checkpoints():
        if len(cotangents) == 1:
            found = [None if g is None else g[None] for g in pulled(cotangents[0], batched=False, keep=keep)]
        else:
            try:
                found = list(pulled(cotangents, batched=True, keep=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.info("One row after the other, as torch cannot vectorise the reverse pass: %s", error)
                rows = [pulled(cotangent, batched=False, keep=True) for cotangent in cotangents]
                arrived = ([g for g in of_edge if g is not None] for of_edge in zip(*rows, strict=True))
                found = [torch.stack(gradients) if gradients else None for gradients in arrived]
    at_edge = iter(found)
    return [None if edge is None else next(at_edge) for edge in edges]


def cotangents_at(
    output: Float[Tensor, "M ..."], z: Float[Tensor, "N C ..."], cotangents: Float[Tensor, "V N C ..."]
) -> Float[Tensor, "V M ..."]:
    """Bring cotangents to an output of which z is a part, or another layout."""
    if z is output:
        return cotangents
    (found,) = backward(z, [output], cotangents, keep=True)
    return cotangents.new_zeros(len(cotangents), *output.shape) if found is None else found


@contextmanager
def _named_checkpoints() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise UnsupportedModel(
            "The model checkpoints activations with use_reentrant=True, through which torch brings no gradients to single "
            "layers. Call torch.utils.checkpoint.checkpoint with use_reentrant=False."
        ) from error


def backward_over_graphs(
    z: Tensor, edges: Sequence[GradientEdge | None], cotangents: Tensor, others: Sequence[Owner], parts: Iterable[slice]
) -> tuple[list[Tensor | None], list[LayerRows]]:
    """Bring the cotangents to the edges, some rows at a time, and form the rows of parameters without a factored form.

    Those take a reverse pass a graph, which for one graph is the same. Memory `R·P` of them.
    """
    parts = list(parts)
    parameters: list[Tensor] = [getattr(owner.module, local) for owner in others for local in owner.names]

    def bring(z: Tensor, to: Sequence[GradientEdge | Tensor | None], cotangents: Tensor) -> list[Tensor | None]:
        found = [backward(z, to, cotangents[part], keep=True) for part in parts]
        return [
            torch.cat(pieces) if (pieces := [g for g in gs if g is not None]) else None
            for gs in zip(*found, strict=True)
        ]

    first = bring(z, [*edges, *parameters] if len(z) == 1 else edges, cotangents)
    found = [first[len(edges) :]] if len(z) == 1 else [bring(z[n], parameters, cotangents[:, n]) for n in range(len(z))]
    names = [name for owner in others for name in owner.names.values()]
    rows = {
        name: torch.stack(
            [cotangents.new_zeros(len(cotangents), *p.shape) if g is None else g for g in gradients], dim=1
        )
        for name, p, gradients in zip(names, parameters, zip(*found, strict=True), strict=True)
    }
    return first[: len(edges)], [_as_dense(owner, rows, cotangents) for owner in others]


def dense_rows(
    model: nn.Module,
    arguments: Arguments,
    pick: PickOutput,
    output: Float[Tensor, "M ..."],
    cotangents: Float[Tensor, "V M ..."],
    samples: int,
    owners: Sequence[Owner],
) -> list[LayerRows]:
    """Rows of single samples, for parameters without a factored form. Memory `R·P` of those.

    All samples at once by `torch.func`, or one after the other if it cannot vectorise the model. Tensors among the
    arguments that do not have N entries are shared by all samples; one that has by chance, if the outputs say so.

    Args:
        model: the model.
        arguments: that it was called on.
        pick: which output.
        output: what it returned.
        cotangents: rows there.
        samples: their number N, of which the output holds one after the other.
        owners: those of the parameters.

    Raises:
        UnsupportedModel: if the model cannot be called on single samples.
    """
    names = ", ".join(name for owner in owners for name in owner.names.values())
    first: dict[str, Tensor] | None = None
    failure: Exception | None = None
    if len(output) % samples:
        raise UnsupportedModel(
            f"The parameters {names} have no factored rows, and the model's output has {len(output)} entries along its first "
            f"axis, which are no equal number for each of {samples} samples. Make the first axis the sample; give positions "
            "that do not count a weight of zero, as by ignore_index, instead of leaving them out."
        )
    z, cotangents = output.unflatten(0, (samples, -1)), cotangents.unflatten(1, (samples, -1))
    for split in _splits(arguments, samples):
        try:
            outputs, rows = _of_samples(model, split, pick, cotangents, owners, names)
        except Exception as error:
            failure = failure or error
            continue
        if _alike(outputs, z):
            return [_as_dense(owner, rows, cotangents) for owner in owners]
        first = rows if first is None else first
    if first is None:
        remedy = FIXED if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()) else ""
        raise UnsupportedModel(
            f"The parameters {names} have no factored rows, and dense ones could not be formed by calling the model "
            f"on single samples, which the first axis of all inputs and outputs must number: {failure}{remedy}"
        ) from failure
    return [_as_dense(owner, first, cotangents) for owner in owners]


@dataclass(frozen=True)
class _Split:
    """Arguments, flattened, and which of them hold something of every sample on their first axis."""

    leaves: list[Any]
    structure: TreeSpec
    of_samples: tuple[bool, ...]

    def sample(self, n: int) -> Arguments:
        """Return the arguments of one sample."""
        return self.joined(
            [taken(x, slice(n, n + 1)) if own else x for x, own in zip(self.leaves, self.of_samples, strict=True)]
        )

    def joined(self, leaves: Iterable[Any]) -> Arguments:
        """Return leaves as arguments."""
        found: Arguments = tree_unflatten(leaves, self.structure)
        return found


def _splits(arguments: Arguments, N: int) -> Iterator[_Split]:
    """Yield the ways to tell samples' tensors from shared ones: all that can be samples', then all but one."""
    leaves, structure = tree_flatten(arguments, is_leaf=is_packed)
    may = tuple(length(x) == N for x in leaves)
    yield _Split(leaves, structure, may)
    if N > 1 and sum(may) > 1:
        for k in reversed([k for k, own in enumerate(may) if own]):
            yield _Split(leaves, structure, (*may[:k], False, *may[k + 1 :]))


def _alike(outputs: Tensor, z: Tensor) -> bool:
    """Whether outputs of single samples are those of the batch."""
    close = torch.finfo(z.dtype).eps ** 0.5
    return outputs.shape == z.shape and float((outputs - z).norm()) <= close * float(z.norm())


def _of_samples(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner], names: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return outputs `[N, K, …]`, K being the entries of a sample, and gradients `[V, N, *shape]` by name."""
    if has_forward_hooks(model):
        # Under torch.func it might store a tensor that is dead afterwards.
        logger.info("Rows of %s by one sample after the other, as the model has hooks.", names)
        return _one_by_one(model, split, pick, cotangents, owners)
    try:
        return _vectorised(model, split, pick, cotangents, owners)
    except Exception as error:
        logger.info("Rows of %s by one sample after the other, as torch.func failed: %s", names, error)
        return _one_by_one(model, split, pick, cotangents, owners)


def _vectorised(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner]
) -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = [name for owner in owners for name in owner.names.values()]
    own = [x for x, of_samples in zip(split.leaves, split.of_samples, strict=True) if of_samples]

    def of_sample(sample: list[Tensor], cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = iter(sample)
        leaves = [
            next(found)[None] if of_samples else x for x, of_samples in zip(split.leaves, split.of_samples, strict=True)
        ]
        args, kwargs = split.joined(leaves)

        def output(parameters: dict[str, Tensor]) -> Tensor:
            return select_output(called_with(model, {**values, **parameters}, args, kwargs), pick)

        pulled = vjp(output, {name: values[name] for name in names})
        return pulled[0], pulled[1](cotangent)[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        # Samples inside rows: in the other order torch's rule of PReLU gives an axis too many.
        z, rows = vmap(lambda row: vmap(of_sample)(own, row))(cotangents)
    return z[0], rows


def _one_by_one(
    model: nn.Module, split: _Split, pick: PickOutput, cotangents: Tensor, owners: Sequence[Owner]
) -> tuple[Tensor, dict[str, Tensor]]:
    parameters: dict[str, Tensor] = {
        name: getattr(owner.module, local) for owner in owners for local, name in owner.names.items()
    }
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    outputs = []
    for n in range(cotangents.shape[1]):
        args, kwargs = split.sample(n)
        with torch.enable_grad(), unwatched(model):
            z = select_output(model(*args, **kwargs), pick)
        outputs.append(z.detach())
        for (name, p), g in zip(
            parameters.items(), backward(z, list(parameters.values()), cotangents[:, n]), strict=True
        ):
            found[name].append(cotangents.new_zeros(len(cotangents), *p.shape) if g is None else g)
    return torch.stack(outputs), {name: torch.stack(rows, dim=1) for name, rows in found.items()}


def _as_dense(owner: Owner, rows: dict[str, Tensor], cotangents: Tensor) -> LayerRows:
    """Lay out gradients `[V, N, *shape]` of an owner's parameters."""
    layout = owner.layout
    joined = layout.join({name: rows[name].flatten(0, 1) for name in layout.names})
    return DenseRows(owner.name, layout, joined.view(*cotangents.shape[:2], layout.units, layout.width))
