"""What a structure holds: its blocks, and rows where blocks keep them.

Batches enter by `update`, with a weight for the state before them. Blocks that average keep nothing of a batch but what it
adds. Blocks that keep rows need those of all batches at once; `update` merges them. The last batch stays at hand for `lift`
until it is forgotten, but it is no part of the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar, TypeVar

import torch

from curvlab.errors import StateError
from curvlab.fisher.block import Block, RunningAverage, Total, batches_of
from curvlab.fisher.intake import Intake
from curvlab.fisher.memory import check_memory
from curvlab.fisher.serialise import pack_blocks, pack_rows, restore_blocks, unpack_rows, without_numbers
from curvlab.rows import Rows, merge
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.processes import Processes
from curvlab.rows.rows import IN_COMMON
from curvlab.tools.shown import changed, line, table
from curvlab.tools.text import what_was_given

Own = TypeVar("Own", bound="State")


class State(ABC):
    """The state of a structure; subclasses say which blocks there are.

    Configuration is given at construction and frozen; the state comes from `update`.
    """

    key: ClassVar[str]
    summary: ClassVar[str]
    averages: bool = False
    """Whether the state are averages of layers' moments, which take any decay and stay defined where samples interact."""
    passes: int = 1
    """How often `fit` goes over the data: `Block.refine` is called in the second pass."""
    adds: bool = False
    """Whether the state are sums over samples, so that processes can add theirs: `update` takes `total`."""

    by_layer: bool = False
    """Whether every layer is treated by itself, and of its rows only moments are needed, so that `fit` never holds those of all."""
    joins_positions: bool = False
    """Whether only the sum of a sample's rows is used, so that one row, its whole gradient, says as much."""
    costly: ClassVar[bool] = False
    """Whether its products with rows cost far more than a sweep in large networks, where it is compared if named only."""
    of_optimiser: ClassVar[bool] = False
    """Whether it is what an optimiser multiplies with, not a structure of the theory of F: analyses take it if named only."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._shapes: Rows | None = None
        self._kept: list[tuple[float, Rows]] = []  # batches, each with the decay of those before it
        self._merged: Rows | None = None  # those that are kept, as one
        self._latest: Rows | None = None
        self._counts = RunningAverage()
        self._largest: float | None = None  # eigenvalue, from when it is asked for until the state changes
        self._anew: list[Block] = []  # those that have no state since `rebind`
        self._held: frozenset[str] | None = None  # parameters whose blocks there are, all if None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last batch out of copies and pickles."""
        return {**self.__dict__, "_latest": None}

    @property
    def usual_decay(self) -> float:
        """The decay of a training that is given none: that of a long average, or 0 where the state would be many rows."""
        return 0.95 if self.averages else 0.0

    @property
    @abstractmethod
    def options(self) -> Mapping[str, object]:
        """The configuration, by the constructor's argument names."""

    @abstractmethod
    def _make_blocks(self, rows: Rows) -> list[Block]:
        """Cut the parameters into blocks; every parameter belongs to exactly one."""

    def hold(self, names: Collection[str]) -> None:
        """Have the blocks of some parameters only, as other processes have the others'; before the first update."""
        self._held = frozenset(names)

    def couples(self, rows: Rows) -> bool:
        """Whether a block would span several layers of these rows, whose numbers do not matter."""
        return any(len(block.parts) > 1 for block in self._make_blocks(without_numbers(rows)))

    def lend(self, rows: Rows, names: Collection[str], total: Total) -> None:
        """Add this process' samples to blocks that another one holds, and that updates its state with the same total.

        Args:
            rows: see `update`.
            names: the parameters of these blocks.
            total: sums a tensor over the processes, for the other one.

        Memory: that of one block, after the other.
        """
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        blocks = [block for block in self._make_blocks(rows) if set(names).issuperset(block.names)]
        while blocks:
            block = blocks.pop(0)
            (batch,) = batches_of([block], rows, 0.0, total)
            block.update(batch)
        _add_count(RunningAverage(), rows, 0.0, total)

    def __repr__(self) -> str:
        state = f"P={self.space.size}, blocks={len(self._blocks)}" if self.updated else "not updated yet"
        return line(self, state, *self._notes(), **self._configured())

    def _repr_html_(self) -> str:
        rows = ((b.name, type(b).__name__.strip("_"), b.size) for b in self._blocks)
        return table(self, ("layer", "block", "P"), rows, **self.options)

    def _configured(self) -> dict[str, object]:
        """Return the options that a line shows, those that are not the usual ones."""
        return changed(self, self.options)

    def _notes(self) -> list[str]:
        """Return what a reader of the repr should know about the state."""
        return []

    def intake(self, head: Rows, number: int, *, first: bool) -> Intake:
        """Return what takes a batch of a data set layer by layer, for `take_in`.

        Args:
            head: its rows, without layers.
            number: of the pass over the data, from 0.
            first: whether the batch is the first of its pass.
        """
        known: dict[str, list[Block]] = {}
        for block in self._blocks:
            known.setdefault(block.name, []).append(block)
        if number > 0:
            self._prepare_refining(self._blocks)
            again = 0.0 if first else 1.0
            return Intake(self.key, head, again, known, self._make_blocks, lambda block, batch: block.refine(batch))
        decay = 0.0 if self._shapes is None else 1.0
        if self._shapes is not None:
            self._check_fits(head, self._shapes, decay)
        return Intake(self.key, head, decay, known, self._make_blocks, lambda block, batch: block.update(batch))

    def take_in(self, intake: Intake, number: int) -> None:
        """End a batch that has arrived layer by layer; a second pass adds nothing to what is known of the first."""
        if number > 0:
            self._largest = None
            return
        rows = intake.rows
        if self._shapes is None:
            self._blocks = intake.blocks
            self._begin(self._blocks, rows)
        _add_count(self._counts, rows, 0.0 if self._shapes is None else 1.0)
        self._shapes, self._latest, self._largest = rows, None, None

    def refine(self, rows: Rows, *, first: bool) -> None:
        """Add a batch in the second pass over a data set; see `Block.refine`."""
        self._prepare_refining(self._blocks)
        for block, batch in zip(self._blocks, batches_of(self._blocks, rows, 0.0 if first else 1.0), strict=True):
            block.refine(batch)
        self._largest = None

    def _prepare_refining(self, blocks: Iterable[Block]) -> None:  # noqa: B027
        """Make what `Block.refine` needs of all blocks, where that is done faster together."""

    def _cut(self, rows: Rows) -> list[Block]:
        """Make the blocks that this process holds."""
        blocks = self._make_blocks(rows)
        self._begin(blocks, rows)
        return blocks if self._held is None else [block for block in blocks if self._held.issuperset(block.names)]

    def _begin(self, blocks: list[Block], rows: Rows) -> None:  # noqa: B027
        """See all blocks, made of the rows of all layers, before they have a state."""

    def update(self: Own, rows: Rows, decay: float = 0.0, *, total: Total | None = None) -> Own:
        """Decay the state and add the rows of a batch.

        Args:
            rows: rows of S; those in half precision are converted to float32, in which factorisations still work.
            decay: weight of the state so far: 0 replaces it, 1 accumulates a data set exactly, in between is a running
                average. Sums of losses add at 1 and average otherwise.
            total: sums a tensor over processes, each of which holds the rows of some samples of the batch; for K-FAC
                and the diagonal, whose state are sums over samples.

        Raises:
            ValueError: if decay is not in [0, 1], or the rows are those of a Jacobian or of other parameters.
            StateError: if a block that keeps rows cannot take this decay.
            MemoryError: if the structure does not fit; the message says how large it is.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is a number in [0, 1], got {decay}.")
        _check_rows_of_fisher(rows)
        if rows.dtype != (wide := torch.promote_types(rows.dtype, torch.float32)):
            rows = rows.to(wide)
        if self._shapes is None:
            decay = 0.0
        else:
            self._check_fits(rows, self._shapes, decay)
        blocks = self._blocks or self._cut(rows)
        batches = [
            replace(batch, decay=0.0) if block in self._anew else batch
            for block, batch in zip(blocks, batches_of(blocks, rows, decay, total), strict=True)
        ]
        check_memory(self.key, blocks, batches)
        staying = [block.will_keep_rows(batch) for block, batch in zip(blocks, batches, strict=True)]
        for block, stays in zip(blocks, staying, strict=True):
            if decay and block.keeps_rows and not stays and self._merged is not None:
                block.leave_rows(1.0 if rows.reduction == "sum" else self._merged.terms)
        self._blocks, self._anew = blocks, []
        for block, batch in zip(blocks, batches, strict=True):
            block.update(batch)
        self._prepare_refining(blocks)
        for block, batch in zip(blocks, batches, strict=True):
            block.refine(batch)
        history: list[tuple[float, Rows]] = []
        if any(staying):
            before = self._kept if decay else []
            history = [*before, (decay, rows)][-(self._window or 0) :]
        if history and self._window is not None:
            self._counts = _counted(history)  # without the batches that have left the window
        else:
            _add_count(self._counts, rows, decay, total)
        self._shapes, self._latest, self._largest = without_numbers(rows), rows, None
        self._merge(history)
        return self

    def add_up(self, processes: Processes, number: int) -> None:
        """Turn the state of a part of a data set, after a pass over it, into that of the parts of all processes.

        Args:
            processes: those with a part each; all end with the same state.
            number: of the pass, from 0.

        Raises:
            NotImplementedError: if a block is no sum over samples.
        """
        self._largest = None
        if number > 0:
            for block in self._blocks:
                block.add_up_refined(processes.total)
            return
        kept = [float(block.keeps_rows) for block in self._blocks]
        everywhere = (processes.total(torch.tensor(kept, device=self.device)) == processes.size).tolist()
        whole = processes.gather(self._merged) if any(everywhere) and self._merged is not None else None
        for block, rows_of_all in zip(self._blocks, everywhere, strict=True):
            if rows_of_all and whole is not None:
                block.update(*batches_of([block], whole, 0.0))
                continue
            if block.keeps_rows and self._merged is not None:
                block.leave_rows(1.0 if self._merged.reduction == "sum" else self._merged.terms)
            block.add_up(processes.total)
        self._counts.add_up(lambda count: processes.total(count.to(self.device)).cpu())
        self._merge([(0.0, whole)] if whole is not None and self._keeps_rows else [])

    def _merge(self, batches: list[tuple[float, Rows]]) -> None:
        """Keep the rows of batches, as one where there is no window, and hand them to the blocks that keep rows."""
        self._kept, self._merged = batches, None
        if not batches:
            return
        weights = list(accumulate((decay for decay, _ in reversed(batches[1:])), mul, initial=1.0))[::-1]
        # Sums of losses add up at decay 1 and are averaged otherwise, as their counts are.
        divisor = _counted(batches).weight
        self._merged = merge([rows for _, rows in batches], [weight / divisor for weight in weights])
        if self._window is None:
            self._kept = [(0.0, self._merged)]
        for block in self._blocks:
            if block.keeps_rows:
                block.set_rows(block.of(self._merged))

    def rebind(self: Own, rows: Rows, names: Mapping[str, str] | None = None) -> Own:
        """Take the layers of other rows in place of those of the state, as those of a network that has grown.

        Averages of blocks whose parameters have kept their shapes go on. Other blocks, and all that keep rows, since rows
        are those of one network, start anew with the next `update`, before which there is no matrix. Nothing is embedded in
        a larger block: its moments with the new parameters are unknown. `count` goes on if any block does.

        Args:
            rows: rows of the network as it is now; their numbers do not matter.
            names: present names by former names, of parameters that are the same; if None, those that are called alike.
        """
        if self._shapes is None:
            return self
        former = {name: name for name in self.space.shapes} if names is None else names
        blocks = self._cut(rows)
        kept = {
            block: old
            for block in blocks
            for old in self._blocks
            if not old.keeps_rows and old not in self._anew and block.stands_for(old, former)
        }
        for block, old in kept.items():
            block.restore(old.state())
        self._blocks, self._anew = blocks, [block for block in blocks if block not in kept]
        if not kept:
            self._counts = RunningAverage()
        self._shapes = replace(
            without_numbers(rows), kind=self.shapes.kind, reduction=self.shapes.reduction, per=self.shapes.per
        )
        self._kept, self._merged, self._latest, self._largest = [], None, None, None
        return self

    def _ready(self) -> None:
        """Raise `StateError` if there is no matrix yet."""
        _ = self.shapes
        if self._anew:
            layers = ", ".join(dict.fromkeys(block.name for block in self._anew))
            raise StateError(f"Since rebind, there is no curvature of {layers}: call update(rows).")

    def forget_batch(self) -> None:
        """Let go of the last batch, of which averages need nothing more; `lift` is for states that keep rows then."""
        self._latest = None

    def _check_fits(self, rows: Rows, last: Rows, decay: float) -> None:
        if dict(rows.space.shapes) != dict(last.space.shapes):
            raise ValueError("The rows belong to other parameters than the structure's state.")
        if decay == 0:
            return
        for what, name in IN_COMMON.items():
            if getattr(rows, name) != getattr(last, name):
                raise ValueError(
                    f"Rows cannot be added to a state of others: {what} is {getattr(rows, name)!r}, and was "
                    f"{getattr(last, name)!r}. Use decay=0 to start afresh."
                )
        if self._keeps_rows and rows.shape[0] != last.shape[0]:
            raise ValueError(
                f"Blocks that keep rows need as many rows a sample in every batch, got {last.shape[0]} and then "
                f"{rows.shape[0]}. Use side='parameters'."
            )

    @property
    def _keeps_rows(self) -> bool:
        return any(block.keeps_rows for block in self._blocks)

    @property
    def _window(self) -> int | None:
        """Number of batches that rows are kept of, all if None."""
        return None

    @property
    def updated(self) -> bool:
        """Whether there is a matrix: not before the first update, nor between `rebind` and the next one."""
        return self._shapes is not None and not self._anew

    @property
    def shapes(self) -> Rows:
        """Rows of zeros, without memory, that say which layers there are, and the shapes, type and device of the last batch.

        Raises:
            StateError: before the first update.
        """
        if self._shapes is None:
            raise StateError(f"{type(self).__name__} has no state yet: call update(rows) or use fit(…).")
        return self._shapes

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters."""
        return self.shapes.space

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the state."""
        return self.shapes.dtype

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.shapes.device

    @property
    def count(self) -> float:
        """Divisor that the loss applied to the data of the state.

        Counts of batches add where batches do (decay 1) and are averaged in a running average; 1 for sums.
        """
        return 1.0 if self.shapes.reduction == "sum" else float(self._counts.value)

    @property
    def rows(self) -> Rows:
        """The rows that `lift` speaks of: all rows of the state where blocks keep rows, else the last batch's.

        Raises:
            StateError: if the state keeps no rows and the last batch is forgotten, as after `fit` and in copies.
        """
        self._ready()
        found = self._merged or self._latest
        if found is None:
            raise StateError(
                f"{type(self).__name__} averages and keeps no rows, and its last batch is forgotten. For rows S at hand, "
                "solve(S.rmatvec(coefficients), damping) does what lift does."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in containers that `torch.load(…, weights_only=True)` accepts; without configuration.

        Raises:
            StateError: before the first update, and between `rebind` and the next one.
        """
        self._ready()
        return {
            "key": self.key,
            "shapes": pack_rows(self.shapes),
            "kept": [(decay, pack_rows(rows)) for decay, rows in self._kept],
            "counts": self._counts.state(),
            "blocks": pack_blocks(self._blocks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state into a structure of the same class and configuration.

        Raises:
            ValueError: if the state is that of another structure, or its blocks are not those of this configuration.
        """
        if (key := state.get("key")) != self.key:
            raise ValueError(f"This is the state of a {key!r} structure, not of {self.key!r}.")
        shapes = unpack_rows(state["shapes"])
        blocks = self._cut(shapes)
        restore_blocks(blocks, state["blocks"])
        self._shapes, self._blocks, self._anew, self._latest, self._largest = shapes, blocks, [], None, None
        self._counts.restore(state["counts"])
        self._merge([(decay, unpack_rows(packed)) for decay, packed in state["kept"]])


def _check_rows_of_fisher(rows: object) -> None:
    if isinstance(rows, Rows) and rows.kind != "jacobian":
        return
    what = "of the Jacobian" if isinstance(rows, Rows) else f"from {what_was_given(rows)}; fit takes model and data"
    raise ValueError(f"A structure is built from rows of S (curvlab.sqrt_fisher), not {what}.")


def _add_count(counts: RunningAverage, rows: Rows, decay: float, total: Total | None = None) -> None:
    """Add the count of a batch, of all processes if `total` sums over them, to those of the batches before it."""
    count = torch.tensor(rows.count, dtype=torch.float64, device="cpu" if total is None else rows.device)
    counts.update(count if total is None else total(count).cpu(), 1.0, decay, additive=True)


def _counted(batches: Iterable[tuple[float, Rows]]) -> RunningAverage:
    """Return the counts of batches, each with the decay of those before it."""
    counts = RunningAverage()
    for decay, rows in batches:
        _add_count(counts, rows, decay)
    return counts
