"""What describes a pass: which rows are made of it, of which outputs, how; and what a model is called on in it.

Public functions take these as keywords, and hand on one `Pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import unknown_name
from curvlab.nn import Linearized
from curvlab.nn.modes import check_module
from curvlab.rows.loss import Draws, Kind, LossTerms, RowPer, identity_cotangents, one_row_a_position
from curvlab.rows.samples import NodeChoice, Samples, samples_of
from curvlab.rows.sweep import Arguments, PickOutput, as_arguments, call
from curvlab.tools.generators import check_generator

Engine = Literal["auto", "backpack", "autograd"]

PER: Mapping[Kind, tuple[RowPer, ...]] = {
    "exact": ("term",),
    "ggn": ("term",),
    "mc": ("sample", "term"),
    "empirical": ("term", "sample", "signs", "batch"),
}
"""What a row of each kind can stand for, the usual first."""

Share = Callable[[int, torch.device], tuple[int, int]]
"""Returns, for a number of samples, where they start in a larger batch that is drawn in parts, and how many that has."""


@dataclass(frozen=True)
class ModelInputs:
    """What a model is called on, what a sample is in it, and which output is meant.

    Attributes:
        plain: whether a plain backward pass brings back its rows, see `Pass`.
    """

    arguments: Arguments
    samples: Samples
    output: PickOutput = None
    plain: bool = False

    def outputs(self, model: nn.Module) -> Float[Tensor, "N C ..."]:
        """Call the model, and return the outputs that carry rows, as the loss takes them; see `call`."""
        return self.samples.choose(call(model, self.arguments, self.output))


@dataclass(frozen=True)
class Pass:
    """Which rows a pass makes, and how.

    Attributes:
        kind: as in `curvlab.sqrt_fisher`; like `draws`, `generator`, `share` and `rows` of no meaning for rows of J.
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws.
        nodes: of a graph, those that carry rows: a mask, indices, or a function of the inputs.
        output: which tensor of a structured output: a key, an attribute, an index or a function.
        engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
        dtype: of the rows and of products with them; the parameters' widest if None.
        keep_jacobian: as in `curvlab.sqrt_fisher`.
        share: with generators in one state for all parts of a batch, their draws are those of the whole.
        rows: what a row stands for, as in `curvlab.sqrt_fisher`; what is usual for the kind if None.

    Raises:
        ValueError: for an unknown kind, and for draws that do not fit it.
    """

    kind: Kind = "exact"
    draws: int = 1
    generator: torch.Generator | None = None
    nodes: NodeChoice = None
    output: PickOutput = None
    engine: Engine = "auto"
    dtype: torch.dtype | None = None
    keep_jacobian: bool = True
    share: Share | None = None
    rows: RowPer | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_name("kind", self.kind, get_args(Kind))
        if self.rows is not None and self.rows not in get_args(RowPer):
            raise unknown_name("rows", self.rows, get_args(RowPer))
        if self.per not in PER[self.kind]:
            known = " or ".join(map(repr, PER[self.kind]))
            raise ValueError(f"rows={self.rows!r} does not exist for kind={self.kind!r}: use {known}.")
        if not self.random and self.draws != 1:
            raise ValueError(
                f"draws={self.draws} has a meaning for kind='mc' and for rows='signs' only, not for {self.kind!r}."
            )
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}.")
        check_generator(self.generator)
        if not isinstance(self.dtype, torch.dtype | None):
            raise ValueError(f"dtype is a type such as torch.float64, got {self.dtype!r}.")
        if self.random and self.generator is None:
            what = "kind='mc'" if self.kind == "mc" else "rows='signs'"
            raise ValueError(f"{what} draws at random: pass generator=torch.Generator().manual_seed(…).")

    @property
    def per(self) -> RowPer:
        """What a row stands for."""
        return self.rows or PER[self.kind][0]

    @property
    def random(self) -> bool:
        """Whether rows are drawn."""
        return self.kind == "mc" or self.per == "signs"

    @property
    def spans_outputs(self) -> bool:
        """Whether S is made of J by the root of the output Hessian."""
        return self.kind in ("exact", "ggn")

    @property
    def single(self) -> bool:
        """Whether there is one row an output vector."""
        return not self.spans_outputs and self.draws == 1

    @property
    def plain(self) -> bool:
        """Whether there is one row a sample, whatever the loss, so that the sweep is a plain backward pass."""
        return self.per != "term" and self.draws == 1

    def read(self, model: nn.Module, inputs: Any) -> ModelInputs:
        """Tell the arguments of a model, and what a sample is."""
        check_module(model)
        arguments = as_arguments(inputs)
        called = model.base if isinstance(model, Linearized) else model
        return ModelInputs(arguments, samples_of(called, inputs, arguments, self.nodes), self.output, self.plain)

    def at_output(self, terms: LossTerms) -> Float[Tensor, "V N ..."]:
        """Return the rows of S at the output."""
        if self.spans_outputs:
            return terms.root().apply(identity_cotangents(terms.z).flatten(2))
        rows = self.together(terms)
        return one_row_a_position(rows) if self.per == "term" else rows

    def together(self, terms: LossTerms) -> Float[Tensor, "K N C X"]:
        """Return the rows of S at the output, those of all positions of a sample in one tensor; of kinds with few rows.

        Where a row stands for a term, those of different positions are rows of their own.
        """
        draws = self._draws(terms.z) if self.random else None
        if self.kind == "empirical":
            return terms.empirical(self.per, draws)
        assert draws is not None
        return terms.sampled(draws)

    def _draws(self, z: Float[Tensor, "N C X"]) -> Draws:
        assert self.generator is not None
        return Draws(self.draws, self.generator, None if self.share is None else self.share(len(z), z.device))
