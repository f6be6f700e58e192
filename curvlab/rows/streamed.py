"""The Gram matrix of more rows than memory holds.

Samples are cut into chunks. As many chunks as fit stay in memory, a panel; rows of all later chunks are formed once more
for every panel, multiplied with it and forgotten:

    panel       chunks 0 … k       products among themselves
    for every later chunk          rows, product with the panel
    next panel  chunks k+1 …       and so on
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil, isqrt
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from curvlab.nn import GaussianNLL, Scaled, WeightedCrossEntropy
from curvlab.rows.batches import joined
from curvlab.rows.loss import LOSSES, Kind, RowPer, bound_to_samples, held_by_sample, loss_terms
from curvlab.rows.loss.terms import weightless
from curvlab.rows.making import rows_of_loss, rows_of_model
from curvlab.rows.packed import entries_of, lengths, part_of
from curvlab.rows.passes import Engine, Pass
from curvlab.rows.processes import Processes, spread
from curvlab.rows.rows import Rows
from curvlab.rows.rows import gram as product
from curvlab.rows.sharded import whole
from curvlab.rows.sweep import PickOutput, as_arguments, call, left_as_found
from curvlab.tools.progress import progress as showing
from curvlab.tools.text import as_bytes, size

PROBED = 2
"""Samples of which the rows are formed to tell how large those of others are."""

BY_SAMPLE: dict[type[nn.Module], str] = {
    WeightedCrossEntropy: "weights",
    GaussianNLL: "variance",
    nn.BCEWithLogitsLoss: "weight",
    nn.BCELoss: "weight",
}
"""Losses that may hold a tensor of the targets' axes, the first of which is the sample."""


