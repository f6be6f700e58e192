"""Passes over a data set: with progress, and with checkpoints from which an interrupted fit goes on.

A checkpoint holds the structure's state after some batch, the state of the generator and fingerprints of the batches seen.
A fit that finds one checks that model, loss, options and data are those of the interrupted fit, skips the batches that are
done without a sweep, and ends in the same state to the last bit.

Several processes go over a part of the data each, without a word between them until the end of a pass, where their states are
added up.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from curvlab.errors import StateError, Weightless
from curvlab.fisher.intake import Intake
from curvlab.fisher.state import State
from curvlab.rows import Rows
from curvlab.rows.batches import as_pair, shuffles
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss.terms import weightless
from curvlab.rows.making import rows_of_loss, stream_of_loss
from curvlab.rows.passes import Pass
from curvlab.rows.processes import Processes
from curvlab.rows.products import CHUNK_ELEMENTS
from curvlab.tools import storage
from curvlab.tools.progress import progress

logger = logging.getLogger("curvlab")


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often the state is written.

    Attributes:
        path: of the file, which is replaced as a whole.
        every: seconds between two writings; the last state of every pass is written, too.
        identity: what has to be the same when a fit goes on, by name.
    """

    path: Path
    every: float
    identity: Mapping[str, str]


@dataclass
class FitProgress:
    """How far a fit has come.

    Attributes:
        number: of the pass, from 0.
        done: batches of this pass.
        absorbed: those among them that had targets with weight.
        seen: fingerprints of the batches of the first pass.
    """

    number: int = 0
    done: int = 0
    absorbed: int = 0
    seen: list[str] = field(default_factory=list)


class Kept:
    """The rows of an only batch, for the next pass over it, unless they are too many.

    Args:
        head: its rows, without layers.
    """

    def __init__(self, head: Rows) -> None:
        self.head = head
        self.complete = True
        self._parts: list[LayerRows] = []
        self._elements = 0

    def beside(self, take: Callable[[LayerRows], None]) -> Callable[[LayerRows], None]:
        """Return what keeps the rows of a layer, too."""

        def taking(layer: LayerRows) -> None:
            take(layer)
            self._elements += sum(factor.numel() for factor in layer.without_numbers().factors)
            self._parts.append(layer)
            if self._elements > CHUNK_ELEMENTS:
                self.complete = False
                self._parts.clear()

        return taking

    def replay(self, open_: Callable[[Rows], Callable[[LayerRows], None]]) -> None:
        """Hand on the rows again."""
        take = open_(self.head)
        for layer in self._parts:
            take(layer)


