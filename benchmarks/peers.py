"""The ways to compute a Gram matrix that are compared.

Every one returns `scale · J Jᵀ`, `[R, R]`, rows ordered `(c, n)` with output c outermost. A peer that forms J
multiplies the rows of one parameter at a time, and frees them as soon as their product is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.operations import Operations
from curvlab.rows import jacobian

PeerName = Literal["backpack", "torch-func", "nngeometry"]
MethodName = Literal["curvlab", "curvlab-autograd", "curvlab-product"] | PeerName

Gram = Float[Tensor, "R R"]
Compute = Callable[[], Gram]
Prepare = Callable[[nn.Module, Float[Tensor, "N ..."]], Compute]
"""Does what is not timed, given a network and its inputs, and returns what is."""


@dataclass(frozen=True)
class Method:
    """One way to compute the matrix.

    Attributes:
        title: its name in the table.
        prepare: sets it up.
        scale: the multiple of `J Jᵀ` that it returns.
        operations: which of the factored form's multiply-adds it does; None if it works otherwise.
    """

    title: str
    prepare: Prepare
    scale: float = 1.0
    operations: Callable[[Operations], int] | None = None


def _curvlab(engine: Literal["backpack", "autograd"]) -> Prepare:
    return lambda network, inputs: lambda: jacobian(network, inputs, engine=engine).gram()


def _curvlab_product(network: nn.Module, inputs: Tensor) -> Compute:
    return jacobian(network, inputs).gram


def _backpack(network: nn.Module, inputs: Tensor) -> Compute:
    """Form the square root of the GGN of a summed squared error, whose Hessian is 2: `S Sᵀ = 2 J Jᵀ`."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    extended, loss = extend(network), extend(nn.MSELoss(reduction="sum"))
    targets = torch.zeros_like(extended(inputs))

    def rows() -> Iterator[Tensor]:
        for parameter in extended.parameters():
            yield parameter.sqrt_ggn_exact
            del parameter.sqrt_ggn_exact

    def compute() -> Gram:
        with backpack(SqrtGGNExact()):
            loss(extended(inputs), targets).backward()
        return _materialised(rows())

    return compute


def _torch_func(network: nn.Module, inputs: Tensor) -> Compute:
    from torch.func import functional_call, jacrev, vmap

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def outputs(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        z: Tensor = functional_call(network, values, (sample[None],))
        return z[0]

    of_samples = vmap(jacrev(outputs), in_dims=(None, 0))

    def compute() -> Gram:
        rows = of_samples(parameters, inputs)
        by_sample = _materialised(rows.pop(name) for name in parameters)
        N, C = len(inputs), len(by_sample) // len(inputs)
        return by_sample.view(N, C, N, C).permute(1, 0, 3, 2).reshape(N * C, N * C)

    return compute


def _nngeometry(network: nn.Module, inputs: Tensor) -> Compute:
    from nngeometry.gram import GramMatrix

    def compute() -> Gram:
        matrix: Tensor = GramMatrix(network, (inputs,)).to_torch()
        return matrix.flatten(2).flatten(0, 1)

    return compute


def _materialised(rows: Iterable[Float[Tensor, "A B ..."]]) -> Gram:
    """Sum the products of every parameter's rows, whose two leading axes number them."""
    return torch.stack([_product(block.flatten(0, 1).flatten(1)) for block in rows]).sum(0)


def _product(rows: Float[Tensor, "R P"]) -> Gram:
    return rows @ rows.T


METHODS: dict[MethodName, Method] = {
    "curvlab": Method("curvlab, BackPACK", _curvlab("backpack"), operations=lambda n: n.sweep + n.product),
    "curvlab-autograd": Method("curvlab, autograd", _curvlab("autograd"), operations=lambda n: n.sweep + n.product),
    "curvlab-product": Method("curvlab, products only", _curvlab_product, operations=lambda n: n.product),
    "backpack": Method("BackPACK SqrtGGNExact", _backpack, scale=2.0),
    "torch-func": Method("torch.func jacrev", _torch_func),
    "nngeometry": Method("nngeometry GramMatrix", _nngeometry),
}
