"""A structure as a preconditioner of any `torch.optim` optimiser.

    with preconditioner.collect():
        loss(model(x), y).backward()
    preconditioner.precondition()      # p.grad ← (F + ρI)⁻¹ p.grad
    optimizer.step()

The rows of S come from the forward and backward pass that the user runs (`curvlab.rows.collect`). The direction is that
of the structure's own `solve`, by the cheapest route that is open (`curvlab.optim.routes`).

Under `torch.distributed`, with `DistributedDataParallel` or `fully_shard` averaging the gradients, every process collects from
its own samples. K-FAC and the diagonal add up their moments, all other structures gather rows; draws are those of one process
with the whole batch. The inverses of Kronecker factors are shared out; under `fully_shard`, so is the whole state.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import KFAC, Structure, make
from curvlab.fisher.power import Damps, check_power
from curvlab.nn.modes import without_autocast
from curvlab.optim.bound import Bound, coupled_modules
from curvlab.optim.gradients import all_finite, interchangeable, masked
from curvlab.optim.hyper import Every, Hyper, Interval, Schedule, whole
from curvlab.optim.passes import Passes
from curvlab.optim.plain import preconditioned
from curvlab.optim.processes import inverses_by, own_share
from curvlab.optim.quadratic import BatchLoss, inner
from curvlab.optim.routes import Step, route_of
from curvlab.optim.sharding import Sharding
from curvlab.optim.skips import Skips
from curvlab.optim.trust import Heard, clip
from curvlab.rows.collect import Collector
from curvlab.rows.guard import Checks
from curvlab.rows.loss import Kind, RowPer, check_loss
from curvlab.rows.loss.terms import weightless
from curvlab.rows.passes import Pass
from curvlab.rows.processes import Processes
from curvlab.rows.rows import Rows, batch_row
from curvlab.rows.samples import Nodes
from curvlab.rows.sharded import own_part, reshard
from curvlab.rows.sweep import PickOutput
from curvlab.tools.shown import changed, line, some
from curvlab.tools.text import as_names

DAMPING = 1e-2
"""ρ unless another is given."""
KL_CLIP = 1e-2
"""Bound of the trust region unless another is given."""


class Preconditioner:
    """Turns gradients into natural gradients.

    Curvature is in the parameters' widest type, in float32 where that is half precision.

    Args:
        model: the model; under `DistributedDataParallel`, its `.module`; after `fully_shard`, if that is applied. Hooks are on it
            within `collect` only.
        loss: the loss module that the training loop calls on the model's output and the targets, flattened or not: in
            `loss(logits.view(-1, C), targets.view(-1))`, positions of a sample have one row as in logits `[N, C, T]`.
        structure: a structure, not updated yet, or its class or a key of `curvlab.fisher.STRUCTURES` for one with default options;
            K-FAC with factored damping, whose inverses are renewed every 10 steps, if None.
        kind: which rows the curvature is made of, as in `curvlab.sqrt_fisher`. "empirical" costs no further sweep, "mc"
            one to the layers' outputs a draw, "exact" and "ggn" C of them.
        draws: random rows of a loss term, for "mc" and for signs.
        rows: what a row stands for, where a sample has several loss terms, see `curvlab.sqrt_fisher`; what is usual for the kind
            if None, but "sample" for "empirical" rows of a structure that adds a sample's rows up. The "batch" is that of the
            step: of all passes before it, in all processes.
        damping: ρ of `F + ρI`, a number or a function of the step.
        power: p of `(F + ρI)^{-p}`; ½ for methods of Adagrad's family.
        damps: "matrix", or "power" for `(F^p + ρI)⁻¹`, as Adam's ε beside the root.
        kl_clip: bound κ of the trust region, a number or a function of the step; None for none. The direction d is scaled by
            min(1, √(κu/dᵀ∇L)), so that its squared length in the metric of F + ρI is at most κ in the unit u of
            `curvlab.optim.trust.unit` (Ba, Grosse & Martens 2017, section 5).
        decay: weight of the state so far when rows are added; `usual_decay` of the structure if None, 0 where it keeps rows.
        refresh_every: steps from one curvature to the next, a number or a function of the step.
        plain: modules or parameters, by name, that keep their plain gradient.
        graph: whether the loss is called on outputs of nodes of one graph, which interact.
        output: which tensor of a structured output the loss is called on, as in `curvlab.sqrt_fisher`; rows are taken where it is
            called, so that only what calls the model again, the quadratic model, needs it.
        seed: seed of the draws.
        patience: steps in a row that may be skipped because something was not finite.

    A loss that explodes nevertheless, to 1000 times the largest of the first three steps, raises FloatingPointError.

    Raises:
        ValueError: for a hyper-parameter out of range, or an unknown name; the nearest is suggested.
        UnsupportedModel: for a loss or layers that have no rows, and for batch normalisation in training mode with a
            structure that is made of rows and not of moments.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        structure: Structure | type[Structure] | str | None = None,
        *,
        kind: Kind = "mc",
        draws: int = 1,
        rows: RowPer | None = None,
        damping: Schedule = DAMPING,
        power: float = 1.0,
        damps: Damps = "matrix",
        kl_clip: Schedule | None = KL_CLIP,
        decay: Schedule | None = None,
        refresh_every: Interval = 1,
        plain: str | Sequence[str] = (),
        graph: bool = False,
        output: PickOutput = None,
        seed: int = 0,
        patience: int = 10,
    ) -> None:
        check_loss(loss)
        self.loss = loss
        self.structure = KFAC(factored_damping=True, invert_every=10) if structure is None else make(structure)
        self._blank = copy.deepcopy(self.structure)
        self.damping = Hyper("damping", damping)
        check_power(power, damps)
        self.power, self.damps = power, damps
        self.kl_clip = None if kl_clip is None else Hyper("kl_clip", kl_clip, open_low=True)
        self.decay = Hyper("decay", self.structure.usual_decay if decay is None else decay, high=1.0)
        self.refresh_every = Every("refresh_every", refresh_every)
        self._skips = Skips(whole("patience", patience))
        self.plain = as_names(plain, "plain")
        self.graph, self.output = graph, output
        self.steps = 0
        self._last_due: int | None = None
        self.heard = Heard()
        self.refresh_seconds = 0.0
        """Time that the last update of the curvature took; on a GPU, that of giving it the work."""
        self._former: Mapping[str, str] | None = None  # names, from when the model has changed until rows are seen
        self._bind(model)
        self._generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        if rows is None and kind == "empirical" and self.structure.joins_positions:
            rows = "sample"
        self.how = Pass(kind, whole("draws", draws), self._generator, share=own_share, rows=rows)

    def _bind(self, model: nn.Module) -> None:
        self._owners = preconditioned(model, self.plain)
        self.model = model
        self._names = {name for owner in self._owners for name in owner.names.values()}
        self._bound = Bound.of(model, self._owners)
        self._passes = Passes()
        self._checks = Checks()
        reshard(model)
        self._sharding = Sharding.of(self.parameters, self._owners, self.structure)
        if self._sharding is not None:
            self.structure.hold(self._sharding.own)
            self._blank.hold(self._sharding.own)

    def rebind(self, model: nn.Module | None = None, names: Mapping[str, str] | None = None) -> None:
        """Precondition a model whose parameters or layers have changed, as a network that has grown.

        Curvature is due in the next step. That of blocks whose parameters have kept their shapes goes on, that of others
        starts anew: see `Structure.rebind`. Steps are counted on.

        Args:
            model: the model as it is now; the one that there is if None.
            names: present names by former names, of parameters that are the same; if None, those that are the very same
                `Parameter`, by whatever name.

        Raises:
            ValueError, UnsupportedModel: see `Preconditioner`; nothing has changed then. And for sharded models.
        """
        if self._sharding is not None:
            raise UnsupportedModel(
                "Layers of a model under fully_shard would change hands with its shapes, which their curvature does not: make a "
                "new Preconditioner."
            )
        former = self._bound.trained
        self._bind(self.model if model is None else model)
        if names is None:
            present = {id(p): name for name, p in self._bound.trained.items()}
            names = {name: present[id(p)] for name, p in former.items() if id(p) in present}
        if self._former is not None:
            names = {old: names[new] for old, new in self._former.items() if new in names}
        self._former = names

    def __repr__(self) -> str:
        return line(self, *self.notes(), **self.options())

    def options(self) -> dict[str, object]:
        """Return the options that a line shows: structure, kind, damping and decay, and what is not as usual."""
        others: dict[str, object] = {"draws": self.how.draws, "rows": self.how.per}
        others |= {"kl_clip": self.kl_clip and self.kl_clip.value, "refresh_every": self.refresh_every.value}
        others |= {"power": self.power, "damps": self.damps}
        others |= {"plain": self.plain, "graph": self.graph, "output": self.output, "patience": self._skips.patience}
        main: dict[str, object] = {"structure": self.structure, "kind": self.how.kind}
        return main | {"damping": self.damping.value, "decay": self.decay.value} | changed(self, others)

    def notes(self) -> list[str]:
        """Return what a line says of the run so far."""
        coupled = coupled_modules(self.model)
        ignored = [f"batch coupling ignored in {some(coupled)}"] if coupled else []
        return [f"{self.steps} steps, {self.skipped} skipped", *ignored]

    @property
    def skipped(self) -> int:
        """Steps that were left out so far, because something was not finite."""
        return self._skips.total

    @property
    def due(self) -> bool:
        """Whether this step takes new curvature."""
        if self._last_due is None or self._former is not None or not self.structure.updated:
            return True
        return self.steps - self._last_due >= self.refresh_every.at(self.steps)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are preconditioned."""
        return {name: p for name, p in self.model.named_parameters() if name in self._names}

    @property
    def held_layers(self) -> list[str]:
        """The first parameters of the layers whose curvature this process has: of all, unless the model is sharded."""
        held = self._names if self._sharding is None else set(self._sharding.own)
        return [first for owner in self._owners if (first := next(iter(owner.names.values()))) in held]

    def collect(self) -> AbstractContextManager[None]:
        """Collect from one forward pass, call of the loss and backward pass; several before a step accumulate.

        A pass that finds no gradients to add to begins anew: passes before it were given up. A factor on the loss, such as 1/k
        for k passes, is one on the gradient alone: the curvature is that of the loss given, of `curvlab.nn.Scaled` with its factor.
        Within a context that is open, this one does nothing.

        Raises:
            StateError: if a pass is missing or one too many, or trainable parameters have changed.
            UnsupportedModel: if rows do not exist; the message names the layers.
        """
        return self._collect(optional=False)

    def run(self, closure: Callable[[], Any]) -> Any:
        """Call a closure that runs a pass, in a collecting context, and return what it returns.

        After passes in contexts of their own it may run none, as the closures of frameworks do.

        Raises:
            StateError, UnsupportedModel: see `collect`.
        """
        with torch.enable_grad(), self._collect(optional=bool(self._passes)):
            return closure()

    def _collect(self, *, optional: bool) -> AbstractContextManager[None]:
        return self._passes.collect(partial(self._collector, optional))

    def _collector(self, optional: bool) -> Collector:
        coupled = coupled_modules(self.model)
        self._bound.check(
            self.model, self.structure, coupled, sharded=self._sharding is not None, by_batch=self.how.per == "batch"
        )
        return Collector(
            self.model,
            self.loss,
            self._owners,
            self.how if self.due else None,
            samples=Nodes(None) if self.graph else None,
            checks=self._checks,
            coupled=coupled,
            part=Processes.present() is not None,
            output=self.output,
            anywhere=bool if self._sharding is None else self._sharding.anywhere,
            optional=optional,
        )

    def precondition(self, scale: Tensor | float | None = None) -> None:
        """Replace gradients by `(F + ρI)⁻¹ grad`: in place, but for tensors that this backward pass has made.

        A step in which rows or gradients, plain ones included, are not finite is skipped: gradients become None, the state
        stays. On a GPU, a step that takes no new curvature does not wait for the device: what it preconditions then becomes 0,
        plain gradients are left as they are, and nothing is counted.

        With a GradScaler, first call its `unscale_`: it looks for gradients that are not finite, and here they become None.

        Args:
            scale: a factor that gradients have and keep, which is nothing to the trust region.

        Raises:
            StateError: if curvature is due and nothing was collected.
            FloatingPointError: if more steps in a row than `patience` were skipped.
        """
        reshard(self.model)
        parameters = self.parameters
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        of_this_pass = self._of_the_pass(gradients)
        bound = None if self.kl_clip is None else self.kl_clip.at(self.steps)
        direction = self._end_step(parameters, gradients)
        if direction is None:
            for parameter in self.model.parameters():
                parameter.grad = None
            return
        if bound is not None and gradients:
            squared = inner(gradients, direction, list(gradients))
            factor = clip(bound, self.heard.unit, squared if scale is None else squared / scale**2)
            direction = {name: step * factor for name, step in direction.items()}
        for name, parameter in parameters.items():
            if parameter.grad is None:
                parameter.grad = direction[name].clone()
            elif of_this_pass and interchangeable(parameter.grad, direction[name]):
                parameter.grad = direction[name]
            else:
                parameter.grad.copy_(direction[name])

    @property
    def batch_loss(self) -> BatchLoss | None:
        """The loss on the batch of this step, if there was one pass.

        Raises:
            UnsupportedModel: for a sharded model, which cannot be called at other parameters.
        """
        if self._sharding is not None:
            raise UnsupportedModel(
                "The quadratic model calls the model at other parameters, which fully_shard does not allow: give numbers or "
                'functions of the step for lr and damping, instead of "quadratic" and LevenbergMarquardt.'
            )
        return BatchLoss(self.model, self.loss, *self._passes[0].seen, self.output) if len(self._passes) == 1 else None

    def direction(
        self, gradients: Mapping[str, Tensor], damping: Callable[[Mapping[str, Tensor]], float] | None = None
    ) -> dict[str, Tensor] | None:
        """Take the curvature that is due, and return `(F + ρI)⁻¹ grad`, None for a step to skip; ends the step.

        Args:
            gradients: by name, in place of those of the parameters; missing ones are 0, those of other parameters ignored.
            damping: returns ρ from the gradients, when the curvature is taken; the preconditioner's own if None.

        Raises:
            StateError, FloatingPointError: see `precondition`.
        """
        return self._end_step(self.parameters, gradients, damping)

    @without_autocast()
    def _end_step(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        choose: Callable[[Mapping[str, Tensor]], float] | None = None,
    ) -> dict[str, Tensor] | None:
        if self.due and not self._passes:
            raise StateError(
                "Curvature is due and nothing was collected: run the forward and backward pass within `collect()`."
            )
        due = self.due
        complete = {n: gradients[n] if n in gradients else torch.zeros_like(p) for n, p in parameters.items()}
        own = self._passes[0] if self._of_the_pass(complete) else None
        route = route_of(Step(self.structure, own, due, self.power, self.damps))
        passes = self._passes.take()
        rows = [found.rows for found in passes if found.rows is not None]
        dtype = rows[0].dtype if rows else self.structure.dtype
        complete = {name: own_part(gradient).to(dtype) for name, gradient in complete.items()}
        looks = due or self._sharding is not None or next(iter(complete.values())).device.type == "cpu"
        sums = route.sums(complete, looks=looks)
        if looks:
            seen = [g for name, g in complete.items() if name not in sums]
            seen += [
                own_part(p.grad) for n, p in self.model.named_parameters() if n not in complete and p.grad is not None
            ]
            for layer in (layer for part in rows for layer in part.layers):
                # The inputs of a sum that adds up are finite.
                seen += layer.row_factors if sums.issuperset(layer.layout.names) else layer.factors
            if not self._all_finite(seen, shared=due or self._sharding is not None):
                self._skip(passes)
                return None
        self.heard.hear(passes, clips=self.kl_clip is not None, looks=looks)
        if due:
            begun = time.perf_counter()
            self._update(rows)
            self.refresh_seconds = time.perf_counter() - begun
        damping = self.damping.at(self.steps) if choose is None else choose(complete)
        if self._sharding is not None:
            found = self._sharding.direction(self.structure, complete, damping, self.power, self.damps)
        else:
            if (processes := Processes.present()) is not None and self.power == 1:
                self.structure.share_inverses(damping, partial(inverses_by, processes))
            found = route.direction(complete, sums, damping)
        self.structure.forget_batch()
        if looks and not self._all_finite(list(found.values()), shared=due or self._sharding is not None):
            self._skip(passes, f"(F + ρI)⁻¹ leaves the range of {dtype} at ρ = {damping:.3g}")
            return None
        self._skips.in_a_row = 0
        self._advance(due=due)
        found = found if looks else masked(found, complete)
        return {name: step.to(parameters[name].dtype) for name, step in found.items()}

    @staticmethod
    def _all_finite(tensors: Sequence[Tensor], *, shared: bool) -> bool:
        """Whether all entries are finite, in the other processes, too, if `shared`."""
        finite, processes = all_finite(tensors), Processes.present()
        return finite if processes is None or not shared else processes.agree(finite, tensors[0].device)

    def _update(self, rows: Sequence[Rows]) -> None:
        decay = self.decay.at(self.steps)
        processes = Processes.present()
        of_batch = self.how.per == "batch"
        for position, part in enumerate([batch_row(rows)] if of_batch else rows):
            step = decay if position == 0 else 1.0
            adds = self.structure.adds and not of_batch
            if processes is not None and not processes.total(part.sample_weights.new_tensor(part.terms)):
                raise weightless()
            if self._sharding is not None:
                self._sharding.update(self.structure, part, step, adds=adds)
                continue
            whole = part if processes is None or adds else processes.gather(part)
            if self._former is not None:
                self.structure.rebind(whole, self._former)
                self._former = None
            self.structure.update(whole, step, total=processes.total if processes is not None and adds else None)

    def _of_the_pass(self, gradients: Mapping[str, Tensor]) -> bool:
        """Whether gradients are those of the one pass before this step, whole."""
        return self._sharding is None and self._passes.brought(gradients)

    def _advance(self, *, due: bool) -> None:
        if due:
            self._last_due = self.steps
        self.steps += 1

    def skip(self) -> None:
        """End a step whose gradients are of no use: what was collected is forgotten, the curvature stays.

        Raises:
            FloatingPointError: see `precondition`.
        """
        self._skip(self._passes.take())

    def _skip(self, passes: Sequence[Collector], inverse: str = "") -> None:
        """Leave a step out, because of its gradients or rows, or because of the inverse that is named."""
        self._advance(due=self.due)
        self._skips.count(self.model, [found.output for found in passes], inverse)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on bit for bit; without configuration."""
        return {
            "steps": self.steps,
            "skipped": self._skips.total,
            "last_due": self._last_due,
            "skipped_in_a_row": self._skips.in_a_row,
            "heard": self.heard.state_dict(),
            "generator": self._generator.get_state(),
            "former": None if self._former is None else dict(self._former),
            "structure": self.structure.state_dict() if self.structure.updated else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state into a preconditioner of the same configuration.

        Raises:
            ValueError: if it belongs to another structure or configuration.
        """
        self._passes.take()
        if state["structure"] is None:
            self.structure = copy.deepcopy(self._blank)
        else:
            self.structure.load_state_dict(state["structure"])
        self.steps, self._last_due = state["steps"], state["last_due"]
        self._skips.total, self._skips.in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.heard.load_state_dict(state["heard"])
        self._generator.set_state(state["generator"].cpu())
        self._former = state["former"]
