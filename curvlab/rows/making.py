"""The rows of a model: the Jacobian J, and S with SᵀS the Fisher matrix.

    S = Λ^{1/2} J / √count

One backward sweep gives both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from curvlab.nn.modes import without_autocast
from curvlab.rows.engine import checked_stream, checked_sweep
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import Kind, LossTerms, RowPer, flat_outputs, identity_cotangents
from curvlab.rows.owners import trainable, widest
from curvlab.rows.parameters import ParameterSpace
from curvlab.rows.passes import Engine, Pass
from curvlab.rows.rows import Rows, batch_row
from curvlab.rows.samples import NodeChoice, Samples
from curvlab.rows.sweep import MakeCotangents, PickOutput, SweepResult, savable


def jacobian(
    model: nn.Module,
    inputs: Any,
    *,
    nodes: NodeChoice = None,
    output: PickOutput = None,
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Return the rows of J, the Jacobian of the outputs with respect to the trainable parameters.

    Row `(c, n)` is the gradient of output c of sample n, unscaled; extra output axes follow c, innermost last.

    Args:
        model: any module whose samples do not interact, or a graph network. It is left as it was found.
        inputs: a tensor, a tuple (unpacked), a dict (keywords), or torch-geometric's `Data` or `Batch`, which the model is
            called on. The first axis is the sample. Outputs `[N·T, C]` of N samples, as many as the first input has, are T
            positions of each, one sample after the other: their rows are those of the same outputs as `[N, C, T]`. In a
            batch of separate graphs with one output vector each, the graph is the sample; the batch is known by the names
            `edge_index` and `batch`, in order where it is alone, of `Data`, of keywords or of the model's arguments.
        nodes: for outputs `[N, C]` of the nodes of a graph, which interact: a mask or indices of those that carry rows, or a
            function that chooses them given the inputs. Rows `(c, n)` of the L chosen nodes are `V = C·L` rows of one
            sample, the graph, in the same order.
        output: which tensor of a structured output to use: a key, an attribute, an index or a function.
        engine: "backpack" for chains of modules that BackPACK knows, "autograd" for any architecture; "auto" takes the first
            that applies, and autograd where there is one row a sample, a plain backward pass. It logs which and why.
        dtype: floating-point type of the rows and of all products with them; the parameters' widest if None. The sweep is in
            the model's own type, or in that of `torch.autocast`, whose round-off it keeps: relative errors of rows and Gram
            matrices are a small multiple of 4e-3 for bfloat16, of 6e-8 for float32.

    Raises:
        UnsupportedModel: names the layer, the reason and the remedy.
        ValueError: for no samples, non-finite outputs or an unknown engine.

    Cost: one forward and one batched backward pass with V = C rows; memory `V` times the layers' outputs.
    """
    return rows_of_model(model, inputs, Pass(nodes=nodes, output=output, engine=engine, dtype=dtype))


@torch.inference_mode(False)
@without_autocast()
def rows_of_model(model: nn.Module, inputs: Any, how: Pass) -> Rows:
    """Return the rows of J; see `jacobian`. The kind of rows has no meaning here."""
    how = replace(how, kind="exact", draws=1, rows=None)
    asked = how.read(model, inputs)
    rows = _jacobian_rows(model, checked_sweep(model, asked, _every_output(asked.samples), how))
    return rows.to(how.dtype or widest(trainable(model).values()))


def sqrt_fisher(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    kind: Kind = "exact",
    *,
    draws: int = 1,
    generator: torch.Generator | None = None,
    rows: RowPer | None = None,
    nodes: NodeChoice = None,
    output: PickOutput = None,
    engine: Engine = "auto",
    dtype: torch.dtype | None = None,
    keep_jacobian: bool = True,
) -> Rows:
    """Return the rows of S, with `SᵀS` the Fisher matrix of the loss that is passed, its own factors included.

    Args:
        model: any module whose samples do not interact, or a graph network. It is left as it was found.
        loss: one of `curvlab.rows.loss.LOSSES` with reduction "mean" or "sum", or any twice-differentiable loss of one
            output tensor that has an attribute `reduction`, such as `curvlab.nn.PerSample(function)`.
        inputs: a tensor, a tuple (unpacked), a dict (keywords), or a graph, as in `jacobian`.
        targets: as the loss takes them; with `nodes=`, those of the chosen nodes.
        kind: "exact" for the Fisher matrix of the model's own distribution (type 2, equal to the GGN for these losses);
            "ggn" for the generalised Gauss-Newton matrix, also of losses whose Hessian depends on the targets and is no
            Fisher matrix, which "exact" refuses; "mc" for a Monte-Carlo estimate of it; "empirical" for the
            gradients with the given targets (type 1).
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws, required for them.
        rows: what a row stands for, where a sample has several loss terms, such as tokens:

            - "term" for a row a loss term; the usual one of "empirical", and costs T times the others for T terms;
            - "sample" for one row a sample: of "mc" a row a draw, in which the terms' independent draws are added up, the
              usual one; of "empirical" the sample's whole gradient, which makes another matrix;
            - "signs" for "empirical" rows that are added up with random signs, one row a draw: in expectation the matrix of
              a row a term, at the cost of one;
            - "batch" for one "empirical" row, the gradient of the loss of the batch. A batch is then one sample.
        nodes: of a graph, those that carry rows: a mask, indices, or a function of the inputs.
        output: which tensor of a structured output: a key, an attribute, an index or a function.
        engine: "auto", "backpack" or "autograd", see `curvlab.jacobian`.
        dtype: of the rows and of products with them; the parameters' widest if None; the loss is taken apart in it, too.
        keep_jacobian: whether `Rows.jacobian` is to return the J behind "exact" and "ggn" rows. If not, Λ^{1/2} is applied
            at the outputs before the sweep and not to the rows of every layer after it: less time, and half the memory.

    Raises:
        UnsupportedModel: as in `jacobian`, for a loss that is not covered, and for one that has no rows of this kind.
        NotPositiveDefinite: for a loss of one's own with an indefinite Hessian at the outputs of some sample.
        ValueError: for targets that do not fit the outputs, and for options that contradict each other.

    Cost: as `jacobian` with V = C rows a term ("exact", "ggn"), or `draws` rows ("mc", signs) or one a sample; T times as much
    with rows="term".

    Source: `exact` and `empirical` as in Kunstner, Hennig & Balles 2019; count and weights as the loss applies them.
    """
    how = Pass(kind, draws, generator, nodes, output, engine, dtype, keep_jacobian, rows=rows)
    return rows_of_loss(model, loss, inputs, targets, how)


