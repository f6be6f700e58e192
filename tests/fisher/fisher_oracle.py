"""Structures as dense float64 matrices, written from their definitions.

Everything follows from four arrays that `torch.func` gives: the Jacobian J `[N, V, P]`, the second moment Λ `[N, V, V]`
of the output rows (the loss' own Hessian, or Σ ccᵀ of cotangents c), and for a layer its inputs a `[N, T, Q, I]` and the
derivatives G `[N, V, T, Q, O]` of the outputs with respect to the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import DOUBLE
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import curvlab.fisher as cf
from curvlab.nn import HalfSquaredError, NTKLinear
from curvlab.rows.loss import Draws, loss_terms
from curvlab.testing.oracle import count_of, dense_jacobian, outputs, term_weights, trainable, unreduced

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | TRANSPOSED
DENSE_LAYERS = nn.Linear | NTKLinear | CONVOLUTIONS


# --- references -------------------------------------------------------------------------------------------------------


def output_moment(loss: nn.Module, z: Tensor, targets: Tensor, kind: str, seed: int) -> Tensor:
    """Return Λ `[N, V, V]`, the loss' divisor included; "mc" repeats the draws of the rows."""
    N, V = z.shape[0], z[0].numel()
    if kind in ("exact", "ggn"):
        H = hessian(lambda flat: loss(flat.view(z.shape), targets))(z.flatten()).view(N, V, N, V)
        return torch.stack([H[n, :, n] for n in range(N)])
    if kind == "mc":
        drawn = loss_terms(loss, z, targets).sampled(Draws(1, torch.Generator().manual_seed(seed)))
        cotangents = drawn.transpose(0, 1).reshape(N, -1, V)
        return cotangents.mT @ cotangents
    factor, terms, X = 0.5 if isinstance(loss, HalfSquaredError) else 1.0, unreduced(loss), z[0, 0].numel()
    values = jacrev(lambda flat: factor * terms(flat.view_as(z), targets).reshape(N, -1, X))(z.flatten())
    weights = term_weights(loss, z, targets).reshape(N, -1, X, 1)
    scaled = (
        torch.where(weights > 0, values / weights.clamp_min(1e-300).sqrt(), 0).sum(1)
        / count_of(loss, z, targets) ** 0.5
    )
    cotangents = torch.stack([scaled[n].reshape(X, N, V)[:, n] for n in range(N)])
    return cotangents.mT @ cotangents


