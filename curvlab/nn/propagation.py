"""Graph networks in which a whole graph is one sample: propagation over its edges, and chains that are built from it.

Features of N nodes are `[*, N, F]`, with a leading axis of one graph in a chain. Edges follow torch-geometric: an edge
`(source, target)` carries features from its source to its target, `(P x)_i = Σ_{e: target(e) = i} w_e x_{source(e)}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from curvlab.errors import unknown_name
from curvlab.nn.ntk import ACTIVATIONS

Normalisation = Literal["symmetric", "row", "none"]


class _Product(torch.autograd.Function):
    """A sparse product and, as its derivative, the transposed one; further axes become columns of one product."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        nodes = x.shape[-2]
        matrix = torch.sparse_coo_tensor(index, weight, (nodes, nodes), check_invariants=False)
        columns = x.movedim(-2, 0)
        return (matrix @ columns.reshape(nodes, -1)).view(columns.shape).movedim(0, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        return _product(g, index.flip(0), weight), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return _product(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, index: Tensor, weight: Tensor) -> Any:  # noqa: ARG004
        return _product(x.movedim(in_dims[0], 0), index, weight), 0


def _product(x: Float[Tensor, "*lead N F"], index: Tensor, weight: Tensor) -> Float[Tensor, "*lead N F"]:
    product: Tensor = _Product.apply(x, index, weight)  # type: ignore[no-untyped-call]
    return product


class Propagation(nn.Module):
    """Message passing without parameters: the product with a sparse matrix P over the nodes of one graph.

    With W the matrix of edge weights (duplicate edges add up) and D its row sums, the degrees by incoming edges:

        "symmetric"  P = D^{-1/2} W D^{-1/2}  after every node without a self loop was given one of weight s (GCN)
        "row"        P = D^{-1} W             likewise
        "none"       P = W + s I              (GIN with s = 1 + ε)

    As in torch-geometric, a node keeps one self loop if it has several. Rows of nodes without degree are zero. The matrix
    is formed in float64 and then rounded.

    Attributes:
        index: (target, source) of every entry of P, `[2, E]`.
        weight: entries of P, `[E]`.

    Args:
        edge_index: (source, target) of every edge.
        nodes: N.
        edge_weight: of every edge; ones if None.
        normalisation: see above.
        self_loops: weight s of the self loops; 0 for none.
        dtype: of P; torch's default dtype if None.

    Raises:
        ValueError: an edge ends outside the nodes, weights are not one finite number an edge, a degree is negative, or the
            normalisation is unknown.

    Cost: `E·F` for F features; no message is formed.

    Source: Kipf & Welling 2017, eq. 2; Xu, Hu, Leskovec & Jegelka 2019, eq. 4.1.
    """

    index: Tensor
    weight: Tensor

    def __init__(
        self,
        edge_index: Int[Tensor, "2 E"],
        nodes: int,
        edge_weight: Float[Tensor, " E"] | None = None,
        normalisation: Normalisation = "symmetric",
        self_loops: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if normalisation not in get_args(Normalisation):
            raise unknown_name("normalisation", normalisation, get_args(Normalisation))
        source, target, weight = _edges(edge_index, nodes, edge_weight)
        if self_loops != 0:
            loops, looped = torch.arange(nodes, device=source.device), weight.new_full((nodes,), self_loops)
            if normalisation != "none":
                given = source == target
                looped[source[given]] = weight[given]
                source, target, weight = source[~given], target[~given], weight[~given]
            source, target, weight = (
                torch.cat(parts) for parts in ((source, loops), (target, loops), (weight, looped))
            )
        if normalisation != "none":
            degree = weight.new_zeros(nodes).index_add_(0, target, weight)
            if bool((degree < 0).any()):
                raise ValueError(
                    f"Propagation: node {int(degree.argmin())} has the degree {float(degree.min()):g}; "
                    f"normalisation={normalisation!r} needs degrees of at least 0. Use normalisation='none'."
                )
            inverse = torch.where(degree > 0, 1 / torch.where(degree > 0, degree, 1), 0)
            weight = weight * (
                (inverse[source] * inverse[target]).sqrt() if normalisation == "symmetric" else inverse[target]
            )
        self.nodes, self.normalisation, self.self_loops = nodes, normalisation, self_loops
        self.register_buffer("index", torch.stack([target, source]))
        self.register_buffer("weight", weight.to(dtype or torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "*lead N F"]) -> Float[Tensor, "*lead N F"]:
        """Return P x.

        Raises:
            ValueError: the features are not those of N nodes.
        """
        if x.ndim < 2 or x.shape[-2] != self.nodes:
            raise ValueError(
                f"Propagation is over a graph of {self.nodes} nodes; features [*, {self.nodes}, F] do not fit "
                f"{list(x.shape)}."
            )
        return _product(x, self.index, self.weight)

    def transposed(self, g: Float[Tensor, "*lead N F"]) -> Float[Tensor, "*lead N F"]:
        """Return Pᵀ g, which brings rows at the output to the input."""
        return _product(g, self.index.flip(0), self.weight)

    def extra_repr(self) -> str:
        """Return size, normalisation and self loops."""
        return (
            f"nodes={self.nodes}, entries={len(self.weight)}, normalisation={self.normalisation!r}, "
            f"self_loops={self.self_loops:g}"
        )


def _edges(edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return sources, targets and float64 weights of edges that fit the nodes."""
    if nodes < 1:
        raise ValueError(f"Propagation: a graph has at least one node, not {nodes}.")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < nodes:
        raise ValueError(
            f"Propagation: the edges join nodes {int(edge_index.min())} to {int(edge_index.max())}, but the graph has "
            f"the nodes 0 to {nodes - 1}."
        )
    E = edge_index.shape[1]
    weight = torch.ones(E, device=edge_index.device) if edge_weight is None else edge_weight
    if weight.shape != (E,) or not bool(weight.isfinite().all()):
        raise ValueError(f"Propagation: edge_weight is one finite number for each of {E} edges.")
    return edge_index[0], edge_index[1], weight.double()


class NodesLast(nn.Module):
    """Transposes the outputs of nodes `[1, N, C]` to `[1, C, N]`, as losses take further axes of a sample."""

    def forward(self, x: Float[Tensor, "*lead N C"]) -> Float[Tensor, "*lead C N"]:
        """Return xᵀ."""
        return x.mT

    def transposed(self, g: Float[Tensor, "*lead C N"]) -> Float[Tensor, "*lead N C"]:
        """Bring rows at the output to the input."""
        return g.mT


class GraphNetwork(nn.Module):
    """A chain of modules over all nodes of one graph, evaluated at some of them: node indices `[L]` to outputs `[L, C]`.

    Its inputs are the indices of nodes, so that training and test nodes of a graph are training and test inputs like any
    others, although nodes interact; curvlab gives it the rows of one sample, the graph.

    Attributes:
        features: X, of all nodes.
        network: the chain, from `[1, N, F]` to `[1, N, C]`.
    """

    features: Tensor

    def __init__(self, features: Float[Tensor, "N F"], network: nn.Sequential) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.network = network

    def forward(self, nodes: Int[Tensor, " L"] | Bool[Tensor, " N"]) -> Float[Tensor, "L C"]:
        """Return the outputs of some nodes, by index or mask."""
        outputs: Tensor = self.network(self.features[None])
        return outputs[0, nodes]


def gcn(
    features: Float[Tensor, "N F"],
    edge_index: Int[Tensor, "2 E"],
    sizes: Sequence[int],
    *,
    edge_weight: Float[Tensor, " E"] | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> GraphNetwork:
    """Return a graph convolutional network: layers `act(P X Wᵀ + b)`, the last one without activation.

    The function is that of a chain of torch-geometric's `GCNConv`. Here a layer's input is the aggregated P X, with weight
    and bias in one block. Weights are Glorot-uniform, drawn in float64 and then rounded; biases are zero.

    Args:
        features: X; its dtype and device are the network's.
        edge_index: (source, target) of every edge.
        sizes: widths after every layer, (H_1, …, C).
        edge_weight: of every edge; ones if None.
        activation: a name in `ACTIVATIONS`.
        dropout: probability, after every activation.
        generator: source of the weights, drawn layer by layer; torch's default generator if None.

    Raises:
        ValueError: no size is given, the activation is unknown, or what `Propagation` refuses.

    Source: Kipf & Welling 2017.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"gcn: sizes are the positive widths after every layer, not {tuple(sizes)}.")
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    nodes, width = features.shape
    modules: list[nn.Module] = []
    source = torch.device("cpu") if generator is None else generator.device
    for fan_in, fan_out in pairwise((width, *sizes)):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=features.dtype, device=features.device)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        drawn = torch.rand(fan_out, fan_in, generator=generator, dtype=torch.float64, device=source)
        with torch.no_grad():
            layer.weight.copy_(bound * (2 * drawn - 1))
            layer.bias.zero_()
        propagation = Propagation(edge_index, nodes, edge_weight, dtype=features.dtype)
        modules += [propagation, layer, ACTIVATIONS[activation](), *([nn.Dropout(dropout)] if dropout else [])]
    del modules[-2 if dropout else -1 :]
    return GraphNetwork(features, nn.Sequential(*modules))
