"""What describes a pass: which rows are made of it, of which outputs, how; and what a model is called on in it.

Public functions take these as keywords, and hand on one `Pass`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import unknown_name
from curvlab.nn import Linearized
from curvlab.rows.loss import Kind, LossTerms, identity_cotangents
from curvlab.rows.samples import NodeChoice, Samples, samples_of
from curvlab.rows.sweep import Arguments, PickOutput, as_arguments, call

Engine = Literal["auto", "backpack", "autograd"]

Share = Callable[[int, torch.device], tuple[int, int]]
"""Returns, for a number of samples, where they start in a larger batch that is drawn in parts, and how many that has."""


@dataclass(frozen=True)
class ModelInputs:
    """What a model is called on, what a sample is in it, and which output is meant."""

    arguments: Arguments
    samples: Samples
    output: PickOutput = None

    def outputs(self, model: nn.Module) -> Float[Tensor, "N C ..."]:
        """Call the model, and return the outputs that carry rows, as the loss takes them; see `call`."""
        return self.samples.choose(call(model, self.arguments, self.output))


@dataclass(frozen=True)
class Pass:
    """Which rows a pass makes, and how.

    Attributes:
        kind: as in `curvlab.sqrt_fisher`; like `draws`, `generator`, `share` and `joint` of no meaning for rows of J.
        draws: random rows of a loss term, for "mc".
        generator: source of the draws, for "mc".
        nodes: of a graph, those that carry rows: a mask, indices, or a function of the inputs.
        output: which tensor of a structured output: a key, an attribute, an index or a function.
        engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
        dtype: of the rows and of products with them; the parameters' widest if None.
        keep_jacobian: as in `curvlab.sqrt_fisher`.
        share: with generators in one state for all parts of a batch, their draws are those of the whole.
        joint: whether all positions of a sample share a row of kind "mc" or "empirical", or each has its own. Joint, an
            "empirical" row is the sample's whole gradient, √count times its share.

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
    joint: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_name("kind", self.kind, get_args(Kind))
        if self.kind != "mc" and self.draws != 1:
            raise ValueError(f"draws={self.draws} has a meaning for kind='mc' only, not for {self.kind!r}.")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}.")
        if self.kind == "mc" and self.generator is None:
            raise ValueError("kind='mc' draws at random: pass generator=torch.Generator().manual_seed(…).")

    @property
    def spans_outputs(self) -> bool:
        """Whether S is made of J by the root of the output Hessian."""
        return self.kind in ("exact", "ggn")

    @property
    def single(self) -> bool:
        """Whether there is one row an output vector."""
        return not self.spans_outputs and self.draws == 1

    def read(self, model: nn.Module, inputs: Any) -> ModelInputs:
        """Tell the arguments of a model, and what a sample is."""
        arguments = as_arguments(inputs)
        called = model.base if isinstance(model, Linearized) else model
        return ModelInputs(arguments, samples_of(called, inputs, arguments, self.nodes), self.output)

    def at_output(self, terms: LossTerms) -> Float[Tensor, "V N ..."]:
        """Return the rows of S at the output."""
        if self.kind == "empirical":
            return terms.empirical(joint=self.joint)
        if self.kind == "mc":
            assert self.generator is not None
            share = None if self.share is None else self.share(len(terms.z), terms.z.device)
            return terms.sampled(self.draws, self.generator, joint=self.joint, share=share)
        return terms.root().apply(identity_cotangents(terms.z).flatten(2))