@dataclass(frozen=True)
class LayerReference:
    """A layer's flat parameter positions `[units, width]`, and its Kronecker factors' ingredients if it has them.

    A convolution has kernels of so many entries; a dense layer, or a table, has none.
    """

    at: Tensor
    a: Tensor | None = None
    G: Tensor | None = None
    table: bool = False
    kernel: int = 0
    biased: bool = False

    def components(self, rule: str | int) -> Tensor:
        """Return the number of the component of every entry, by a rule of `ComponentWise`."""
        U, W = self.at.shape
        unit, column = torch.arange(U)[:, None].expand(U, W), torch.arange(W).expand(U, W)
        if isinstance(rule, int):
            return self.at.flatten().argsort().argsort().view(U, W) // rule
        if rule == "unit":
            return unit
        alone = unit * W + column
        bias = (column == W - 1) & self.biased
        if self.kernel:
            labels = torch.where(bias, alone, unit * W + column // self.kernel * self.kernel)
        elif rule == "semantic" and self.a is not None and W - self.biased <= 16:
            labels = torch.where(bias, alone, unit * W)
        else:
            labels = alone
        return torch.where(bias, -1, labels) if rule == "semantic" and self.a is not None else labels


@dataclass(frozen=True)
class Reference:
    """What all structures are made of, for one batch; `terms` is its weight in an average."""

    J: Tensor
    moment: Tensor
    omega: Tensor
    layers: tuple[LayerReference, ...]
    names: tuple[tuple[str, ...], ...]
    count: float
    terms: float

    @property
    def F(self) -> Tensor:
        return torch.einsum("nvp,nvw,nwq->pq", self.J, self.moment, self.J)

    @property
    def P(self) -> int:
        return self.J.shape[2]

    def rows_of_J(self) -> Tensor:
        """Return J `[R, P]` in row order (v, n)."""
        return self.J.transpose(0, 1).flatten(0, 1)

    def labels(self, of: str) -> Tensor:
        """Return the number of the layer or unit to which every parameter belongs."""
        label, k = torch.zeros(self.P, dtype=torch.long), 0
        for layer in self.layers:
            for unit in layer.at if of == "unit" else layer.at.flatten()[None]:
                label[unit], k = k, k + 1
        return label

    def masked(self, weights: Tensor, label: Tensor) -> Tensor:
        return self.F * weights[label[:, None], label[None, :]]

    def layer_wise(self, sigma: Tensor) -> Tensor:
        return self.masked(sigma, self.labels("layer"))

    def unit_wise(self) -> Tensor:
        label = self.labels("unit")
        return self.masked(torch.eye(int(label.max()) + 1, dtype=DOUBLE), label)

    def component_wise(self, rule: str | int) -> Tensor:
        mask = torch.zeros(self.P, self.P, dtype=DOUBLE)
        for layer in self.layers:
            at, label = layer.at.flatten(), layer.components(rule).flatten()
            mask[at[:, None], at[None, :]] = (label[:, None] == label[None, :]).to(DOUBLE)
        return self.F * mask

    def factors(self, layer: LayerReference, sharing: str = "expand") -> tuple[Tensor, Tensor]:
        """Return `B [Q, O, O]` and `Σω·A [Q, I, I]`."""
        assert layer.a is not None
        assert layer.G is not None
        a, G, T = layer.a, layer.G, layer.a.shape[1]
        if sharing == "reduce" and not layer.table:
            a, G, T = a.mean(1, keepdim=True), G.sum(2, keepdim=True), 1
        B = torch.einsum("nvtqo,nvw,nwtqp->qop", G, self.moment, G)
        A = torch.einsum("n,ntqi,ntqj->qij", self.omega, a, a) / T
        return B, A

    def kronecker(self, sharing: str = "expand", corrected: bool = False, undamped_inverse: bool = False) -> Tensor:
        """Return K-FAC, EKFAC (`corrected`), or the pseudo-inverse of K-FAC."""
        result = torch.zeros_like(self.F)
        for layer in self.layers:
            at = layer.at.flatten()
            block = self.F[at[:, None], at[None, :]]
            if layer.a is not None:
                B, A = self.factors(layer, sharing)
                block = kronecker_block(layer, B, A / self.omega.sum(), block if corrected else None, undamped_inverse)
            elif undamped_inverse:
                block = pinv(block)
            result[at[:, None], at[None, :]] = block
        return result

    def of_optimiser(self, spec: str, F: Tensor | None = None, moments: Sequence[Tensor] = ()) -> Tensor:
        """Return the matrix of a spec of `OPTIMISERS`, of averages of F and of the layers' moments of inputs if these are given."""
        key, options = OPTIMISERS[spec]
        F = self.F if F is None else F
        result = torch.zeros_like(F)
        for k, layer in enumerate(self.layers):
            at = layer.at.flatten()
            block = F[at[:, None], at[None, :]]
            if layer.a is None:
                dense = block if options.get("max_block", MAX_BLOCK[key]) >= len(at) else block.diagonal().diag()
            elif key == "input-side":
                A = (
                    moments[k]
                    if moments
                    else self.factors(layer, options.get("sharing", "expand"))[1] / self.omega.sum()
                )
                dense = input_block(layer, A)
            else:
                dense = trace_block(layer, block, **(KEPT[key] | {k: v for k, v in options.items() if k in KEPT[key]}))
            result[at[:, None], at[None, :]] = dense
        return result


KEPT: dict[str, dict[str, Any]] = {
    "partial-traces": {"outputs": "matrix", "inputs": "matrix"},
    "output-side": {"outputs": "matrix", "inputs": "identity"},
    "column-scaled": {"outputs": "identity", "inputs": "diagonal"},
    "rank-one": {"outputs": "diagonal", "inputs": "diagonal"},
    "partial-traces-diagonal": {"outputs": "matrix", "inputs": "matrix", "corrected": True},
}
"""What is kept of the partial traces."""

MAX_BLOCK = {"partial-traces": 1024, "output-side": 1024, "input-side": 1024} | dict.fromkeys(
    ("column-scaled", "rank-one", "partial-traces-diagonal"), 0
)
"""Largest exact block of layers without factors."""


def partial_traces(block: Tensor, groups: int, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the block of every group, with its traces over inputs `[O, O]` and over outputs `[I, I]`."""
    found = []
    for part in block.view(groups, len(block) // groups, groups, -1).diagonal(dim1=0, dim2=2).movedim(2, 0):
        four = part.reshape(len(part) // width, width, -1, width)
        found.append((part, torch.einsum("aibi->ab", four), torch.einsum("aiaj->ij", four)))
    return found


def trace_block(
    layer: LayerReference, block: Tensor, outputs: str, inputs: str, *, corrected: bool = False, limit: int = 8192
) -> Tensor:
    """Return the product of what is kept of the partial traces, or the diagonal of the block in their eigenbasis."""
    assert layer.a is not None
    first, second = (inputs, outputs) if layer.table else (outputs, inputs)
    blocks = []
    for part, left, right in partial_traces(block, 1 if layer.table else layer.a.shape[2], layer.at.shape[1]):
        rows = "diagonal" if layer.table and first == "matrix" else first
        L, R = kept(left, rows, limit), kept(right, second, limit)
        product = torch.kron(L, R) / (left.trace() if "identity" not in (first, second) else 1)
        if corrected:
            K = torch.kron(eigenvectors(L), eigenvectors(R))
            product = K @ (K.T @ part @ K).diagonal().diag() @ K.T
        blocks.append(product)
    return torch.block_diag(*blocks)


def kept(matrix: Tensor, what: str, limit: int) -> Tensor:
    if what == "identity":
        return torch.eye(len(matrix), dtype=DOUBLE)
    return matrix.diagonal().diag() if what == "diagonal" or len(matrix) > limit else matrix.contiguous()


def eigenvectors(matrix: Tensor) -> Tensor:
    """Return those of a matrix, the unit vectors for a diagonal one."""
    diagonal = bool((matrix == matrix.diagonal().diag()).all())
    return torch.eye(len(matrix), dtype=DOUBLE) if diagonal else torch.linalg.eigh(matrix).eigenvectors.contiguous()


def input_block(layer: LayerReference, A: Tensor) -> Tensor:
    """Return `I ⊗ A`; of a table, whose inputs are one-hot, `A ⊗ I`."""
    U, W = layer.at.shape
    if layer.table:
        return torch.kron(A[0].contiguous(), torch.eye(W, dtype=DOUBLE))
    return torch.block_diag(*(torch.kron(torch.eye(U // len(A), dtype=DOUBLE), a.contiguous()) for a in A))


def kronecker_block(
    layer: LayerReference, B: Tensor, A: Tensor, exact: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """Return the block of B and A; with the exact block, its diagonal in their eigenbasis instead."""
    pairs = [(A[0], B[0])] if layer.table else list(zip(B, A, strict=True))
    if inverse:
        pairs = [(pinv(left), pinv(right)) for left, right in pairs]
    blocks = []
    for q, (left, right) in enumerate(pairs):
        block = torch.kron(left.contiguous(), right.contiguous())
        if exact is not None:
            U = torch.eye(len(left), dtype=DOUBLE) if layer.table else torch.linalg.eigh(left).eigenvectors.contiguous()
            K = torch.kron(U, torch.linalg.eigh(right).eigenvectors.contiguous())
            part = slice(q * len(K), (q + 1) * len(K))
            block = K @ (K.T @ exact[part, part] @ K).diagonal().diag() @ K.T
        blocks.append(block)
    return torch.block_diag(*blocks)


def pinv(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=1e-12, hermitian=True)


def positions(model: nn.Module) -> dict[str, Tensor]:
    """Return the places of every parameter in a flat vector."""
    places, start = {}, 0
    for name, parameter in trainable(model).items():
        places[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    return places


@dataclass(frozen=True)
class Derivatives:
    """Outputs of a model for one batch, and what its parameters and layers have to do with them, whatever the loss."""

    z: Tensor
    J: Tensor
    layers: tuple[LayerReference, ...]
    names: tuple[tuple[str, ...], ...]


def derivatives(model: nn.Module, inputs: Any) -> Derivatives:
    """Differentiate the outputs for one batch."""
    z = outputs(model, inputs)
    N, V = z.shape[0], z[0].numel()
    J = dense_jacobian(model, inputs).view(V, N, -1).transpose(0, 1)
    place, layers, names = positions(model), [], []
    for prefix, module in model.named_modules():
        own = [name for name in place if name.rpartition(".")[0] == prefix]
        if own:
            layers.append(layer_reference(model, module, inputs, V, [place[name] for name in own]))
            names.append(tuple(own))
    order = sorted(range(len(layers)), key=lambda k: int(layers[k].at.min()))
    return Derivatives(z, J, tuple(layers[k] for k in order), tuple(names[k] for k in order))


def reference(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Tensor,
    kind: str = "exact",
    seed: int = 0,
    known: Derivatives | None = None,
) -> Reference:
    """Compute everything for one batch, but for the derivatives if they are known."""
    found = derivatives(model, inputs) if known is None else known
    z = found.z
    omega = term_weights(loss, z, targets).reshape(len(z), -1, z[0, 0].numel()).mean(1).sum(1)
    moment = output_moment(loss, z, targets, kind, seed)
    count = count_of(loss, z, targets)
    terms = count if loss.reduction == "mean" else 1.0
    return Reference(found.J, moment, omega, found.layers, found.names, count, terms)


def layer_reference(model: nn.Module, module: nn.Module, inputs: Any, V: int, places: list[Tensor]) -> LayerReference:
    weight = getattr(module, "weight", None)
    units = 1 if weight is None else weight.shape[0]
    if isinstance(module, TRANSPOSED | nn.LayerNorm | nn.RMSNorm):
        units = getattr(module, "out_channels", weight.numel())
    shapes = [p.shape for p in module.parameters(recurse=False) if p.requires_grad]
    at = torch.cat(
        [units_first(module, p.view(s), s).reshape(units, -1) for p, s in zip(places, shapes, strict=True)], 1
    )
    if isinstance(module, DENSE_LAYERS):
        kernel = weight[0, 0].numel() if isinstance(module, CONVOLUTIONS) else 0
        biased = getattr(module, "bias", None) is not None
        return LayerReference(at, *dense_factors(model, module, inputs, V), kernel=kernel, biased=biased)
    if isinstance(module, nn.Embedding):
        x, _, G = probe(model, module, inputs, V)
        one_hot = nn.functional.one_hot(x.flatten(1), units).to(DOUBLE)
        return LayerReference(at, one_hot[:, :, None], G.flatten(2, -2)[..., None, :], table=True)
    return LayerReference(at)


def probe(model: nn.Module, module: nn.Module, inputs: Any, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's input, its output and `∂z[n]/∂output[n]`, `[N, V, *output]`."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.extend((args[0].detach(), out.detach())))
    outputs(model, inputs)
    handle.remove()
    x, y = seen

    def perturbed(delta: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda *call: call[2] + delta)
        try:
            return model(inputs).flatten(1)
        finally:
            handle.remove()

    derivative = jacrev(perturbed)(torch.zeros_like(y))
    return x, y, torch.stack([derivative[n, :, n] for n in range(len(y))]).detach()


def units_first(module: nn.Module, values: Tensor, shape: torch.Size) -> Tensor:
    """Bring the output channels of a parameter, the last axes of some values, to the front of these axes."""
    if not isinstance(module, TRANSPOSED) or len(shape) == 1:
        return values
    lead = values.shape[: values.ndim - len(shape)]
    per_group = values.reshape(*lead, module.groups, -1, *shape[1:]).movedim(len(lead) + 2, len(lead) + 1)
    return per_group.flatten(len(lead), len(lead) + 1)


def dense_factors(model: nn.Module, module: nn.Module, inputs: Any, V: int) -> tuple[Tensor, Tensor]:
    x, y, G = probe(model, module, inputs, V)
    N, axis = len(y), 1 if isinstance(module, CONVOLUTIONS) else y.ndim - 1
    units = y.shape[axis]
    own = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    jacobian = jacrev(lambda p: functional_call(module, p, (x,)))(own)
    columns = []
    for name, parameter in own.items():
        by_unit = units_first(module, jacobian[name], parameter.shape).movedim(axis, y.ndim - 1)
        full = by_unit.reshape(N, -1, units, units, parameter.numel() // units)
        columns.append(full.diagonal(dim1=2, dim2=3).movedim(-1, 2))
    groups = getattr(module, "groups", 1)
    a = torch.cat(columns, dim=-1)[:, :, :: units // groups]
    G = G.movedim(axis + 1, -1).reshape(N, V, -1, groups, units // groups)
    return a, G


# --- specs ------------------------------------------------------------------------------------------------------------


def sigma_of(L: int) -> Tensor:
    """Return a symmetric positive definite Σ without structure."""
    root = torch.sin(torch.arange(1.0, L * L + 1, dtype=DOUBLE)).view(L, L)
    return root @ root.T + 0.3 * torch.eye(L, dtype=DOUBLE)


def halves(names: Sequence[str]) -> list[list[str]]:
    """Cut the names so that layers are cut, too."""
    return [list(names[::2]), list(names[1::2])]


SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full-rows": ("full", {"side": "rows"}),
    "full-parameters": ("full", {"side": "parameters"}),
    "block-diagonal": ("block-diagonal", {}),
    "block-diagonal-rows": ("block-diagonal", {"side": "rows"}),
    "block-diagonal-parameters": ("block-diagonal", {"side": "parameters"}),
    "block-diagonal-partition": ("block-diagonal", {"partition": halves}),
    "block-diagonal-partition-rows": ("block-diagonal", {"partition": halves, "side": "rows"}),
    "block-tridiagonal": ("block-tridiagonal", {}),
    "block-tridiagonal-rows": ("block-tridiagonal", {"side": "rows"}),
    "block-tridiagonal-parameters": ("block-tridiagonal", {"side": "parameters"}),
    "layer-wise": ("layer-wise", {"sigma": sigma_of}),
    "layer-wise-rows": ("layer-wise", {"sigma": sigma_of, "side": "rows"}),
    "layer-wise-partition": ("layer-wise", {"sigma": sigma_of, "partition": halves, "side": "rows"}),
    "unit-wise": ("unit-wise", {}),
    "unit-wise-rows": ("unit-wise", {"side": "rows"}),
    "unit-wise-parameters": ("unit-wise", {"side": "parameters"}),
    "component-wise": ("component-wise", {}),
    "component-wise-parameters": ("component-wise", {"side": "parameters"}),
    "component-wise-kernel-rows": ("component-wise", {"partition": "kernel", "side": "rows"}),
    "component-wise-chunks": ("component-wise", {"partition": 3}),
    "diagonal": ("diagonal", {}),
    "kfac": ("kfac", {}),
    "kfac-reduce": ("kfac", {"sharing": "reduce"}),
    "kfac-no-exact": ("kfac", {"max_block": 0}),
    "ekfac": ("ekfac", {}),
    "sketched": ("sketched", {}),
    "adaptive-inverse": ("adaptive-inverse", {}),
}
"""Every structure, with the options that change what or how it computes."""

OPTIMISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "partial-traces": ("partial-traces", {}),
    "partial-traces-outputs": ("partial-traces", {"outputs": "diagonal"}),
    "partial-traces-inputs": ("partial-traces", {"outputs": "identity"}),
    "partial-traces-no-exact": ("partial-traces", {"inputs": "diagonal", "max_block": 0}),
    "output-side": ("output-side", {}),
    "column-scaled": ("column-scaled", {}),
    "rank-one": ("rank-one", {}),
    "partial-traces-diagonal": ("partial-traces-diagonal", {}),
    "input-side": ("input-side", {}),
    "input-side-reduce": ("input-side", {"sharing": "reduce"}),
}
"""Structures of optimisers that have factors; their matrices follow from the exact one, or from inputs."""

PLAIN_SPECS = (
    "full", "block-diagonal", "block-tridiagonal", "layer-wise", "unit-wise", "component-wise", "diagonal", "kfac", "ekfac",
    "sketched", "adaptive-inverse",
)  # fmt: skip

PARAMETER_SPECS = (
    "full-parameters",
    "block-diagonal-parameters",
    "block-tridiagonal-parameters",
    "unit-wise-parameters",
    "component-wise-parameters",
    "diagonal",
    "kfac",
    "kfac-reduce",
)
"""Specs that take any decay."""


def beside_identity(F: Tensor, weight: float) -> Tensor:
    """Return the average of a matrix of a weight and the identity, which has the weight 1."""
    return (torch.eye(len(F), dtype=DOUBLE) + weight * F) / (1 + weight)


def build(spec: str, names: Sequence[str], **more: Any) -> cf.Structure:
    """Make the structure of a spec for parameters of given names."""
    key, options = (SPECS | OPTIMISERS)[spec]
    if options.get("partition") is halves:
        options = {**options, "partition": halves(names)}
    return cf.make(key, **options, **more)


def dense_structure(spec: str, ref: Reference, place: dict[str, Tensor]) -> Tensor:
    """Return the matrix that a spec stands for."""
    if spec in OPTIMISERS:
        return ref.of_optimiser(spec)
    key, options = SPECS[spec]
    L = len(ref.layers)
    if options.get("partition") is halves:
        groups = halves(list(place))
        weights = sigma_of(len(groups)) if "sigma" in options else torch.eye(len(groups), dtype=DOUBLE)
        label = torch.zeros(ref.P, dtype=torch.long)
        for k, group in enumerate(groups):
            label[torch.cat([place[name] for name in group])] = k
        return ref.masked(weights, label)
    if key == "kfac":
        dense = ref.kronecker(options.get("sharing", "expand"))
        exact = torch.cat([layer.at.flatten() for layer in ref.layers if layer.a is None] or [torch.empty(0).long()])
        if "max_block" in options:
            dense[exact[:, None], exact[None, :]] = dense[exact, exact].diag()
        return dense
    index = torch.arange(L)
    return {
        "full": lambda: ref.F,
        "block-diagonal": lambda: ref.layer_wise(torch.eye(L, dtype=DOUBLE)),
        "block-tridiagonal": lambda: ref.layer_wise(((index[:, None] - index).abs() <= 1).to(DOUBLE)),
        "layer-wise": lambda: ref.layer_wise(sigma_of(L)),
        "unit-wise": ref.unit_wise,
        "component-wise": lambda: ref.component_wise(options.get("partition", "semantic")),
        "diagonal": lambda: ref.F.diagonal().diag(),
        "ekfac": lambda: ref.kronecker(corrected=True),
        "sketched": lambda: ref.layer_wise(torch.eye(L, dtype=DOUBLE)),
        "adaptive-inverse": lambda: beside_identity(ref.F, ref.terms),
    }[key]()
