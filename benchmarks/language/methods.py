"""What is computed on a decoder, and by which library.

Targets are drawn once a token (Monte-Carlo Fisher matrix). curvlab factors all layers, norms and tables by their exact blocks or
diagonals. curvlinops factors `Linear` alone and refuses other parameters, which are frozen for it; kronfluence leaves them out.
Both are spared the output layer of a vocabulary too large for a matrix.

A product is one with a single random vector. Those of curvlinops and hessian-eigenthings have no derivative of fused attention,
and are given plain attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.language import kronfluence
from benchmarks.language.models import Decoder
from curvlab.fisher import EKFAC, KFAC, Diagonal, Structure
from curvlab.fisher.kronecker import KroneckerBlock
from curvlab.optim import NaturalGradient
from curvlab.spectrum import GGN, Hessian
from curvlab.spectrum.autodiff import DerivativeOperator

MethodName = Literal[
    "plain",
    "kfac",
    "kfac-curvlinops",
    "kfac-kronfluence",
    "ekfac",
    "eigenvectors",
    "ekfac-curvlinops",
    "ekfac-kronfluence",
    "diagonal",
    "plain-bfloat16",
    "kfac-bfloat16",
    "ggn",
    "ggn-curvlinops",
    "ggn-eigenthings",
    "hessian",
    "hessian-curvlinops",
    "hessian-eigenthings",
    "sgd-step",
    "kfac-step",
    "kfac-step-gradients",
]

LARGEST = 8192
"""Rows of the largest factor that is formed as a matrix."""

INTERVAL = 20
"""Training steps from one inversion of a layer's factors to the next."""

Compute = Callable[[], object]


@dataclass(frozen=True)
class Method:
    """A way to compute something.

    Attributes:
        title: in words.
        prepare: does what is not timed, given decoder, tokens and targets, and returns what is.
    """

    title: str
    prepare: Callable[[Decoder, Tensor, Tensor], Compute]


