"""Fisher matrices of every kind as operators, by the rows of S.

    F v = Sᵀ(S v)

The rows are swept once and kept until a parameter changes. After that a product costs two passes over the factored rows,
whatever the depth: on a tanh network 784-100-100-10 with 500 samples 0.5 to 0.9 times a product of `GGN`, the sweep about
as much as one. So `GGN` is for a few products at each of many points, and for losses and layers that have no rows; this
is for many products at one point, and for the kinds that are no Gauss-Newton matrix.

Rows of the outputs to a vocabulary do not fit into memory. With `keep_rows=False` a product is

    F v = Jᵀ (Σ_k r_k r_kᵀ) J v

with rows r at the output alone, at the cost of one of `GGN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from curvlab.errors import StateError, Weightless
from curvlab.rows import Rows, merge
from curvlab.rows.batches import Data
from curvlab.rows.loss import Kind, RowPer
from curvlab.rows.loss.terms import weightless
from curvlab.rows.making import rows_of_loss
from curvlab.rows.owners import trainable
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.passes import Engine, Pass, Share
from curvlab.rows.processes import Processes
from curvlab.rows.sharded import own_part, whole
from curvlab.rows.sweep import PickOutput
from curvlab.spectrum.autodiff import GGN
from curvlab.spectrum.objective import repeatable
from curvlab.spectrum.operator import Operator, RowsOperator
from curvlab.spectrum.outer import OuterProducts
from curvlab.spectrum.selection import choose, restricted


class Fisher(Operator):
    """The Fisher matrix of a kind, at the parameters that the model has when a product is asked for.

    Args:
        model: any module whose samples do not interact. It is left as it was found.
        loss: a module of `curvlab.rows.loss.LOSSES` or of one's own, see `curvlab.sqrt_fisher`.
        data: one pair (inputs, targets), or an iterable of pairs such as a DataLoader.
        kind: "exact", "ggn", "mc" or "empirical", see `curvlab.sqrt_fisher`.
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws; every sweep starts from the state that it has now.
        rows: what a row stands for, where a sample has several loss terms: "term", "sample", "signs" or "batch", see
            `curvlab.sqrt_fisher`.
        parameters: names of parameters, or of modules for all parameters below them; all trainable ones if None.
        output: which tensor of a structured output to use.
        engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
        group: processes that have a part of the data each and ask for the same products, such as
            `torch.distributed.group.WORLD`; `rows` are those of this process then. None for this one with all data.
        keep_rows: whether the rows are swept and kept. If not, every product takes passes through the model, and samples may
            interact; kinds "mc" and "empirical" take vectors one at a time.

    Raises:
        UnsupportedModel, ValueError: see `curvlab.sqrt_fisher`; and for data that are empty or can be passed once only.

    Cost: one sweep of the data whenever the parameters have changed, and the memory of all rows; without rows that of `GGN`,
    for "mc" and "empirical" with the memory of a few outputs more.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        data: Data,
        *,
        kind: Kind = "exact",
        draws: int = 1,
        generator: torch.Generator | None = None,
        rows: RowPer | None = None,
        parameters: str | Sequence[str] | None = None,
        output: PickOutput = None,
        engine: Engine = "auto",
        keep_rows: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        self.model, self.loss, self.batches, self.processes = model, loss, repeatable(data), Processes.of(group)
        self.how = Pass(kind, draws, generator, output=output, engine=engine, rows=rows, share=self._share)
        self._state = None if generator is None else generator.get_state()
        own = trainable(whole(model))
        names = choose(own, parameters)
        if not names:
            raise ValueError("parameters=[] leaves no column; leave it out for all of them.")
        self.space = ParameterSpace({name: own[name].shape for name in names})
        first = own[names[0]]
        self.dtype, self.device = first.dtype, first.device
        self._names = names
        self._by_passes: Operator | None = None
        if keep_rows:
            self._at, self._rows = self._parameters(), self._sweep()
        elif self.how.kind in ("exact", "ggn"):
            self._by_passes = GGN(
                model, loss, data, kind=self.how.kind, parameters=parameters, output=output, group=group
            )
        else:
            self._by_passes = OuterProducts(model, loss, data, self.how, parameters, group)

    @property
    def rows(self) -> Rows:
        """The rows S at the model's present parameters.

        Raises:
            StateError: with `keep_rows=False`.
        """
        if self._by_passes is not None:
            raise StateError("With keep_rows=False there are no rows; curvlab.sqrt_fisher returns them.")
        at = self._parameters()
        changed = not torch.equal(at, self._at)
        if changed if self.processes is None else self.processes.any(changed, self.device):
            self._at, self._rows = at, self._sweep()
        return self._rows

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:  # noqa: D102
        if self._by_passes is not None:
            return self._by_passes.matmat(block)
        rows = self.rows
        product = RowsOperator(rows).matmat(block)
        if self.processes is None:
            return product
        if rows.reduction == "sum":
            return self.processes.total(product)
        terms = self.processes.total(torch.tensor(rows.terms, dtype=torch.float64, device=self.device))
        return self.processes.total(product * (rows.terms / float(terms)))

    @property
    def _share(self) -> Share | None:
        """With several processes, a batch is part of a larger one, so that none of its targets need count."""
        return None if self.processes is None else lambda samples, _: (0, samples)

    def _parameters(self) -> Float[Tensor, " Q"]:
        """Copy all parameters, of a sharded model those of this process, frozen ones and those that are left out included."""
        return torch.cat([own_part(p.detach()).flatten() for p in self.model.parameters()])

    def _sweep(self) -> Rows:
        model = whole(self.model)
        with nullcontext() if self.processes is None else self.processes.together():
            rows = self._rows_of(model)
        if self.processes is not None:
            terms = torch.tensor(rows.terms, dtype=torch.float64, device=self.device)
            if not self.processes.total(terms):
                raise weightless()
        return rows

    def _rows_of(self, model: nn.Module) -> Rows:
        if self.how.generator is not None and self._state is not None:
            self.how.generator.set_state(self._state)
        parts: list[Rows] = []
        without: Weightless | None = None
        for inputs, targets in self.batches:
            try:
                parts.append(rows_of_loss(model, self.loss, inputs, targets, self.how))
            except Weightless as error:
                without = error
        if not parts:
            raise without or ValueError("The data hold no batch: they are empty, or can be passed once only.")
        return restricted(merge(parts), self._names)