def gram(
    model: nn.Module,
    data: Any,
    *,
    loss: nn.Module | None = None,
    kind: Kind = "exact",
    draws: int = 1,
    generator: torch.Generator | None = None,
    rows: RowPer | None = None,
    memory: int | str = "1GiB",
    out: Float[Tensor, "R R"] | None = None,
    output: PickOutput = None,
    engine: Engine = "auto",
    progress: bool = False,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "R R"]:
    """Return `J Jᵀ`, or `S Sᵀ` if there is a loss, within a given memory beside the result.

    It equals `curvlab.jacobian(model, inputs).gram()`, or that of `curvlab.sqrt_fisher` for all data at once, to rounding.

    Args:
        model: any module whose samples do not interact, as in `curvlab.jacobian`.
        data: inputs, or a pair (inputs, targets) with a loss; the first axis of every tensor in them is the sample, of
            targets perhaps with positions folded into it. Or an iterable of such pairs such as a DataLoader, which are
            joined; its targets count with a loss only.
        loss: a module of `curvlab.rows.loss.LOSSES` or of one's own, see `curvlab.sqrt_fisher`; rows of J if None.
        kind: "exact", "ggn", "mc" or "empirical", see `curvlab.sqrt_fisher`; has a meaning with a loss only.
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws, required for them; draws do not depend on `memory`.
        rows: what a row stands for, where a sample has several loss terms: "term", "sample" or "signs", see
            `curvlab.sqrt_fisher`. There is no Gram matrix of the one row of a batch.
        memory: workspace, in bytes or as "2GiB". Half of it holds rows between uses, a quarter rows that are being formed, a
            quarter their products. Layers applied at several positions take up to three tensors of 2²⁵ elements more.
        out: where to write the result, e.g. a memory-mapped tensor; allocated if None.
        output: which tensor of a structured output: a key, an attribute, an index or a function.
        engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
        progress: whether to show it, on stderr.
        group: processes that are given the same data, with generators in the same state, and share out the work, such as
            `torch.distributed.group.WORLD`; each gets the whole matrix. None for this one alone.

    Raises:
        UnsupportedModel: as in `curvlab.sqrt_fisher`, and for a loss of one's own that holds one entry a sample.
        ValueError: for data that do not fit the above, targets without weight, or an `out` of another shape or type.
        MemoryError: if the rows of one sample do not fit.

    Cost: the products of `Rows.gram`, and `(B + 1)/2` sweeps over the data, B being the size of all rows over half of the
    workspace, rounded up.
    """
    how = Pass(kind, draws, generator, output=output, engine=engine, rows=rows)
    if how.per == "batch":
        raise ValueError(
            "rows='batch' makes one row, of which there is no Gram matrix: use 'term', 'sample' or 'signs'."
        )
    processes = Processes.of(group)
    chunks = _Chunks(whole(model), loss, _whole(data, loss), how)
    first = chunks.probe()
    V, dtype = first.shape[0], first.dtype
    R, budget = V * chunks.total, as_bytes(memory)
    step, panel = _plan(first, budget, chunks.total, 1 if processes is None else processes.size)
    if out is None:
        out = torch.empty(R, R, dtype=dtype, device=first.device)
    elif out.shape != (R, R) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, [{R}, {R}] and {dtype}; it is {list(out.shape)} and {out.dtype}.")
    view = out.view(V, chunks.total, V, chunks.total)
    parts = [slice(k, min(k + step, chunks.total)) for k in range(0, chunks.total, step)]
    chunks.check_loss(parts)
    terms = torch.zeros(chunks.total, dtype=torch.float64, device="cpu")
    last = len(parts)
    panels = list(range(0, last, panel))
    if processes is not None:
        owners = spread([last - start for start in panels], processes.size)
        panels = [start for start, owner in zip(panels, owners, strict=True) if owner == processes.rank]
        out.zero_()
    work = {_label(p, k): float(min(k - p, panel) + 1) for p in panels for k in range(p, last)}
    together = nullcontext() if processes is None else processes.together()
    with together, showing(Console(stderr=True), work, not progress, unit="chunks") as advance:
        for start in panels:
            held: list[Rows] = []
            for k, part in enumerate(parts[start:], start):
                found = chunks.rows(part)
                for other, earlier in zip(parts[start:], held, strict=False):
                    block = product(earlier.layers, found.layers).view(*earlier.shape, *found.shape)
                    view[:, other, :, part] = block
                    view[:, part, :, other] = block.permute(2, 3, 0, 1)
                if k < start + panel:
                    terms[part] = found.terms / (part.stop - part.start)
                    view[:, part, :, part] = found.gram().view(*found.shape, *found.shape)
                    held.append(found)
                advance(_label(start, k), "done", False)
    if processes is not None:
        processes.total_(out)
        terms = processes.total(terms.to(out.device)).cpu()
    if first.reduction == "mean":
        _merge(view, terms, parts)
    return out


def _whole(data: Any, loss: nn.Module | None) -> Any:
    """Return inputs, or a pair (inputs, targets) with a loss, of all samples."""
    if loss is not None:
        return joined(data)
    return data if isinstance(data, Tensor | Mapping | tuple) else joined(data)[0]


def _label(panel: int, chunk: int) -> str:
    return f"chunk {chunk + 1} of the panel from {panel + 1}"


def bytes_of(rows: Rows) -> int:
    """Return the memory of the factors of rows."""
    return sum(factor.numel() * factor.element_size() for layer in rows.layers for factor in layer.factors)


