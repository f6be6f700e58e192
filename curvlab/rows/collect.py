"""Rows from a forward and a backward pass that the user runs.

`sqrt_fisher` makes a sweep of its own. A training step has made one already: hooks take the layers' inputs from its
forward pass and the gradients at their outputs from its backward pass, and the cotangents of other kinds of rows go through
the graph while it stands. A hook on the loss shows outputs and targets.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import StateError, UnsupportedModel
from curvlab.nn.hooks import HookWatch, is_sweeping
from curvlab.nn.linearize import differentiable_attention
from curvlab.nn.modes import RandomState, eagerly, without_autocast
from curvlab.rows.autograd import backward_over_graphs
from curvlab.rows.broadcast import Broadcast, broadcast
from curvlab.rows.entered import Entered
from curvlab.rows.graph_signature import GraphSignature, signature_of
from curvlab.rows.guard import Anywhere, Checks, compare_with_reverse_pass, refuse, unfactored, without_factors
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import LossTerms, Measure, flat_outputs, identity_cotangents, watching
from curvlab.rows.owners import Owner, decomposing, no_rows_beside, no_rows_of_shards, widest
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.passes import Pass
from curvlab.rows.record import Call, Recorder, form
from curvlab.rows.returned import Returned
from curvlab.rows.reverse import backward
from curvlab.rows.rows import Rows, batch_row
from curvlab.rows.samples import Samples
from curvlab.rows.sharded import is_sharded, reshard
from curvlab.rows.single_samples import dense_rows
from curvlab.rows.spread import probe, repeats, spread
from curvlab.rows.sweep import Arguments, PickOutput, in_parameter_order, select_output
from curvlab.rows.upstream import coefficients, is_single, of_whole_samples, row_scale


class Collector(AbstractContextManager["Collector"]):
    """Collects rows while the user runs one forward and one backward pass; hooks are there for that time only.

    Args:
        model: the model.
        loss: the loss module that will be called on the model's output and the targets.
        owners: the modules whose rows are wanted.
        how: which rows of S; None if only those of the gradient are wanted, which takes no further sweep.
        samples: what a sample is; the first axis of the model's inputs if None.
        checks: what has been compared with a reverse pass so far; what is compared here is added.
        coupled: modules in which samples interact, as in batch normalisation; rows are then those of the batch as it is.
        part: whether the samples are part of a larger batch, so that none of their targets need count.
        output: what the loss is called on, of a structured output, so that it can be found again; see `seen`.
        anywhere: whether a flag is set in any of the processes that run each pass of a sharded model together.
        optional: whether there need be no pass at all.

    Raises:
        StateError: on exit, unless there was one forward pass, one call of the loss and one backward pass.
        UnsupportedModel: for a parameter that has no rows here, and for rows that are wrong.

    Cost beyond the two passes: nothing for `empirical` rows of a loss with one term a sample; for `mc` a backward pass to
    the outputs of the layers a draw, for `exact` and `ggn` C of them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        owners: Sequence[Owner],
        how: Pass | None,
        *,
        samples: Samples | None = None,
        checks: Checks | None = None,
        coupled: Sequence[str] = (),
        part: bool = False,
        output: PickOutput = None,
        anywhere: Anywhere = bool,
        optional: bool = False,
    ) -> None:
        self.rows: Rows | None = None
        """Rows of S."""
        self.coefficients: Tensor | None = None
        """c `[R]` with `Sᵀc` the gradient of this pass, if the kind of rows determines it."""
        self.cleared = False
        """Whether there were no gradients to add to when the backward pass began."""
        self._model, self._loss, self._owners, self._how = model, loss, owners, how
        self._checks, self._coupled, self._part, self._anywhere = checks or Checks(), coupled, part, anywhere
        self._optional = optional
        self._sharded = is_sharded(model)
        reshard(model)
        self._samples, self._given = samples or Samples(), samples
        names = {name for owner in owners for name in owner.names.values()}
        self.parameters = {name: p for name, p in model.named_parameters() if name in names}
        """Those of the owners."""
        self._used: dict[str, Tensor] = {}  # what stands in for parameters in the pass
        # Half precision is enough for a sweep, not for factorisations.
        self._dtype = torch.promote_types(widest(self.parameters.values()), torch.float32)
        self._space = ParameterSpace({name: p.shape for name, p in self.parameters.items()})
        self._leave = ExitStack()
        self._recorder = Recorder([owner for owner in owners if owner.ruled])
        self._factored: dict[Owner, list[Call]] = {}
        self._shared = Broadcast()
        self._entered: Entered | None = None
        self._z: Tensor | None = None
        self._upstream: Tensor | None = None
        self._output = output
        self._returned = self._picked = Returned.of(())
        self._targets: Any = None
        self._signature = GraphSignature()
        self._kind: Hashable = None
        self._count = 0
        self._terms: LossTerms | None = None
        self.value: Tensor | None = None
        """What the loss returned."""
        self._dense_layers: list[LayerRows] = []
        self._per_sample_gradients: dict[Owner, LayerRows] = {}
        self._propagated: dict[Call, Tensor] = {}
        self._watch, self._watching = HookWatch(), ExitStack()

    def __enter__(self) -> Collector:
        self._leave.enter_context(eagerly())
        self._leave.enter_context(decomposing(self._model, self._owners))
        self._leave.enter_context(self._watch.on(self._model))
        if self._how is not None and not self._how.plain:
            self._leave.enter_context(differentiable_attention())
        handles = [
            self._model.register_forward_pre_hook(self._on_model, with_kwargs=True),
            self._model.register_forward_hook(self._on_output),
            self._loss.register_forward_pre_hook(self._on_loss, with_kwargs=True, prepend=True),
            self._loss.register_forward_hook(self._on_value),
            *self._recorder.hook(self._on_layer, self._is_watching),
        ]
        for handle in handles:
            self._leave.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()
        self._leave.close()
        if kind is None and not (self._optional and self.idle):
            self._finish()

    @property
    def idle(self) -> bool:
        """Whether neither the model nor the loss was called."""
        return self._entered is None and self._z is None

    @property
    def output(self) -> Tensor:
        """What the loss was called on."""
        assert self._z is not None
        return self._z

    @property
    def seen(self) -> tuple[Arguments, Any, bool, torch.Size, RandomState]:
        """Inputs, targets, whether the loss was called on what the model returned, in which shape, and random states before."""
        assert self._z is not None
        assert self._entered is not None
        entered, z = self._entered, self._z
        return entered.unchanged(), self._targets, self._picked.is_what(z), z.shape, entered.random

    @property
    def measure(self) -> Measure:
        """What values of the loss are."""
        assert self._terms is not None
        return self._terms.measure

    @property
    def weight(self) -> Float[Tensor, ""]:
        """Weight of the samples in the loss: 1 for a mean, N for a sum."""
        assert self._terms is not None
        return self._terms.sample_weights.sum() / self._terms.count

    def _is_watching(self) -> bool:
        return torch.is_grad_enabled() and not is_sweeping()

    def _on_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_watching():
            return
        if self._entered is not None:
            raise StateError(
                "The model ran twice in one collecting context. Open a context for each forward and backward pass; "
                "those of several before one step accumulate."
            )
        self._watching.enter_context(self._watch)
        self._entered = Entered.of(self._model, args, kwargs)
        self._samples = self._given or Samples.of(self._entered.arguments)
        self._spread(self._entered.arguments)

    def _spread(self, arguments: Arguments) -> None:
        """Let layers that all samples share see every sample in this pass; looked for among tables only, as positions are."""
        ruled = [owner for owner in self._owners if owner.ruled]
        known, tables = self._checks.known, any(isinstance(owner.module, nn.Embedding) for owner in ruled)
        if tables and not known.probed and self._how is not None and self._samples.before() is not None:
            with self._watch.kept_quiet():
                probe(known, self._model, arguments, ruled, self._samples)
        of_pass = spread(repeats(ruled, known.shared), lambda: self._samples.before() if self._is_watching() else None)
        self._leave.enter_context(of_pass)

    def _on_output(self, _: nn.Module, __: tuple[Any, ...], returned: Any) -> None:
        if self._is_watching():
            self._returned = Returned.of(returned)
            picked = returned if self._output is None else select_output(returned, self._output)
            self._picked = Returned.of(picked)

    def _on_layer(self, call: Call, output: Tensor) -> None:
        if self._sharded:
            self._used |= {name: getattr(call.use.module, local) for local, name in call.use.names.items()}

        def take(gradient: Tensor) -> None:
            if not self._watch.quiet:
                call.gradient = gradient.detach()

        if output.requires_grad:
            # The graph would keep the hook, the hook the collector, and the collector the graph.
            self._leave.callback(output.register_hook(take).remove)

    @watching
    @without_autocast()
    def _on_loss(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_watching():
            return
        if self._z is not None or self._entered is None:
            when = "twice in one collecting context" if self._entered else "before the model in a collecting context"
            given = f"the {type(self._model).__name__} that was given"
            raise StateError(f"The loss was called {when}: open a context, run {given}, then call the loss.")
        self._watching.close()
        by_position = signature(self._loss.forward).bind(*args, **kwargs).arguments.values() if kwargs else args
        outputs, self._targets = by_position
        if not isinstance(outputs, Tensor):
            raise UnsupportedModel(
                f"The loss was called on a {type(outputs).__name__}: call it on one tensor, such as one head of several, or all of "
                "them by torch.cat(heads, 1) with curvlab.nn.MultiTask."
            )
        self._z = outputs
        z = self._z.detach()
        if z.shape[:1] == (0,):
            raise ValueError("The outputs that the loss was called on hold zero samples.")
        self._terms = self._samples.terms(self._loss, z.to(torch.promote_types(z.dtype, self._dtype)), self._targets)
        laid_out = self._samples.lay_out(self._z)
        self._count = len(laid_out)
        if self._how is not None:
            self._read_graph()
        with self._watch.kept_quiet():
            self._take_factored(laid_out)
            self._propagate(laid_out, self._terms)

    @watching
    def _on_value(self, _: nn.Module, __: tuple[Any, ...], value: Tensor) -> None:
        # Only now have all collectors on this loss swept from its outputs.
        if self._is_watching() and self._z is not None:
            self.value = value.detach()
            self._leave.callback(self._z.register_hook(self._on_upstream).remove)

    def _on_upstream(self, gradient: Tensor) -> None:
        if self._watch.quiet:
            return
        if self._upstream is None:
            self.cleared = all(p.grad is None for p in self.parameters.values())
            self._upstream = gradient.detach()
        else:
            self._upstream = self._upstream + gradient.detach()

    def _propagate(self, z: Tensor, terms: LossTerms) -> None:
        """Choose the rows of S at the output, and sweep unless the backward pass will bring them."""
        if self._how is None:
            return
        terms.check(self._how.kind, part=self._part)
        spans = self._how.spans_outputs
        rows = identity_cotangents(flat_outputs(z.detach())) if spans else self._how.at_output(terms)
        cotangents = rows.view(-1, *z.shape).to(z.dtype)
        scales = self._how.kind == "empirical" and (of_whole_samples(self._how) or is_single(self._how, terms))
        # Hooks may change the gradients that the user's own pass brings.
        scales = scales and not self._watch.registered
        checks = self._is_due()
        if checks or not scales:
            self._propagated = self._sweep(z, cotangents)
        self._dense_layers = self._dense(z, cotangents)
        if checks and self._anywhere(bool(wrong := self._wrong(z, cotangents))):
            if self._sharded:
                refuse(wrong or ("a layer in another process",))
            with without_factors(self._model, wrong):
                self._take_factored(z)
                self._dense_layers = self._dense(z, cotangents)
                refuse(self._wrong(z, cotangents))
        if scales:
            # The numbers of a pass do not depend on whether it was checked.
            self._propagated = {}

    def _is_due(self) -> bool:
        """Whether the rows of this pass are to be compared with a reverse pass."""
        assert self._z is not None
        apart = next((owner.label for owner in self._left), None)
        if apart is not None and not self._samples.interact:
            self._signature = replace(
                self._signature, unknown=f"{apart}, whose rows are formed by calls on single samples"
            )
        self._kind = (self._signature.functions, self._z.shape, tuple(call.inputs[0].shape for call in self._calls()))
        return self._anywhere(self._checks.due(self._kind, self._signature, self.parameters))

    def _read_graph(self) -> None:
        assert self._z is not None
        self._signature = signature_of(
            self._z,
            self._recorder.made,
            self._in_pass,
            self._samples.along_first(self._count),
            self._checks.known.signatures,
            coupled=bool(self._coupled),
        )

    @property
    def _in_pass(self) -> dict[str, Tensor]:
        """The parameters as the graph of the pass knows them."""
        return {name: self._used.get(name, p) for name, p in self.parameters.items()}

    @property
    def _left(self) -> list[Owner]:
        """Owners whose rows are formed in neither of the ways by the graph."""
        return [o for o in self._owners if o not in self._factored and o not in self._shared.owners]

    def _take_factored(self, z: Tensor) -> None:
        apart = unfactored(self._model)
        if self._sharded:
            apart = apart.union(*(o.names.values() for o in self._owners if o.calls_layers))
        found = self._recorder.calls(self._samples, self._count, self._signature)
        self._factored = {o: calls for o, calls in found.items() if apart.isdisjoint(o.names.values())}
        without = tuple(name for o in self._owners if o not in self._factored for name in o.names.values())
        if self._coupled and without and self._how is not None:
            raise no_rows_beside(self._coupled, without)
        by_graph = self._how is not None and not (self._samples.interact or self._sharded)
        may = [o for o in self._owners if o not in self._factored and apart.isdisjoint(o.names.values())]
        self._shared = broadcast(z, may if by_graph else [])

    def _wrong(self, z: Tensor, cotangents: Tensor) -> tuple[str, ...]:
        """Return the parameters whose rows do not add up to the gradient."""
        layers = [*self._factored_layers(), *self._dense_layers]
        wrong, verified = compare_with_reverse_pass(
            self._in_pass, z, cotangents, layers, coupled=bool(self._coupled), anywhere=self._anywhere
        )
        if not wrong:
            self._checks.add(self._kind, self._signature, verified)
        return wrong

    def _calls(self) -> list[Call]:
        """The calls of all factored layers, each once."""
        return list(dict.fromkeys(call for calls in self._factored.values() for call in calls))

    def _sweep(self, z: Tensor, cotangents: Tensor) -> dict[Call, Tensor]:
        """Bring cotangents to the layers' outputs."""
        calls = self._calls()
        found = backward(z, [call.edge for call in calls], cotangents, keep=True)
        return {
            call: cotangents.new_zeros(len(cotangents), *call.shape) if g is None else g
            for call, g in zip(calls, found, strict=True)
        }

    def _factored_layers(self) -> list[LayerRows]:
        return [self._rows(owner, self._propagated) for owner in self._factored]

    @without_autocast()
    def _finish(self) -> None:
        if self._entered is None:
            called = f"the {type(self._model).__name__} that was given"
            raise StateError(f"No rows were collected: call {called} in the context, with gradients on, then the loss.")
        if self._z is None or self._terms is None:
            raise StateError(
                f"No rows were collected: call the {type(self._loss).__name__} that was given on the model's output within the "
                "context; another object of its class, or its function in torch.nn.functional, is another loss. A model that makes "
                "its loss from labels among its inputs does not call it: call it on the model's logits and shifted labels, or let "
                "the model call it, as in docs/sequence_models.md."
            )
        if self._upstream is None:
            raise StateError("No rows were collected: call backward() within the context.")
        upstream, self._upstream = self._samples.lay_out(self._upstream), None
        if self._how is not None and not self._propagated:
            scale = row_scale(self._how, self._terms, upstream)
            self._propagated = {call: _scaled(_gradient(call, upstream), scale)[None] for call in self._calls()}
        if self._how is not None:
            self.rows = self._whole(self._how, self._terms, [*self._factored_layers(), *self._dense_layers])
            self.coefficients = None if self._part else coefficients(self._how, self.rows, self._terms, upstream)
        self._picked, self._z = self._picked.detached(self._z), self._z.detach()
        self._returned = self._picked

    def per_sample_gradient(self, name: str) -> LayerRows | None:
        """Return rows that add up to the gradient of this pass, one a sample, of the layer that owns a parameter.

        They share their inputs with `rows`. None for a layer without factored rows.
        """
        owner = next((o for o in self._factored if name in o.names.values()), None)
        if owner is None or self._z is None:
            return None
        if owner not in self._per_sample_gradients:
            self._per_sample_gradients[owner] = self._per_sample_gradient(owner, self._z)
        return self._per_sample_gradients[owner]

    def _per_sample_gradient(self, owner: Owner, z: Tensor) -> LayerRows:
        gradients = {call: _gradient(call, z)[None] for call in self._factored[owner]}
        layer = self._rows(owner, gradients).to(self._dtype)
        mine = next((found for found in self.rows.layers if found.name == owner.name), None) if self.rows else None
        if mine is None or self.rows is None or self.rows.per == "batch":
            return layer
        return layer._with_factors(*mine.sample_factors, *layer.row_factors)

    def _dense(self, z: Tensor, cotangents: Tensor) -> list[LayerRows]:
        """Form the rows of owners without factored ones."""
        formed, left = self._shared.rows(z, cotangents), self._left
        if not left:
            return formed
        if self._sharded:
            raise no_rows_of_shards(left)
        if self._samples.interact:
            return backward_over_graphs(z, [], cotangents, left, [slice(None)])[1]
        found = self._returned.behind(z, cotangents)
        if found is None:
            names = tuple(name for owner in left for name in owner.names.values())
            raise UnsupportedModel(
                f"The parameters {', '.join(names)} have no factored rows, and the loss was not called on one tensor that the "
                f"model returned, or a function of one. Do so, or leave them to the plain gradient: plain={names}."
            )
        assert self._entered is not None
        return [*formed, *dense_rows(self._model, self._entered.unchanged(), *found, len(z), left)]

    def _whole(self, how: Pass, terms: LossTerms, layers: list[LayerRows]) -> Rows:
        rows = Rows(
            layers=in_parameter_order(self.parameters, [layer.to(self._dtype) for layer in layers]),
            space=self._space,
            kind="jacobian" if how.spans_outputs else how.kind,
            count=terms.count,
            terms=terms.terms,
            reduction=terms.reduction,
            sample_weights=terms.sample_weights.to(self._dtype),
            per=how.per,
        )
        if rows.kind != "jacobian":
            return batch_row([rows]) if how.per == "batch" else rows
        root = terms.root().to(rows.dtype)
        weighted = tuple(layer.map_rows(root.apply) for layer in rows.layers)
        base = replace(rows, count=1.0, reduction="none", sample_weights=torch.ones_like(rows.sample_weights))
        return replace(rows, layers=weighted, kind=how.kind, _jacobian=base, root=root)

    def _rows(self, owner: Owner, gradients: Mapping[Call, Float[Tensor, "V N ..."]]) -> LayerRows:
        return form(owner, {call: gradients[call] for call in self._factored[owner]}, self._samples, self._count)


def _gradient(call: Call, like: Tensor) -> Tensor:
    """Return the gradient at a layer's output, zero if none arrived."""
    return like.new_zeros(call.shape) if call.gradient is None else call.gradient


def _scaled(gradient: Float[Tensor, "M ..."], scale: Float[Tensor, " N"]) -> Float[Tensor, "M ..."]:
    """Scale the gradients of every sample, which has an equal number of them, one sample after the other."""
    of_sample = scale.repeat_interleave(len(gradient) // len(scale))
    return gradient * of_sample.to(gradient.dtype).view(-1, *(1,) * (gradient.ndim - 1))