@torch.inference_mode(False)
@without_autocast()
def rows_of_loss(model: nn.Module, loss: nn.Module, inputs: Any, targets: Any, how: Pass) -> Rows:
    """Return the rows of S; see `sqrt_fisher`. Samples with a `share` of a larger batch may lack targets that count."""
    asked = how.read(model, inputs)
    at = _AtOutput(model, loss, targets, asked.samples, how)
    keeps = how.spans_outputs and how.keep_jacobian
    sweep_result = checked_sweep(model, asked, _every_output(asked.samples) if keeps else at.cotangents, how)
    terms = at.terms(sweep_result.output)
    root = terms.root() if how.spans_outputs else None
    base = _jacobian_rows(model, sweep_result).to(at.dtype) if keeps else None
    if base is None or root is None:
        layers = tuple(layer.to(at.dtype) for layer in sweep_result.layers)
    else:
        layers = tuple(layer.map_rows(root.apply) for layer in base.layers)
    found = replace(at.rows(terms), layers=layers, _jacobian=base, root=root)
    return batch_row([found]) if how.per == "batch" else found


@torch.inference_mode(False)
@without_autocast()
def stream_of_loss(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Any,
    how: Pass,
    open_: Callable[[Rows], Callable[[LayerRows], None]],
    *,
    anew: bool = False,
    whole: bool = False,
) -> None:
    """Hand on the rows of S layer by layer, so that those of all layers need not be in memory; see `sqrt_fisher`.

    Args:
        model: as in `sqrt_fisher`.
        loss: as there.
        inputs: as there.
        targets: as there.
        how: which rows.
        open_: is given rows without layers, and returns what takes the rows of one layer after the other.
        anew: whether it can be called anew, to make up for rows that turn out wrong.
        whole: whether the rows of a layer have to come in one part; if not, many rows come in parts, all of the same samples.
    """
    asked = how.read(model, inputs)
    at = _AtOutput(model, loss, targets, asked.samples, how)

    def opened(output: Tensor) -> Callable[[LayerRows], None]:
        rows = at.rows(at.terms(output))
        at.forget()
        of_batch = how.per == "batch"
        take = open_(replace(rows, sample_weights=rows.sample_weights.sum(0, keepdim=True)) if of_batch else rows)
        return lambda layer: take(layer.of_batch().to(at.dtype) if of_batch else layer.to(at.dtype))

    checked_stream(model, asked, at.cotangents, how, opened, anew=anew, whole=whole)


class _AtOutput:
    """The loss at the outputs of a model, and what rows of S have in common."""

    def __init__(self, model: nn.Module, loss: nn.Module, targets: Any, samples: Samples, how: Pass) -> None:
        self.model, self.loss, self.samples, self.how = model, loss, samples, how
        self.targets = tree_map_only(Tensor, savable, targets)
        self.dtype = how.dtype or widest(trainable(model).values())
        self._terms: LossTerms | None = None

    def terms(self, z: Tensor) -> LossTerms:
        """Take the loss apart, once for all that is asked of a pass."""
        if self._terms is None:
            dtype = self.how.dtype or torch.promote_types(z.dtype, self.dtype)
            self._terms = self.samples.terms(self.loss, z.to(dtype), self.targets)
            self._terms.check(self.how.kind, part=self.how.share is not None)
        return self._terms

    def forget(self) -> None:
        """Let go of the terms, which are several times as large as the outputs."""
        self._terms = None

    def cotangents(self, z: Tensor) -> Tensor:
        """Return the rows at the output, in the layout of rows."""
        return self.how.at_output(self.terms(z)).view(-1, *self.samples.lay_out(z).shape).to(z.dtype)

    def rows(self, terms: LossTerms) -> Rows:
        """Return rows without layers."""
        return Rows(
            layers=(),
            space=_space(self.model),
            kind=self.how.kind,
            count=terms.count,
            terms=terms.terms,
            reduction=terms.reduction,
            sample_weights=terms.sample_weights,
            per=self.how.per,
        )


def _every_output(samples: Samples) -> MakeCotangents:
    def make_cotangents(z: Tensor) -> Tensor:
        laid_out = samples.lay_out(z)
        return identity_cotangents(flat_outputs(laid_out)).view(-1, *laid_out.shape)

    return make_cotangents


def _space(model: nn.Module) -> ParameterSpace:
    return ParameterSpace({name: parameter.shape for name, parameter in trainable(model).items()})


def _jacobian_rows(model: nn.Module, sweep_result: SweepResult) -> Rows:
    samples = sweep_result.cotangents.shape[1]
    return Rows(
        layers=sweep_result.layers,
        space=_space(model),
        kind="jacobian",
        count=1.0,
        terms=float(samples),
        reduction="none",
        sample_weights=sweep_result.output.new_ones(samples),
    )