@dataclass
class Fitting:
    """Goes over the data as often as a structure needs it.

    Attributes:
        structure: takes the rows.
        rows_of: forms those of a batch.
        stream: hands on the rows of a batch layer by layer, for a structure that treats every layer by itself.
        batches: the data.
        generator: of draws; every pass starts from its present state.
        checkpoint: None to keep none.
        processes: those with a part of the data each; None for one with all.
        shows: whether to show progress, on stderr.
    """

    structure: State
    rows_of: Callable[[Any], Rows]
    stream: Callable[[Any, Callable[[Rows], Callable[[LayerRows], None]]], None]
    batches: Any
    generator: torch.Generator | None
    checkpoint: Checkpoint | None
    processes: Processes | None
    shows: bool

    def run(self) -> None:
        """Fit.

        Raises:
            ValueError: the data are empty, shuffled, differ between passes, or lack a length where progress is asked for.
            StateError: a checkpoint is damaged or of another fit, or another process failed.
        """
        self._check()
        self._start = None if self.generator is None else self.generator.get_state()
        self._at = FitProgress()
        self._keeping: Kept | None = None
        self._kept: Kept | None = None
        self._weight = 0.0
        self._written = time.monotonic()
        if self.checkpoint is not None and self.checkpoint.path.exists():
            self._restore(self.checkpoint)
        passes = self.structure.passes
        steps = {f"batch {k + 1} of pass {n + 1}": 1.0 for n in range(passes) for k in range(self._length())}
        labels = iter(steps)
        with progress(Console(stderr=True), steps, not self.shows, unit="batches") as advance:
            for number in range(passes):
                with nullcontext() if self.processes is None else self.processes.together():
                    found = 0
                    for batch in self._new_batches(number):
                        found += 1
                        if batch is not None:
                            self._absorb(batch, number)
                            self._at.done += 1
                            self._write(whenever=False)
                        if self.shows:
                            advance(next(labels), "skipped" if batch is None else "done", False)
                    self._check_found(number, found)
                if self.processes is not None:
                    self._add_up(self.processes, number)
                if number == self._at.number:
                    self._write(whenever=True)
                    if number + 1 < passes:
                        self._at.number, self._at.done, self._at.absorbed = number + 1, 0, 0

    def _add_up(self, processes: Processes, number: int) -> None:
        weight = torch.tensor(self._weight, dtype=torch.float64, device=self.structure.device)
        if not processes.total(weight):
            raise weightless()
        self.structure.add_up(processes, number)

    def _absorb(self, batch: Any, number: int) -> None:
        """Add a batch, unless none of its targets counts."""
        first = self._at.absorbed == 0
        try:
            if self.structure.by_layer:
                self._take_in(batch, number, first=first)
            elif number > 0:
                self.structure.refine(self.rows_of(batch), first=first)
            else:
                rows = self.rows_of(batch)
                self._weight += rows.terms
                self.structure.update(rows, 1.0)
        except Weightless:
            logger.info("Batch %d of pass %d has no target that carries weight.", self._at.done + 1, number + 1)
            return
        self._at.absorbed += 1

    def _take_in(self, batch: Any, number: int, *, first: bool) -> None:
        """Add a batch layer by layer; an intake that was opened anew has not changed anything."""
        intakes: list[Intake] = []
        keeps = self.structure.passes > 1 and hasattr(self.batches, "__len__") and len(self.batches) == 1

        def open_(head: Rows) -> Callable[[LayerRows], None]:
            self._weight += head.terms
            intakes.append(self.structure.intake(head, number, first=first))
            if not keeps or self._kept is not None:
                return intakes[-1].take
            self._keeping = Kept(head)
            return self._keeping.beside(intakes[-1].take)

        if self._kept is not None:
            self._kept.replay(open_)
        else:
            self.stream(batch, open_)
        self._kept = self._keeping if self._keeping is not None and self._keeping.complete else None
        self.structure.take_in(intakes[-1], number)

    def _length(self) -> int:
        if not self.shows:
            return 0
        if not hasattr(self.batches, "__len__"):
            raise ValueError("progress=True needs data with a length, such as a list or a DataLoader.")
        return len(self.batches)

    def _check(self) -> None:
        several = self.structure.passes > 1
        why = f"{type(self.structure).__name__} goes over the data twice" if several else "A checkpoint skips batches"
        if several and isinstance(self.batches, Iterator):
            raise ValueError(f"{why}: pass a list or a DataLoader, not an iterator.")
        if (several or self.checkpoint is not None) and shuffles(self.batches):
            raise ValueError(f"{why}, and the loader shuffles, so passes would differ: use shuffle=False.")

    def _new_batches(self, number: int) -> Iterator[Any]:
        """Yield the batches of a pass, None for one that is done."""
        if number < self._at.number:
            yield from [None] * len(self._at.seen)
            return
        if self.generator is not None and self._at.done == 0 and self._start is not None and self._kept is None:
            self.generator.set_state(self._start)
        done = self._at.done
        compared = self.checkpoint is not None or self.structure.passes > 1
        for index, batch in enumerate(self.batches):
            if compared:
                self._check_same(number, index, fingerprint(batch))
            yield None if index < done else batch

    def _check_same(self, number: int, index: int, found: str) -> None:
        seen = self._at.seen
        if number == 0 and index == len(seen):
            seen.append(found)
        elif index >= len(seen) or seen[index] != found:
            raise ValueError(
                f"Batch {index} of pass {number + 1} is not what it was before: the data are shuffled, augmented at random, or "
                "others. Use a loader that gives the same batches in the same order every time."
            )

    def _check_found(self, number: int, found: int) -> None:
        if found == 0:
            raise ValueError("The data hold no batch.")
        if number == self._at.number and self._at.absorbed == 0:
            raise weightless()
        if number == self._at.number and found < max(self._at.done, len(self._at.seen)):
            raise ValueError(f"Pass {number + 1} ended after {found} batches; there were {len(self._at.seen)} before.")

    def _write(self, *, whenever: bool) -> None:
        if self.checkpoint is None or not (whenever or time.monotonic() - self._written >= self.checkpoint.every):
            return
        content = {
            "identity": dict(self.checkpoint.identity),
            "number": self._at.number,
            "done": self._at.done,
            "absorbed": self._at.absorbed,
            "seen": self._at.seen,
            "start": self._start,
            "generator": None if self.generator is None else self.generator.get_state(),
            "state": self.structure.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            storage.write(self.checkpoint.path, buffer.getvalue())
        except storage.WriteError as error:
            raise StateError(
                f"checkpoint={str(self.checkpoint.path)!r} cannot be written: {error.__cause__}."
            ) from error
        self._written = time.monotonic()

    def _restore(self, checkpoint: Checkpoint) -> None:
        kept = io.BytesIO(checkpoint.path.read_bytes())
        try:
            self._take_up(torch.load(kept, weights_only=True), checkpoint)
        except (StateError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise StateError(
                f"{str(checkpoint.path)!r} is damaged, or not the checkpoint of a fit ({type(error).__name__}). Delete it, or "
                "choose another path."
            ) from error

    def _take_up(self, content: Any, checkpoint: Checkpoint) -> None:
        for name, value in checkpoint.identity.items():
            if content["identity"].get(name) != value:
                raise StateError(
                    f"{str(checkpoint.path)!r} is the checkpoint of another fit: {name} differs. Delete it, or choose another "
                    "path."
                )
        self._at = FitProgress(content["number"], content["done"], content["absorbed"], content["seen"])
        self._start = content["start"]
        if self.generator is not None:
            self.generator.set_state(content["generator"])
        self.structure.load_state_dict(content["state"])


def fit(
    structure: State,
    model: nn.Module,
    loss: nn.Module,
    batches: Any,
    how: Pass,
    checkpoint: tuple[Path, float] | None,
    processes: Processes | None,
    *,
    shows: bool,
) -> None:
    """Fit a structure to the rows that a pass describes; see `Structure.fit`.

    Args:
        structure: that has no state yet.
        model: as there.
        loss: as there.
        batches: as there.
        how: which rows.
        checkpoint: the file, and the seconds between two writings.
        processes: those with a part of the data each; None for one with all.
        shows: whether to show progress.
    """
    if processes is not None:
        if checkpoint is not None:
            raise ValueError("A checkpoint is that of a fit in one process: leave checkpoint, or leave group.")
        if structure.options.get("window") is not None:
            raise ValueError(
                "A window keeps the latest batches, and those of several processes have no order: leave one."
            )
        # Of all samples some have weight, even where those of a batch have none.
        how = replace(how, share=lambda samples, _: (0, samples))

    def rows_of(batch: Any) -> Rows:
        return rows_of_loss(model, loss, *as_pair(batch), how)

    def stream(batch: Any, open_: Callable[[Rows], Callable[[LayerRows], None]]) -> None:
        anew, whole = not structure.updated, structure.joins_positions
        stream_of_loss(model, loss, *as_pair(batch), how, open_, anew=anew, whole=whole)

    kept = None if checkpoint is None else Checkpoint(*checkpoint, identity(structure, model, loss, how))
    Fitting(structure, rows_of, stream, batches, how.generator, kept, processes, shows).run()


def identity(structure: State, model: nn.Module, loss: nn.Module, how: Pass) -> dict[str, str]:
    """Return what tells fits apart, by what to call it in messages."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "the structure": f"{structure.key} {_told(structure.options)}",
        "the model's state": fingerprint({name: tensor.detach() for name, tensor in tensors}),
        "the loss": fingerprint([(type(module).__name__, _settings(module)) for module in loss.modules()]),
        "the kind of rows": f"{how.kind} {how.draws} {how.per}",
    }


def _told(option: object) -> object:
    """Return an option with all that sets it apart; of a function where it is defined, as its address changes with the process."""
    if isinstance(option, State):
        return option.key, _told(option.options)
    if isinstance(option, Mapping):
        return {name: _told(value) for name, value in option.items()}
    return f"{option.__module__}.{option.__qualname__}" if isinstance(option, FunctionType) else option


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the tensors and plain attributes of a module."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, str | int | float | None)}
    return {**plain, **dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}


def fingerprint(batch: Any) -> str:
    """Return a digest of all tensors and numbers in a batch. Cost: one pass over them."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(batch.to_dict() if hasattr(batch, "to_dict") else batch):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(leaf, "to_dict"):
            digest.update(fingerprint(leaf).encode())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