def _plain(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
    loss = nn.CrossEntropyLoss()

    def compute() -> None:
        loss(decoder(tokens), targets.flatten()).backward()
        decoder.zero_grad()  # afterwards, so that gradients count among what a call takes

    return compute


def fit(structure: type[Structure]) -> Callable[[nn.Module, Tensor, Tensor], Compute]:
    """Return what prepares a fit with one drawn target a token."""

    def prepare(decoder: nn.Module, tokens: Tensor, targets: Tensor) -> Compute:
        generator = torch.Generator(tokens.device).manual_seed(0)
        data = (tokens, targets.flatten())
        return lambda: structure.fit(decoder, nn.CrossEntropyLoss(), data, kind="mc", generator=generator)

    return prepare


def _eigenvectors(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
    """Decompose the factors of a fit, which an EKFAC does once."""
    fitted = fit(KFAC)(decoder, tokens, targets)()
    assert isinstance(fitted, KFAC)
    state = fitted.state_dict()

    def compute() -> None:
        fitted.load_state_dict(state)
        for block in fitted._blocks:
            if isinstance(block, KroneckerBlock):
                _ = block.units.basis, block.width.basis

    return compute


def _curvlinops(name: str, *, corrects: bool = False) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    def prepare(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        import curvlinops as library

        linear = [m for m in decoder.modules() if isinstance(m, nn.Linear) and max(m.weight.shape) <= LARGEST]
        kept = [p for module in linear for p in module.parameters()]
        for parameter in decoder.parameters():
            parameter.requires_grad_(any(parameter is p for p in kept))
        data, loss = [(tokens, targets.flatten())], nn.CrossEntropyLoss()
        options = {"fisher_type": "mc", "separate_weight_and_bias": False, "check_deterministic": False}

        def compute() -> object:
            operator = getattr(library, name)(decoder, loss, kept, data, **options)
            operator.compute_kronecker_factors()
            if corrects:
                operator.compute_eigenvalue_correction()
            return operator

        return compute

    return prepare


def _kronfluence(*, corrections: bool) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    return partial(kronfluence.prepare, largest=LARGEST, corrections=corrections)


def _product(operator: type[DerivativeOperator]) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    def prepare(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        made = operator(decoder, nn.CrossEntropyLoss(), (tokens, targets.flatten()))
        vector = torch.randn(1, made.size, device=tokens.device)
        return lambda: made.matmat(vector)

    return prepare


def _curvlinops_product(name: str) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    def prepare(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        import curvlinops as library

        data, loss, parameters = [(tokens, targets.flatten())], nn.CrossEntropyLoss(), list(decoder.parameters())
        made = getattr(library, name)(decoder, loss, parameters, data, check_deterministic=False)
        vector = torch.randn(made.shape[1], device=tokens.device)

        def compute() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return made @ vector

        return compute

    return prepare


def _eigenthings(name: str) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    def prepare(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        import hessian_eigenthings as library

        loss, data = nn.CrossEntropyLoss(), [(tokens, targets.flatten())]

        def outputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return model(batch[0])  # type: ignore[no-any-return]

        def value(z: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss(z, batch[1])  # type: ignore[no-any-return]

        functions = (outputs, value) if name == "GGNOperator" else (lambda model, b: value(outputs(model, b), b),)
        operator = getattr(library, name)(decoder, data, *functions)
        vector = torch.randn(operator.size, device=tokens.device)

        def compute() -> object:
            with sdpa_kernel(SDPBackend.MATH):
                return operator.matvec(vector)

        return compute

    return prepare


def _sgd_step(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(decoder.parameters(), lr=1e-3, momentum=0.9)

    def compute() -> None:
        loss(decoder(tokens), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return compute


def _kfac_step(**rows: Any) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    """Factors in every step; a layer's inverses every `INTERVAL`, in turns."""

    def prepare(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        loss, structure = nn.CrossEntropyLoss(), KFAC(factored_damping=True, invert_every=INTERVAL)
        optimizer = NaturalGradient(
            decoder, loss, lr=1e-3, structure=structure, damping=1e-2, momentum=0.9, kl_clip=None, **rows
        )

        def compute() -> None:
            with optimizer.collect():
                loss(decoder(tokens), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return compute

    return prepare


def _in_bfloat16(
    prepare: Callable[[Decoder, Tensor, Tensor], Compute],
) -> Callable[[Decoder, Tensor, Tensor], Compute]:
    """Compute under autocast."""

    def prepared(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Compute:
        compute = prepare(decoder, tokens, targets)

        def cast() -> object:
            with torch.autocast(tokens.device.type, torch.bfloat16):
                return compute()

        return cast

    return prepared


METHODS: Mapping[MethodName, Method] = {
    "plain": Method("forward and backward", _plain),
    "kfac": Method("K-FAC, curvlab", fit(KFAC)),
    "kfac-curvlinops": Method("K-FAC, curvlinops", _curvlinops("KFACLinearOperator")),
    "kfac-kronfluence": Method("K-FAC, kronfluence", _kronfluence(corrections=False)),
    "ekfac": Method("EKFAC, curvlab", fit(EKFAC)),
    "eigenvectors": Method("of that, eigenvectors", _eigenvectors),
    "ekfac-curvlinops": Method("EKFAC, curvlinops", _curvlinops("EKFACLinearOperator", corrects=True)),
    "ekfac-kronfluence": Method("EKFAC, kronfluence, eigenvectors given", _kronfluence(corrections=True)),
    "diagonal": Method("diagonal, curvlab", fit(Diagonal)),
    "plain-bfloat16": Method("forward and backward, bfloat16", _in_bfloat16(_plain)),
    "kfac-bfloat16": Method("K-FAC, curvlab, bfloat16", _in_bfloat16(fit(KFAC))),
    "ggn": Method("GGN product, curvlab", _product(GGN)),
    "ggn-curvlinops": Method("GGN product, curvlinops", _curvlinops_product("GGNLinearOperator")),
    "ggn-eigenthings": Method("GGN product, hessian-eigenthings", _eigenthings("GGNOperator")),
    "hessian": Method("Hessian product, curvlab", _product(Hessian)),
    "hessian-curvlinops": Method("Hessian product, curvlinops", _curvlinops_product("HessianLinearOperator")),
    "hessian-eigenthings": Method("Hessian product, hessian-eigenthings", _eigenthings("HessianOperator")),
    "sgd-step": Method("training step, SGD", _sgd_step),
    "kfac-step": Method(f"training step, K-FAC inverted every {INTERVAL}", _kfac_step(kind="mc")),
    "kfac-step-gradients": Method("the same, of the samples' gradients", _kfac_step(kind="empirical", rows="sample")),
}
