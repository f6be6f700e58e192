"""What a sample is: which entries along a first axis, of outputs and of layers' inputs, belong together.

    Samples        the first axis is the sample; samples do not interact
    Nodes          outputs `[N, C]` of nodes that interact: one sample, the chosen nodes its extra output axis
    Graphs         outputs `[B, C]` of separate graphs: a graph is a sample, its nodes and edges are positions

Rows of nodes are numbered as those of samples would be, `(c, n)` with c outermost; they are V = C·L rows of one sample, as
in a graph every node's output depends on all nodes.

Where outputs, or what a layer sees, hold T times as many entries as there are samples, the T positions of every sample are folded
into the first axis, one sample after the other, as by `logits.view(-1, C)`. Rows are those of the same outputs as `[N, C, T]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.nn import GraphNetwork
from curvlab.rows.grouping import Grouping
from curvlab.rows.layer import LayerRows
from curvlab.rows.loss import LossTerms, flat_outputs, loss_terms
from curvlab.rows.modules import Inputs, LayerUse, rule_for
from curvlab.rows.packed import is_packed, leaves, length
from curvlab.rows.sweep import Arguments

NodeChoice = Tensor | Sequence[int] | Sequence[bool] | Callable[[Any], Tensor] | None
"""Which nodes carry rows: a mask over all nodes, indices, or a function that chooses them given the inputs."""

REMEDY = (
    "nodes of a graph interact, so they are no samples: say with nodes= (a mask, or indices) which of them carry rows, for "
    "neighbour-sampled batches nodes=lambda batch: torch.arange(batch.batch_size)"
)


@dataclass(frozen=True, eq=False)
class Samples:
    """The first axis is the sample, of inputs, outputs and whatever a layer sees, perhaps with positions folded into it.

    Attributes:
        lengths: of the first axes of the model's inputs; without any, outputs have no folded positions. Packed sequences hold
            theirs in another order.
    """

    lengths: tuple[int, ...] = field(default=(), kw_only=True)

    interact = False

    @classmethod
    def of(cls, arguments: Arguments) -> Samples:
        """Return those of a model's arguments."""
        found = leaves(arguments)
        lengths = tuple(n for n in map(length, found) if n is not None)
        return cls() if any(map(is_packed, found)) else cls(lengths=lengths)

    def count(self, entries: int) -> int:
        """Return the number N of samples of an output with a number of entries along its first axis.

        It is that of the entries if some input has as many, else the length of the first input if that divides them.
        """
        if not self.lengths or entries in self.lengths or not self.lengths[0] or entries % self.lengths[0]:
            return entries
        return self.lengths[0]

    def before(self) -> int | None:
        """Return the number of samples that the model's inputs tell before it is called; None if they do not."""
        return self.lengths[0] if self.lengths and not self.interact else None

    def choose(self, z: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        """Return the outputs that carry rows, as the loss takes them."""
        return z

    def lay_out(self, z: Float[Tensor, "M ..."]) -> Float[Tensor, "N C ..."]:
        """Bring chosen outputs into the layout of rows; folded positions become the innermost part of an extra axis."""
        N = self.count(len(z))
        if len(z) == N:
            return z if z.ndim > 1 else z[:, None]
        by_sample: Tensor = flat_outputs(z).unflatten(0, (N, -1))
        return by_sample.permute(0, 2, 3, 1).flatten(2)

    def terms(self, loss: nn.Module, z: Float[Tensor, "M ..."], targets: Any) -> LossTerms:
        """Take the loss of chosen outputs apart, in the layout of rows; see `loss_terms`."""
        terms = loss_terms(loss, z, targets)
        return terms if self.count(len(z)) == len(z) else terms.relaid(self.lay_out)

    def form(self, use: LayerUse, inputs: Inputs, g: Tensor, count: int) -> LayerRows:
        """Form the rows of a layer from its inputs and the rows at its output, of entries along the first axis.

        They are in the type of the layer's parameters, whatever autocast computed in.

        Args:
            use: the layer.
            inputs: what it was called on.
            g: rows at its output.
            count: number N of samples.
        """
        rule, grouping = rule_for(use.module), self.grouping(inputs[0], count)
        assert rule is not None
        dtype = getattr(use.module, next(iter(use.names))).dtype
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        if grouping is not None and rule.of_samples is not None:
            return rule.of_samples(use, inputs, g.to(dtype), grouping)
        rows = rule.rows(use, inputs, g.to(dtype))
        return rows if grouping is None else rows.group(grouping)

    def fit(self, x: Tensor, entries: int, count: int) -> bool:
        """Whether it is known to which of a number of samples the entries along the first axis of an input belong.

        Args:
            x: a layer's input.
            entries: those of its output.
            count: number N of samples.
        """
        return x.ndim > 0 and (len(x) == count or (len(x) == entries and len(x) % count == 0))

    def grouping(self, x: Tensor, count: int) -> Grouping | None:
        """Return the samples of the entries along the first axis of a layer's input; None if they are the samples."""
        if len(x) == count:
            return None
        return Grouping(torch.arange(count, device=x.device).repeat_interleave(len(x) // count), count)

    def along_first(self, count: int) -> int | None:
        """Return how many samples, of all there are, the first axis of what layers see holds; None if that varies."""
        return count


@dataclass(frozen=True, eq=False)
class Nodes(Samples):
    """Nodes of one graph; everything belongs to one sample.

    Attributes:
        chosen: mask or indices of the nodes that carry rows; all if None.
    """

    chosen: Tensor | None

    interact = True

    def choose(self, z: Float[Tensor, "N C ..."]) -> Float[Tensor, "L C ..."]:
        """Return the chosen nodes' outputs, of `[N, C, …]` or, transposed as a sample of its own, of `[1, C, N]`.

        Raises:
            ValueError: the choice does not fit the nodes, or is empty.
        """
        if self.chosen is None:
            return z
        axis = 2 if _is_sample(z) else 0
        return z.index_select(axis, self._indices(z.shape[axis], z.device))

    def _indices(self, nodes: int, device: torch.device) -> Int[Tensor, " L"]:
        assert self.chosen is not None
        chosen = self.chosen.to(device)
        if chosen.ndim != 1 or chosen.is_floating_point():
            raise ValueError(
                f"nodes= is a mask [N] of bools or indices [L] of integers, got {list(chosen.shape)} {chosen.dtype}."
            )
        if chosen.dtype == torch.bool:
            if len(chosen) != nodes:
                raise ValueError(
                    f"The mask nodes= has {len(chosen)} entries, but the model's output has {nodes} nodes."
                )
            chosen = chosen.nonzero()[:, 0]
        if len(chosen) == 0:
            raise ValueError("nodes= chooses no node, so there are no rows. Choose the nodes that carry labels.")
        if not 0 <= int(chosen.min()) <= int(chosen.max()) < nodes:
            raise ValueError(
                f"nodes= chooses nodes {int(chosen.min())} to {int(chosen.max())}, but the model's output has the nodes "
                f"0 to {nodes - 1}."
            )
        return chosen

    def lay_out(self, z: Float[Tensor, "L C ..."]) -> Float[Tensor, "1 C X"]:
        """Make the nodes an extra axis, behind those that there are, so that rows are in the order `(c, x, n)`."""
        return flat_outputs(z).permute(1, 2, 0).flatten(1)[None]

    def terms(self, loss: nn.Module, z: Float[Tensor, "L C ..."], targets: Any) -> LossTerms:
        """Take the loss of the chosen nodes apart.

        Raises:
            ValueError: the targets are not those of the chosen nodes, and as `loss_terms`.
        """
        if not _is_sample(z) and isinstance(targets, Tensor) and targets.ndim and len(targets) != len(z):
            raise ValueError(
                f"There are {len(targets)} targets for {len(z)} chosen nodes; pass those of the chosen nodes, "
                "targets[nodes]."
            )
        return loss_terms(loss, z, targets).relaid(self.lay_out)

    def fit(self, x: Tensor, entries: int, count: int) -> bool:  # noqa: ARG002
        """Return True: all entries belong to the one sample."""
        return True

    def grouping(self, x: Tensor, count: int) -> Grouping:  # noqa: ARG002
        """Return one sample."""
        return Grouping(torch.zeros(len(x), dtype=torch.long, device=x.device), 1)

    def along_first(self, count: int) -> int:  # noqa: ARG002
        """Return 1."""
        return 1


def _is_sample(z: Tensor) -> bool:
    return z.ndim == 3 and z.shape[0] == 1


@dataclass(frozen=True, eq=False)
class Graphs(Samples):
    """Separate graphs in one batch, as torch-geometric's `Batch`: disjoint, with one output vector each.

    Attributes:
        graphs: their number.
        tables: the graph of every entry, by the number of entries: nodes, and edges.
    """

    graphs: int
    tables: Mapping[int, Grouping]

    interact = True

    def choose(self, z: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        """Return the outputs.

        Raises:
            UnsupportedModel: there is not one output vector a graph.
        """
        if len(z) != self.graphs:
            raise UnsupportedModel(
                f"The model returned {len(z)} output vectors for {self.graphs} graph{'s' * (self.graphs > 1)}. If these "
                f"are nodes: {REMEDY}. If these are graphs, pool by the vector `batch` of the inputs. "
                "If these are samples, give the argument `batch` another name."
            )
        return z

    def fit(self, x: Tensor, entries: int, count: int) -> bool:  # noqa: ARG002
        """Whether the entries can be graphs, nodes or edges."""
        return len(x) == count or len(x) in self.tables

    def grouping(self, x: Tensor, count: int) -> Grouping | None:
        """Return the graphs of nodes or edges."""
        return None if len(x) == count else self.tables[len(x)]

    def along_first(self, count: int) -> int | None:
        """Return 1 for a single graph, None for several."""
        return 1 if count == 1 else None


def samples_of(model: nn.Module, inputs: Any, arguments: Arguments, nodes: NodeChoice) -> Samples:
    """Find out what a sample is, from the choice of nodes and from the names of torch-geometric's inputs.

    Raises:
        ValueError: edges end outside the nodes.

    Edges that the inputs do not list, as those of a model that finds neighbours itself, belong to no known graph.
    """
    if nodes is not None:
        return Nodes(nodes(inputs) if callable(nodes) else torch.as_tensor(nodes))
    if isinstance(model, GraphNetwork):
        return Nodes(None)
    x, edges, batch = _graph_of(model, arguments)
    if edges is None and batch is None:
        return Samples.of(arguments)
    if batch is None:
        batch = torch.zeros(0 if x is None else len(x), dtype=torch.long, device=None if x is None else x.device)
    count = int(batch.max()) + 1 if len(batch) else 1
    tables = {len(batch): Grouping(batch, count)}
    if edges is not None and len(batch):
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(batch):
            raise ValueError(
                f"The edges join nodes {int(edges.min())} to {int(edges.max())}, but there are features of "
                f"{len(batch)} nodes."
            )
        tables.setdefault(edges.shape[1], Grouping(batch[edges[0]], count))
    return Graphs(count, tables)


def _graph_of(model: nn.Module, arguments: Arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return features, edges and the graph of every node where the inputs have them, by torch-geometric's names."""
    args, kwargs = arguments
    if len(args) == 1 and not kwargs:
        if isinstance(args[0], Tensor):
            return None, None, None
        named = {name: getattr(args[0], name, None) for name in ("x", "edge_index", "batch")}
    else:
        try:
            named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        except TypeError:
            return None, None, None
    x, edges, batch = (named.get(name) for name in ("x", "edge_index", "batch"))
    return (
        x if isinstance(x, Tensor) else None,
        edges if _is_index(edges, 2) and edges.shape[0] == 2 else None,
        batch if _is_index(batch, 1) and (edges is not None or _gathers(batch)) else None,
    )


def _gathers(batch: Tensor) -> bool:
    """Whether numbers can be those of the graphs that entries belong to, as no edges tell: in order, and some repeated."""
    return len(batch) > 1 and bool((batch.diff() >= 0).all()) and int(batch[0]) >= 0 and int(batch[-1]) + 1 < len(batch)


def _is_index(value: Any, axes: int) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.ndim == axes and value.dtype == torch.long
    )
