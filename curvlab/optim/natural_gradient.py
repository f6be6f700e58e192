"""Natural gradient as a `torch.optim` optimiser: a `Preconditioner` and SGD with momentum in one.

With no argument beside model and loss, a step is the minimiser of the quadratic model of K-FAC, whose damping follows how well it
predicts the loss, within a trust region.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import isnan, nan
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import Structure
from curvlab.fisher.power import Damps
from curvlab.optim.gradients import norm
from curvlab.optim.hyper import Hyper, Interval, Present, Schedule
from curvlab.optim.preconditioner import DAMPING, KL_CLIP, Preconditioner
from curvlab.optim.quadratic import BatchLoss, LevenbergMarquardt, agreement, best_combination, inner
from curvlab.optim.trust import clip
from curvlab.rows.loss import Kind, RowPer
from curvlab.rows.sharded import gathered, is_sharded
from curvlab.rows.sweep import PickOutput
from curvlab.tools.shown import changed, line

logger = logging.getLogger("curvlab")

T = TypeVar("T")

_HOOKS = re.compile("_optimizer_.*_hooks")
"""Names of the attributes in which `torch.optim.Optimizer` keeps hooks, and which it makes anew in a copy."""


class NaturalGradient(torch.optim.Optimizer):
    """θ ← θ − η v, with v the momentum of `(F + ρI)⁻¹∇L`.

        with optimizer.collect():
            loss(model(x), y).backward()
        optimizer.step()

    or `optimizer.step(closure)`, which opens the context itself. Schedules, parameter groups and state dicts are those of
    `torch.optim`. Parameters that the preconditioner leaves plain move along their gradient. With a `GradScaler`,
    `scaler.scale(loss).backward()` in the context and `scaler.step(optimizer)`, with or without `scaler.unscale_` between
    them; a step whose gradients overflow is skipped and counted, its rows forgotten.

    Args:
        model: the model; under `DistributedDataParallel`, its `.module`.
        loss: the module that is called on the model's output and the targets, flattened or not, see `Preconditioner`.
        lr: η, a number or a function of the step. With 1, the step minimises the structure's quadratic model with damping, within
            the trust region; "quadratic" minimises that of the exact Fisher matrix of the batch over the direction and the last
            step, which sets the momentum, too.
        structure: see `Preconditioner`.
        kind: which rows the curvature is made of, as in `curvlab.sqrt_fisher`; their costs are those of `Preconditioner`.
        draws: random rows of a loss term, for "mc" and for signs.
        rows: what a row stands for, see `Preconditioner`.
        damping: ρ, a number, a function of the step, or `LevenbergMarquardt`. If None, the last, where the loss of a batch can be
            evaluated at other parameters; 0.01 for sharded models, and for powers other than 1.
        power: p of `(F + ρI)^{-p}`, see `Preconditioner`.
        damps: what ρ is added to, see `Preconditioner`.
        decay: weight of the state so far when rows are added; 0.95 if None, or 0 for structures that keep rows.
        refresh_every: steps from one curvature to the next, a number or a function of the step.
        plain: modules or parameters, by name, that keep their plain gradient.
        graph: whether the loss is called on outputs of nodes of one graph, which interact.
        output: which tensor of a structured output the loss is called on, see `Preconditioner`.
        seed: seed of the draws.
        patience: steps in a row that may be skipped because something was not finite.
        momentum: of the preconditioned gradient, a number or a function of the step.
        nesterov: whether momentum is Nesterov's.
        weight_decay: λ. Coupled, it adds λθ to the gradient, before F acts on it; decoupled, it shrinks θ by ηλθ.
        decoupled: which of the two.
        kl_clip: bound κ of the trust region, a number or a function of the step; None for none. The direction d is scaled by
            min(1, √(κu/(η² dᵀ∇L))), so that the step's squared length in the metric of F + ρI is at most κ in the unit u of
            `curvlab.optim.trust.unit` (Ba, Grosse & Martens 2017, section 5).
        param_groups: groups as `torch.optim` takes them, with their own lr, momentum or weight_decay, which functions of the
            step leave alone; one of all trainable parameters if None.

    Raises:
        ValueError: for a hyper-parameter out of range or options that exclude each other; names them.

    Steps raise FloatingPointError if the loss explodes nevertheless, see `Preconditioner`.

    Source: Amari 1998; Martens & Grosse 2015.
    """

    _step_supports_amp_scaling = True
    """Asks `GradScaler.step` to set `grad_scale` and `found_inf` for the time of a step, and to leave skipping to this class:
    rows would be left behind otherwise."""

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        lr: Schedule | Literal["quadratic"] = 1.0,
        *,
        structure: Structure | type[Structure] | str | None = None,
        kind: Kind = "mc",
        draws: int = 1,
        rows: RowPer | None = None,
        damping: Schedule | LevenbergMarquardt | None = None,
        power: float = 1.0,
        damps: Damps = "matrix",
        decay: Schedule | None = None,
        refresh_every: Interval = 1,
        plain: str | Sequence[str] = (),
        graph: bool = False,
        output: PickOutput = None,
        seed: int = 0,
        patience: int = 10,
        momentum: Schedule = 0.0,
        nesterov: bool = False,
        weight_decay: Schedule = 0.0,
        decoupled: bool = False,
        kl_clip: Schedule | None = KL_CLIP,
        param_groups: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self._gives_way, self._stuck = damping is None, False
        if damping is None:
            fixed = power != 1 or (isinstance(model, nn.Module) and is_sharded(model))
            damping = DAMPING if fixed else LevenbergMarquardt()
        if power != 1 and (isinstance(damping, LevenbergMarquardt) or lr == "quadratic"):
            raise ValueError(
                f'LevenbergMarquardt and lr="quadratic" are about the quadratic model of F + ρI: with power={power:g} give numbers.'
            )
        self._adapts = damping if isinstance(damping, LevenbergMarquardt) else None
        self._rho = Present(nan)
        self._quadratic = lr == "quadratic"
        self.preconditioner = Preconditioner(
            model,
            loss,
            structure,
            kind=kind,
            draws=draws,
            rows=rows,
            damping=self._rho if isinstance(damping, LevenbergMarquardt) else damping,
            power=power,
            damps=damps,
            kl_clip=kl_clip,
            decay=decay,
            refresh_every=refresh_every,
            plain=plain,
            graph=graph,
            output=output,
            seed=seed,
            patience=patience,
        )
        self._hypers = [
            Hyper("lr", 1.0 if isinstance(lr, str) else lr),
            Hyper("momentum", momentum),
            Hyper("weight_decay", weight_decay),
        ]
        self._decoupled, self._damping = decoupled, damping
        self._log: dict[str, Tensor | float] = {}
        if isinstance(lr, str) and not self._quadratic:
            raise ValueError(f'lr is a number, a function of the step or "quadratic", got {lr!r}.')
        if self._quadratic and (momentum != 0 or nesterov):
            raise ValueError('lr="quadratic" chooses the momentum: leave momentum and nesterov.')
        first = {hyper.name: hyper.at(0) for hyper in self._hypers}
        groups = (
            [{"params": [p for p in model.parameters() if p.requires_grad]}] if param_groups is None else param_groups
        )
        made = [dict(group) for group in groups]
        self._own: list[set[str]] = []
        self._names = {p: name for name, p in model.named_parameters()}
        if self._quadratic and any({"lr", "momentum"} & set(group) for group in made):
            raise ValueError('lr="quadratic" takes one step for all groups: leave lr and momentum out of param_groups.')
        super().__init__(made, {**first, "nesterov": nesterov})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; what it sets itself, functions of the step leave alone.

        Raises:
            ValueError: if it holds parameters of anything else.
        """
        own, params = set(param_group), param_group["params"]
        if not isinstance(params, Tensor | set):
            params = param_group["params"] = list(params)
        given = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
        foreign = [str(tuple(p.shape)) for p in given if isinstance(p, Tensor) and p not in self._names]
        if foreign:
            raise ValueError(
                f"Parameter group {len(self.param_groups)} holds {len(foreign)} tensors that are not parameters of the "
                f"{type(self.preconditioner.model).__name__} that the optimiser was made for, of shape {', '.join(foreign)}. "
                "Give them an optimiser of their own, or make a new NaturalGradient of a module that has them."
            )
        super().add_param_group(param_group)
        self._own.append(own)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle everything but what others put on this instance and torch leaves out, too.

        These are hooks, and methods that are replaced: a learning-rate scheduler wraps `step`, bound to the original.
        """
        return {
            name: value
            for name, value in vars(self).items()
            if not (hasattr(type(self), name) or name == "_opt_called" or _HOOKS.fullmatch(name))
        }

    def __repr__(self) -> str:
        groups = {name: [group[name] for group in self.param_groups] for name in ("lr", "momentum", "weight_decay")}
        rates = {name: values[0] if len(set(values)) == 1 else values for name, values in groups.items()}
        own = changed(self, rates | {"nesterov": self.defaults["nesterov"], "decoupled": self._decoupled})
        return line(
            self, *self.preconditioner.notes(), **own, **self.preconditioner.options() | {"damping": self._damping}
        )

    @property
    def damping(self) -> float:
        """ρ of the next step; not a number before the first one if that sets it."""
        return self._rho.value if self._adapts else self.preconditioner.damping.at(self.preconditioner.steps)

    @property
    def adapts(self) -> bool:
        """Whether the damping follows how well the quadratic model predicts the loss."""
        return self._adapts is not None

    @property
    def decoupled(self) -> bool:
        """Whether weight decay shrinks parameters, and adds nothing to gradients."""
        return self._decoupled

    @property
    def chooses_step(self) -> bool:
        """Whether step size and momentum follow from the quadratic model."""
        return self._quadratic

    def collect(self) -> AbstractContextManager[None]:
        """Collect from one forward and backward pass: see `Preconditioner.collect`."""
        return self.preconditioner.collect()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: clears the gradients, computes the loss, calls `backward()` and returns the loss; called once, in a
                collecting context. It may do nothing after passes in contexts of their own.

        Returns:
            What the closure returned.

        Raises:
            StateError, FloatingPointError: see `Preconditioner.precondition`.
        """
        result = None if closure is None else self.preconditioner.run(closure)
        self._follow_schedules()
        if getattr(self, "found_inf", 0):
            self.preconditioner.skip()
        else:
            with torch.no_grad():
                self._step()
        return result

    def _follow_schedules(self) -> None:
        for hyper in self._hypers:
            if callable(hyper.value):
                value = hyper.at(self.preconditioner.steps)
                for position, group in enumerate(self.param_groups):
                    if hyper.name not in self._own[position]:
                        group[hyper.name] = value

    def _step(self) -> None:
        pre = self.preconditioner
        adjusts = self._adapts is not None and not self._stuck and (pre.steps + 1) % self._adapts.every == 0
        batch = self._tried(self._batch_loss) if adjusts or self._quadratic else None
        adjusts = adjusts and not (self._gives_way and batch is None)
        bound = None if pre.kl_clip is None else pre.kl_clip.at(pre.steps)
        self._log = {"step": pre.steps, "damping": nan, "lr": self.param_groups[0]["lr"], "refreshed": float(pre.due)}
        gradients = self._gradients()
        found = pre.direction(gradients, self._first_damping if self._adapts and isnan(self._rho.value) else None)
        self._log |= {"skipped": pre.skipped, "refresh_seconds": pre.refresh_seconds}
        if pre.heard.loss is not None:
            self._log["loss"] = pre.heard.loss
        if found is None:
            return
        damping = self._log["damping"] = self.damping
        direction = {**gradients, **found}
        gradients = {name: torch.zeros_like(step) for name, step in direction.items()} | gradients
        if batch is None and (adjusts or self._quadratic):
            raise StateError("The quadratic model needs the batch of the step: run one pass within collect().")
        before = {name: p.clone() for p, name in self._names.items()} if adjusts else {}
        for group in self.param_groups:
            if self._decoupled and group["weight_decay"]:
                shrinking = [p for p in group["params"] if p.grad is not None]
                if shrinking:
                    torch._foreach_mul_(shrinking, 1 - group["lr"] * group["weight_decay"])
        if self._quadratic and batch is not None:
            self._combine(batch, gradients, direction, damping, bound)
        else:
            self._descend(direction, self._trust(bound, gradients, direction))
        self._log["gradient_norm"] = norm(gradients.values())
        if adjusts and self._adapts is not None and batch is not None:
            after = {name: p.detach() for p, name in self._names.items()}
            seen = self._tried(partial(agreement, batch, gradients, before, after, damping))
            if seen is not None:
                self._log |= {"decrease": seen.decrease, "promised_decrease": seen.promised}
                self._rho.value = self._adapts.adjusted(damping, seen)

    def _tried(self, compute: Callable[[], T]) -> T | None:
        """Return what is computed of the batch's loss; the damping stays as it is where nobody asked that it be adapted."""
        try:
            return compute()
        except (UnsupportedModel, NotImplementedError) as problem:
            if not self._gives_way:
                raise
            logger.info(
                "The damping stays at %.3g, as the loss of a batch has no quadratic model: %s", self._rho.value, problem
            )
            self._stuck = True
            return None

    def log(self) -> dict[str, float]:
        """Return what the last step did, as one flat dictionary of numbers; empty before the first one.

        - `step`: number of steps before it; `loss`: of its batch, as the loss module returned it;
        - `lr`: of the first group; `damping`: ρ;
        - `clip`: factor by which the trust region has shortened it; `kl`: its squared length in the metric of F + ρI, before the
          momentum, by the structure (by the exact matrix of the batch with `lr="quadratic"`);
        - `gradient_norm`, with coupled weight decay; `step_norm`: of the change of the parameters, but for decoupled decay;
        - `promised_decrease`: of the quadratic model, `decrease`: of the batch's loss, in steps in which the damping is adjusted;
        - `refreshed`: 1 if it took new curvature, else 0; `refresh_seconds`: time that the last update of the curvature took;
        - `skipped`: steps skipped so far. A skipped step has no other numbers than these three, `step`, `lr` and `loss`.

        On a GPU it waits for the device. Of a sharded model, every process has to call it.
        """
        found = {name: float(gathered(x) if isinstance(x, Tensor) else x) for name, x in self._log.items()}
        return {name: value for name, value in found.items() if name != "damping" or not isnan(value)}

    def _first_damping(self, gradients: Mapping[str, Tensor]) -> float:
        """Return ρ of the first step from the gradients, when the curvature is taken."""
        assert self._adapts is not None
        product = self.preconditioner.structure.matvec(dict(gradients))
        assert not isinstance(product, Tensor)
        names = list(gradients)
        size = float(inner(gradients, gradients, names))
        self._rho.value = self._adapts.first(float(inner(gradients, product, names)) / size if size else nan)
        return self._rho.value

    def _batch_loss(self) -> BatchLoss | None:
        """The loss on the batch of this step, with the coupled weight decay as a part of the loss."""
        batch = self.preconditioner.batch_loss
        if batch is None or self._decoupled:
            return batch
        decay = {self._names[p]: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        return replace(batch, decay={name: weight for name, weight in decay.items() if weight})

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients by name, unscaled, with what coupled weight decay adds; the parameters' own stay as they are."""
        found: dict[str, Tensor] = {}
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            coupled = 0.0 if self._decoupled else group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad if scale is None else p.grad / scale
                    found[self._names[p]] = gradient.add(p, alpha=coupled) if coupled else gradient
        return found

    def _trust(
        self, bound: float | None, gradients: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Return the factor that keeps a step within the trust region."""
        named = [
            (group["lr"], [self._names[p] for p in group["params"] if self._names[p] in direction])
            for group in self.param_groups
        ]
        squared = torch.stack([lr**2 * inner(gradients, direction, names) for lr, names in named if names]).sum()
        factor = None if bound is None else clip(bound, self.preconditioner.heard.unit, squared)
        self._log |= {
            "clip": 1.0 if factor is None else factor,
            "kl": squared if factor is None else factor**2 * squared,
        }
        return factor

    def _descend(self, direction: Mapping[str, Tensor], scale: Tensor | None) -> None:
        lengths = []
        for group in self.param_groups:
            moving = [p for p in group["params"] if self._names[p] in direction]
            if not moving:
                continue
            steps = [direction[self._names[p]] for p in moving]
            if scale is not None:
                steps = [step * scale for step in steps]
            if group["momentum"]:
                steps = self._with_momentum(moving, steps, group)
            torch._foreach_add_(moving, steps, alpha=-group["lr"])
            lengths.append(group["lr"] * norm(steps))
        self._log["step_norm"] = norm(lengths)

    def _with_momentum(self, moving: list[Tensor], steps: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        for p in moving:
            self.state[p].setdefault("momentum", torch.zeros_like(p))
        velocity = [self.state[p]["momentum"] for p in moving]
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, steps)
        return list(torch._foreach_add(steps, velocity, alpha=group["momentum"])) if group["nesterov"] else velocity

    def _combine(
        self,
        batch: BatchLoss,
        gradients: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        damping: float,
        bound: float | None,
    ) -> None:
        """Step along the direction and the last step as the quadratic model says, within the trust region."""
        moving = {name: p for p, name in self._names.items() if name in direction}
        known = any("last_step" in self.state[p] for p in moving.values())
        last = (
            {name: self.state[p].get("last_step", torch.zeros_like(p)) for name, p in moving.items()} if known else None
        )
        directions = [direction] if last is None else [direction, last]
        best, squared = best_combination(batch, gradients, directions, damping)
        if bound is not None:
            factor = clip(bound, self.preconditioner.heard.unit, squared)
            best, squared = factor * best, factor**2 * squared
            self._log["clip"] = factor
        self._log["kl"] = squared
        for name, p in moving.items():
            self.state[p]["last_step"] = step = sum(c * d[name] for c, d in zip(best.tolist(), directions, strict=True))
            p.add_(step)
        self._log["step_norm"] = norm([self.state[p]["last_step"] for p in moving.values()])

    def momentum(self) -> dict[str, Tensor]:
        """Return the momentum by parameter, zeros before the first step; none where there is no momentum at all."""
        return {
            self._names[p]: self.state[p].get("momentum", torch.zeros_like(p))
            for group in self.param_groups
            if group["momentum"]
            for p in group["params"]
        }

    def numbers(self) -> dict[str, Any]:
        """Return what the state holds beside the momentum and the preconditioner's state."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"groups": groups, "rho": self._rho.value}

    def take_up(self, numbers: Mapping[str, Any], momentum: Mapping[str, Tensor]) -> None:
        """Restore `numbers` and `momentum`; the preconditioner is restored by itself."""
        for group, saved in zip(self.param_groups, numbers["groups"], strict=True):
            group.update(saved)
        self._rho.value = numbers["rho"]
        for p, name in self._names.items():
            if name in momentum:
                self.state[p]["momentum"] = momentum[name].detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """Return SGD's state and the preconditioner's; loading it continues bit for bit."""
        return super().state_dict() | {"preconditioner": self.preconditioner.state_dict(), "rho": self._rho.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state into an optimiser of the same configuration.

        Raises:
            ValueError: for the state of another kind of optimiser, before anything is changed.
        """
        missing = [name for name in ("preconditioner", "rho") if name not in state_dict]
        if missing:
            raise ValueError(
                f"The state has no {' and no '.join(map(repr, missing))}, so it is that of another optimiser than "
                "NaturalGradient. Load what NaturalGradient.state_dict() returned."
            )
        super().load_state_dict(state_dict)
        self.preconditioner.load_state_dict(state_dict["preconditioner"])
        self._rho.value = state_dict["rho"]