def _plan(first: Rows, budget: int, total: int, processes: int) -> tuple[int, int]:
    """Return the samples of a chunk, and the chunks of a panel, of which each process has two if there are several."""
    V, N = first.shape
    each = ceil(bytes_of(first) / N)
    # While rows of S are formed there are those of J, too, and twice as much in the sweep.
    forming = budget // (4 * 4 * each)
    multiplying = isqrt(budget // (4 * 2 * first.layers[0].row_factors[-1].element_size())) // V
    step = min(total, forming, multiplying)
    if step < 1:
        needed = max(16 * each, 8 * V**2 * first.layers[0].row_factors[-1].element_size())
        raise MemoryError(
            f"The rows of one sample take {size(each)}, so memory must be at least {size(needed)}; it is {size(budget)}."
        )
    held = max(1, budget // (2 * step * each))
    if processes == 1:
        return step, held
    step = min(step, ceil(total / (2 * processes)))
    return step, min(held, ceil(ceil(total / step) / (2 * processes)))


def _merge(view: Float[Tensor, "V N V N"], terms: Float[Tensor, " N"], parts: Sequence[slice]) -> None:
    """Turn means over chunks into the mean over all samples: S of a chunk by √(terms of it / terms of all)."""
    whole = float(terms.sum())
    if whole == 0:
        raise weightless()
    scale = torch.cat([(terms[part].sum() / whole).sqrt().expand(part.stop - part.start) for part in parts]).to(view)
    view *= scale
    view *= scale[:, None, None]


@dataclass(frozen=True, eq=False)
class _Chunks:
    """Rows of some of the samples, as often as they are asked for."""

    model: nn.Module
    loss: nn.Module | None
    data: Any
    how: Pass

    def __post_init__(self) -> None:
        found, folded = lengths(self._inputs), lengths(self.data)
        if len(found) != 1 or 0 in found or any(n % self.total for n in folded):
            raise ValueError(
                "The first axis of every tensor in the data must be the sample, of targets perhaps with positions folded into "
                f"it, but their lengths are {sorted(folded)}."
            )
        if self.how.generator is not None:
            object.__setattr__(self, "_start", self.how.generator.get_state())

    @property
    def _inputs(self) -> Any:
        return self.data if self.loss is None else self.data[0]

    @property
    def total(self) -> int:
        """Number of samples."""
        (total,) = lengths(self._inputs)
        return total

    def probe(self) -> Rows:
        """Return rows of a few samples."""
        return self.rows(slice(0, min(PROBED, self.total)))

    def check_loss(self, parts: Sequence[slice]) -> None:
        """Refuse a loss of the user's own that is no sum over samples, which parts of them need not show."""
        if self.loss is None or not _is_own(self.loss) or len(parts) == 1:
            return
        with torch.no_grad(), left_as_found(self.model):
            outputs = [
                call(self.model, as_arguments(part_of(self._inputs, part, self.total)), self.how.output)
                for part in parts
            ]
            loss_terms(self.loss, torch.cat(outputs), self.data[1])

    def rows(self, part: slice) -> Rows:
        """Return the rows of some samples, without those of J behind them."""
        chosen = part_of(self.data, part, self.total)
        if self.loss is None:
            return rows_of_model(self.model, chosen, self.how)
        if self.how.generator is not None:
            self.how.generator.set_state(self._start)  # type: ignore[attr-defined]
        inputs, targets = chosen
        loss = _of_samples(self.loss, targets, part, self.total)
        try:
            how = replace(self.how, share=lambda *_: (part.start, self.total))
            rows = rows_of_loss(self.model, loss, inputs, targets, how)
        except (RuntimeError, ValueError, IndexError) as error:
            if part.stop - part.start == self.total or not (_is_own(loss) or held_by_sample(loss, self.total)):
                raise
            raise bound_to_samples(loss, self.total, error) from error
        return replace(rows, _jacobian=None)


def _of_samples(loss: nn.Module, targets: Any, part: slice, total: int) -> nn.Module:
    """Return a loss on some of the samples, of one that may hold an entry for each."""
    own = copy.copy(loss)
    own._buffers = dict(loss._buffers)
    own._modules = dict(loss._modules)
    if isinstance(own, Scaled):
        own.loss = _of_samples(own.loss, targets, part, total)
    name = BY_SAMPLE.get(type(own))
    value = None if name is None else getattr(own, name)
    if name is None or value is None or not isinstance(targets, Tensor):
        return own
    whole = len(targets) // (part.stop - part.start) * total
    if value.ndim == targets.ndim and len(value) == whole:
        setattr(own, name, value[entries_of(part, len(value), total)])
    return own


def _is_own(loss: nn.Module) -> bool:
    """Whether a loss, or one inside it, is the user's own."""
    return any(type(part) not in LOSSES for part in loss.modules())
