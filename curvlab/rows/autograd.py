"""The autograd engine: rows of any architecture by hooks and batched reverse passes.

The forward pass records, for every layer in the table, its inputs and the edge of the graph at its output; one batched
`torch.autograd.grad` then brings the cotangents to those edges. Parameters that are used elsewhere, or in a layer whose
inputs have no sample axis in front, get dense rows per sample by `torch.func` (functorch, now part of torch).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from curvlab.nn.hooks import unwatched
from curvlab.nn.linearize import differentiable_attention
from curvlab.rows.broadcast import Broadcast, broadcast
from curvlab.rows.graph_signature import GraphSignature, deepest, signature_of
from curvlab.rows.layer import LayerRows
from curvlab.rows.owners import Owner, decomposing, owners_of, trainable
from curvlab.rows.passes import ModelInputs
from curvlab.rows.products import chunks
from curvlab.rows.record import Call, Recorder, form
from curvlab.rows.reverse import backward, cotangents_at
from curvlab.rows.single_samples import as_dense, dense_rows
from curvlab.rows.spread import Known, Observed, Shared, learn, repeats, spread
from curvlab.rows.sweep import (
    MakeCotangents,
    SweepResult,
    in_parameter_order,
    left_as_found,
)

logger = logging.getLogger("curvlab")

MESSAGES = 8
"""Elements of messages along the edges of a graph relative to those of the largest output of a layer, at a guess."""


def sweep(
    model: nn.Module,
    inputs: ModelInputs,
    make_cotangents: MakeCotangents,
    known: Known,
    without: Collection[str] = (),
) -> SweepResult:
    """Propagate the cotangents through the model and keep the rows factored, but for parameters named in `without`.

    What its graph tells, and layers that all samples share (`curvlab.rows.spread`), are looked up in `known`, or added.

    Raises:
        UnsupportedModel: naming the layer and the remedy.
    """
    with prepared(model, inputs, make_cotangents, known, without) as forward:
        layers, graph_signature = forward.layers()
        graph = None if graph_signature.unknown is None else forward.z
        in_order = in_parameter_order(trainable(model), layers)
        return SweepResult(forward.chosen.detach(), forward.cotangents, in_order, graph_signature, graph)


@contextmanager
def prepared(
    model: nn.Module,
    inputs: ModelInputs,
    make_cotangents: MakeCotangents,
    known: Known,
    without: Collection[str] = (),
) -> Iterator[Forward]:
    """Run the forward pass of a sweep; within the block, cotangents can go back through it. See `sweep`."""
    owners = owners_of(model)
    samples = inputs.samples
    with decomposing(model, owners), differentiable_attention(fused=inputs.plain), ExitStack() as leave:
        ruled = [o for o in owners if o.ruled and not set(without) & set(o.names.values())]
        recorder, chosen, z = _called(model, inputs, ruled, known.shared, leave)
        signature = signature_of(z, recorder.made, trainable(model), samples.along_first(len(z)), known.signatures)
        of_all = recorder.shared(samples, len(z), signature)

        def call() -> list[Tensor]:
            with left_as_found(model), unwatched(model):
                return [inputs.outputs(model)]

        repeated = learn(known.shared, call, Observed([chosen], recorder), ruled, samples, of_all)
        if repeated:
            leave.close()
            recorder, chosen, z = _called(model, inputs, ruled, known.shared, leave)
            signature = signature_of(z, recorder.made, trainable(model), samples.along_first(len(z)), known.signatures)
        N = len(z)
        factored = recorder.calls(samples, N, signature)
        others = [owner for owner in owners if owner not in factored]
        may = [] if samples.interact else [o for o in others if not set(without) & set(o.names.values())]
        shared = broadcast(z, may)
        others = [owner for owner in others if owner not in shared.owners]
        cotangents = make_cotangents(chosen.detach())
        yield Forward(model, inputs, chosen, z, cotangents, signature, factored, shared, others, repeated)


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
        shared: owners whose parameters all samples share by broadcasting.
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
    shared: Broadcast
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
            gradients, shared = self._brought(edges, cotangents, keep=signature.unknown is not None)
            dense = [*shared, *dense]
        at = {call: self._or_zero(call, g, cotangents) for call, g in zip(self.calls, gradients, strict=True)}
        layers = [self._form(owner, {call: at[call] for call in own}) for owner, own in self.factored.items()]
        return [*layers, *dense], signature

    @property
    def streams(self) -> bool:
        """Whether rows can be taken layer by layer: of samples that stay apart, none by calls of the model."""
        return not self.others and not self.inputs.samples.interact

    def groups(self) -> list[slice]:
        """Cut the rows v so that the gradients at all layers of those that are brought there at once stay small, if they can."""
        return list(chunks(len(self.cotangents), sum(call.shape.numel() for call in self.calls)))

    def stream(self, rows: slice, take: Callable[[LayerRows], None], *, keep: bool) -> None:
        """Hand on some rows of one layer after the other, and forget them; a single one as the reverse pass reaches each.

        Args:
            rows: which ones, a slice of v.
            take: called with the rows of a layer.
            keep: whether another pass through the graph follows; what layers were called on is kept, too.
        """
        cotangents = self.cotangents[rows]
        if len(cotangents) == 1:
            self._stream_single(cotangents, take, keep=keep)
            return
        gradients, shared = self._brought([call.edge for call in self.calls], cotangents, keep=keep)
        at = dict(zip(self.calls, gradients, strict=True))
        for layer in shared:
            take(layer)
        users = Counter(call for own in self.factored.values() for call in own)
        for owner, own in self.factored.items():
            take(self._form(owner, {call: self._or_zero(call, at[call], cotangents) for call in own}, defer=True))
            users.subtract(own)
            for call in own:
                if users[call] == 0:
                    del at[call]
                    call.forget(inputs=not keep)

    def _stream_single(self, cotangents: Tensor, take: Callable[[LayerRows], None], *, keep: bool) -> None:
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
            brought = {call: None if call.gradient is None else call.gradient[None] for call in own}
            gradients = {call: self._or_zero(call, g, cotangents) for call, g in brought.items()}
            take(self._form(owner, gradients, defer=True))
            del waiting[owner]
            for call in own:
                if all(other not in waiting for other in users[call]):
                    call.forget(inputs=not keep)

        for call in users:
            call.arrived = arrived
        try:
            edges = deepest([call.edge for call in users if call.edge is not None])
            # What is returned for layers has arrived.
            _, shared = self._brought(edges, cotangents, keep=keep)
            for owner in list(waiting):
                hand_on(owner)
            for layer in shared:
                take(layer)
        finally:
            for call in users:
                call.arrived = None

    def _brought(
        self, edges: Sequence[GradientEdge | None], cotangents: Tensor, *, keep: bool
    ) -> tuple[list[Tensor | None], list[LayerRows]]:
        """Bring cotangents to the edges; return what arrives there, and the rows of what all samples share."""
        keep = keep or bool(self.shared.owners)
        arrived = backward(self.z, [*edges, *self.shared.ends], cotangents, keep=keep)
        return arrived[: len(edges)], self.shared.form(arrived[len(edges) :], cotangents)

    @staticmethod
    def _or_zero(call: Call, gradient: Tensor | None, cotangents: Tensor) -> Tensor:
        return cotangents.new_zeros(len(cotangents), *call.shape) if gradient is None else gradient

    def _form(self, owner: Owner, gradients: Mapping[Call, Tensor], *, defer: bool = False) -> LayerRows:
        return form(owner, gradients, self.inputs.samples, len(self.z), defer=defer)


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
    return first[: len(edges)], [as_dense(owner, rows, cotangents) for owner in others]
