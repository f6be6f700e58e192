"""A monitor of a training run: measures curvature while it trains, within a share of its time, and raises events.

    monitor = curvlab.monitor(model, loss, optimizer=optimizer, writers=[CSV("curves.csv")])
    for x, y in loader:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        monitor.after_step(x, y, value)

What is measured is that of the loss in evaluation mode, with dropout off and batch normalisation by its running statistics, on
the batch of the step. Model, gradients, buffers, modes and random numbers are left as they were found.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.monitor.events import Condition, Event, Onsets
from curvlab.monitor.figure import Curves, LiveFigure, draw
from curvlab.monitor.planner import Budget, Every, Plan
from curvlab.monitor.quantity import QUANTITIES, Quantity
from curvlab.monitor.training import Training
from curvlab.monitor.writers import as_log
from curvlab.optim import NaturalGradient, Preconditioner
from curvlab.rows.owners import trainable
from curvlab.rows.sharded import is_sharded
from curvlab.rows.sweep import PickOutput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Writer = Callable[..., object] | LiveFigure
"""A function of values, or of values and the step; or a figure."""

FIGURE = "live figure"
"""What the plan calls the drawing of the live figure."""


class QuantityDropped(UserWarning):
    """A quantity could not be measured and is left out from now on; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a quantity after a step.

    Attributes:
        step: number of steps taken.
        quantity: its key.
        values: numbers by name.
        seconds: what it took, writing included.
    """

    step: int
    quantity: str
    values: Mapping[str, float]
    seconds: float


class Monitor:
    """A monitor of one run; `curvlab.monitor` makes it.

    Attributes:
        measurements: all so far.
        events: all so far.
        dropped: quantities that could not be measured, with the reason.
    """

    def __init__(
        self,
        training: Training,
        quantities: Sequence[Quantity],
        plan: Plan,
        writers: Sequence[Writer],
        on_event: Callable[[Event], object] | None,
        clock: Callable[[], float],
    ) -> None:
        self.training, self.plan = training, plan
        self.quantities = {quantity.key: quantity for quantity in quantities}
        self.measurements: list[Measurement] = []
        self.events: list[Event] = []
        self.dropped: dict[str, str] = {}
        self._logs = [as_log(writer) for writer in writers if not isinstance(writer, LiveFigure)]
        self._figures = [writer for writer in writers if isinstance(writer, LiveFigure)]
        self._on_event, self._clock, self._onsets = on_event, clock, Onsets()
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._before: dict[str, Tensor] = {}
        self._last: float | None = None
        self._own = 0.0  # seconds since then that were not training
        self._unseen = self._rest = 0
        optimizer = training.optimizer if any(quantity.of_step for quantity in quantities) else None
        self._hook = None if optimizer is None else optimizer.register_step_pre_hook(self._before_step)

    @property
    def share(self) -> float:
        """Seconds of the monitor a second of training so far."""
        return self.plan.spent / self.plan.trained if self.plan.trained else 0.0

    def after_step(self, inputs: Any, targets: Any, value: Tensor | float | None = None) -> None:
        """Call it after each step of the optimiser: it measures what is due.

        Args:
            inputs: of the batch of this step, as `curvlab.sqrt_fisher` takes them.
            targets: as the loss takes them.
            value: the loss of this step; where it is not finite, nothing is measured.
        """
        self._unseen += 1
        if self._unseen <= self._rest:
            return
        begun = self._clock()
        training = 0.0 if self._last is None else begun - self._last - self._own
        self.plan.earn(max(training, 0.0), self._unseen)
        self.training.step += self._unseen
        self._unseen = 0
        counted = self._measure_due(inputs, targets, value) if self.plan.due() else 0.0
        self._before = {}
        self._last = self._clock()
        self.plan.spend(self._last - begun - counted + self._own)
        self._rest = self.plan.rest()
        self._own = self._clock() - self._last

    def measure(self, inputs: Any, targets: Any, *quantities: str) -> dict[str, float]:
        """Measure now, whatever the plan says; writers and events as usual.

        Args:
            inputs: see `after_step`.
            targets: see there.
            quantities: keys, all if none is given.

        Raises:
            UnsupportedModel, ValueError: what makes a quantity impossible.
        """
        self._look_at(inputs, targets)
        found: dict[str, float] = {}
        for key in quantities or tuple(self.quantities):
            found |= self._record(key, *self._measured(self.quantities[key]))
        return found

    def table(self) -> pd.DataFrame:
        """Return all measurements, a row a number, with the columns step, name and value."""
        import pandas as pd

        rows = [(step, name, value) for name, points in self._curves.items() for step, value in points]
        return pd.DataFrame(rows, columns=["step", "name", "value"]).sort_values(
            "step", kind="stable", ignore_index=True
        )

    def plot(self) -> Figure:
        """Draw all measurements, a panel a quantity."""
        return draw(self._curves, self.events)

    def close(self) -> None:
        """Let go of the optimiser."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        left = f", dropped: {', '.join(self.dropped)}" if self.dropped else ""
        return (
            f"Monitor({', '.join(self.quantities)}; {len(self.measurements)} measurements and {len(self.events)} events in "
            f"{self.training.step + self._unseen} steps, {self.share:.1%} of the time of training{left})"
        )

    def _before_step(self, *_: object) -> None:
        """Keep the parameters before a step whose change is due."""
        if self._before or self._unseen < self._rest:
            return
        begun = self._clock()
        asked = (key for key, quantity in self.quantities.items() if quantity.of_step)
        if self.plan.due(ahead=1) and any(self.plan.due(key, ahead=1) for key in asked):
            self._before = {n: p.detach().clone() for n, p in trainable(self.training.model).items()}
        self._own += self._clock() - begun

    def _look_at(self, inputs: Any, targets: Any) -> None:
        self.training.inputs, self.training.targets = inputs, targets
        self.training.change = None
        if self._before:
            present = trainable(self.training.model)
            self.training.change = {name: present[name].detach() - p for name, p in self._before.items()}

    def _measure_due(self, inputs: Any, targets: Any, value: Tensor | float | None) -> float:
        """Measure what is due; returns the seconds that were counted for quantities."""
        counted = 0.0
        loss = float(value.detach()) if isinstance(value, Tensor) else value
        if loss is not None and not math.isfinite(loss):
            return counted
        self._synchronise()
        self._look_at(inputs, targets)
        for key, quantity in list(self.quantities.items()):
            if not self.plan.due(key) or (quantity.of_step and self._hook is not None and not self._before):
                continue
            begun = self._clock()
            self._measure(key, quantity, begun, loss)
            seconds = self._clock() - begun
            if key in self.quantities:
                self.plan.spend(seconds, key)
                counted += seconds
        self.training.change = None
        return counted + self._show()

    def _measure(self, key: str, quantity: Quantity, begun: float, loss: float | None) -> None:
        try:
            values, conditions = self._measured(quantity)
        except Exception as error:
            self._drop(key, error)
            return
        self._synchronise()
        self._record(key, values, conditions, loss, begun)

    def _measured(self, quantity: Quantity) -> tuple[dict[str, float], list[Condition]]:
        with self.training.undisturbed():
            values = dict(quantity.measure(self.training))
            return values, list(quantity.conditions(values))

    def _drop(self, key: str, error: Exception) -> None:
        """Leave a quantity out: a monitor does not stop a run."""
        self.dropped[key] = f"{type(error).__name__}: {error}"
        del self.quantities[key]
        self.plan.drop(key)
        warnings.warn(
            f"The monitor leaves out {key!r} from step {self.training.step} on. {self.dropped[key]}",
            QuantityDropped,
            stacklevel=5,
        )

    def _record(
        self,
        key: str,
        values: Mapping[str, float],
        conditions: Iterable[Condition],
        loss: float | None = None,
        begun: float | None = None,
    ) -> dict[str, float]:
        """Keep, write and judge what was measured; returns it by full names."""
        step = self.training.step
        events = self._onsets.of(step, key, conditions)
        named = {f"{key}/{name}": value for name, value in values.items()}
        named |= {} if loss is None else {"loss": loss}
        named |= {f"event/{event.name}": 1.0 for event in events}
        for name, value in named.items():
            points = self._curves.setdefault(name, [])
            if not points or points[-1][0] != step:
                points.append((step, value))
        for log in self._logs:
            log(named, step)
        for event in events:
            self.events.append(event)
            if self._on_event is not None:
                self._on_event(event)
        seconds = 0.0 if begun is None else self._clock() - begun
        self.measurements.append(Measurement(step, key, dict(values), seconds))
        return named

    def _show(self) -> float:
        """Draw live figures where that is due; returns the seconds that were counted for it."""
        figures = [figure for figure in self._figures if figure.due]
        if not (figures and self._curves and self.plan.due(FIGURE)):
            return 0.0
        begun = self._clock()
        for figure in figures:
            figure.show(self.curves, self.events)
        seconds = self._clock() - begun
        self.plan.spend(seconds, FIGURE)
        return seconds

    @property
    def curves(self) -> Curves:
        """Steps and values by name."""
        return self._curves

    def _synchronise(self) -> None:
        """Wait for a GPU, whose time is measured on the host."""
        device = next(self.training.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def monitor(
    model: nn.Module,
    loss: nn.Module | Callable[[Tensor, Any], Tensor],
    quantities: Sequence[str | Quantity] | None = None,
    budget: float = 0.02,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    preconditioner: Preconditioner | None = None,
    writers: Sequence[Writer] | Writer = (),
    on_event: Callable[[Event], object] | None = None,
    every: int | None = None,
    output: PickOutput = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Monitor:
    """Return a monitor of a training run, to be called after each step; see `Monitor.after_step`.

    Args:
        model: the model that is trained; under `DistributedDataParallel`, its `.module`, in one process.
        loss: called as `loss(outputs, targets)`. Quantities of single samples need one that `curvlab.sqrt_fisher` takes.
        quantities: keys of `curvlab.monitor.QUANTITIES`, or quantities with options of their own; all registered ones if None,
            without an optimiser all that need none.
        budget: share of the training time that the monitor may take.
        optimizer: what makes the steps; quantities that compare with its steps need it.
        preconditioner: a `Preconditioner` before it; that of a `NaturalGradient` is known.
        writers: where measurements go, see `curvlab.monitor.writers`.
        on_event: called with each event.
        every: measure everything after every so many steps instead, whatever it takes.
        output: which tensor of a structured output the loss takes, as in `curvlab.sqrt_fisher`.
        clock: returns seconds.

    Raises:
        ValueError: for a budget or a number of steps out of range, an unknown quantity, or one that is named twice.
        UnsupportedModel: for a model without trainable parameters, and one under `fully_shard`.

    Cost: in a step in which nothing is measured some microseconds; in all at most the budget, see `curvlab.monitor.planner`.
    """
    if is_sharded(model):
        raise UnsupportedModel(
            "A model under fully_shard is not monitored: its parameters lie in several processes. Monitor a smaller one first."
        )
    trainable(model)
    if quantities is None:
        quantities = [key for key, kind in QUANTITIES.items() if optimizer is not None or not kind.of_optimizer]
    made = [QUANTITIES[quantity]() if isinstance(quantity, str) else quantity for quantity in quantities]
    keys = [quantity.key for quantity in made]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"Each quantity is measured once, but {', '.join(twice)} is named twice.")
    if not made:
        raise ValueError(f"quantities=[] leaves nothing to measure; there are {', '.join(QUANTITIES)}.")
    if isinstance(optimizer, NaturalGradient) and preconditioner is not None:
        raise ValueError("A NaturalGradient preconditions by itself: leave preconditioner out.")
    given = [writers] if callable(writers) or isinstance(writers, LiveFigure) else list(writers)
    weights = {quantity.key: quantity.weight for quantity in made}
    passes = {quantity.key: quantity.passes for quantity in made}
    if any(isinstance(writer, LiveFigure) for writer in given):
        weights[FIGURE], passes[FIGURE] = 1.0, 1.0
    plan: Plan = Budget(budget, weights, passes) if every is None else Every(every)
    return Monitor(Training(model, loss, optimizer, preconditioner, output), made, plan, given, on_event, clock)
