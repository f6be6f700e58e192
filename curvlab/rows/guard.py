"""The guard: rows are compared with a reverse pass wherever they do not follow from the structure of a pass.

Random combinations of rows must be the gradient of the same combination of outputs, parameter by parameter, each relative to
its own. That is done

    once        for a pass whose graph shows that samples stay apart (`curvlab.rows.apart`), for parameters whose gradient is
                not zero; those whose gradient is, such as all below a head of zeros, are compared the next time
    every time  for any other pass; the first one is announced

A sweep of curvlab's own is compared with a forward pass of its own the first time, and so with other noise, if a model is random;
from then on with the graph that it has left.

What a model's own arithmetic loses, such as parts that compute in half precision, is measured, by repeating the reverse pass at
another scale, where rows and gradient differ by more than their type explains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.errors import UnsupportedModel
from curvlab.rows.graph_signature import GraphSignature, remember
from curvlab.rows.layer import LayerRows
from curvlab.rows.owners import trainable
from curvlab.rows.spread import Known
from curvlab.rows.sweep import SweepResult, unhooked

logger = logging.getLogger("curvlab")

NOISE = 100.0
"""Largest difference that counts as round-off, in units of that of the reverse pass."""
SCALES = (3, 5, 7)
"""Factors of the reverse passes that show round-off; by one alone it may be the same by chance."""
KINDS = 1024
"""How many kinds of passes are known at a time."""
NOTHING = 10.0
"""Largest rows beside a gradient of zero that count as round-off, in units of that of the largest gradient."""

Anywhere = Callable[[bool], bool]
"""Whether a flag is set in any of several processes."""

_unfactored: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


@dataclass
class Checks:
    """What has been compared so far, of one model.

    Attributes:
        known: what passes have told.
        verified: parameters whose rows were right, by the kind of pass.
        announced: whether it has been said that all passes are compared.
    """

    known: Known = field(default_factory=Known)
    verified: dict[Hashable, set[str]] = field(default_factory=dict)
    announced: bool = False

    def due(self, kind: Hashable, graph_signature: GraphSignature, names: Collection[str]) -> bool:
        """Whether rows of a pass are to be compared."""
        return graph_signature.unknown is not None or self.new(kind, graph_signature, names)

    def new(self, kind: Hashable, graph_signature: GraphSignature, names: Collection[str]) -> bool:
        """Whether rows of some parameter have not been right yet, in any pass of the kind."""
        depending = set(names) if graph_signature.reached is None else graph_signature.reached.intersection(names)
        return not depending <= self.verified.get(kind, set())

    def add(self, kind: Hashable, graph_signature: GraphSignature, verified: Collection[str]) -> None:
        """Remember the parameters whose rows were right."""
        remember(self.verified, kind, self.verified.get(kind, set()).union(verified), KINDS)
        if graph_signature.unknown is not None and not self.announced:
            self.announced = True
            logger.warning(
                "Rows are checked by another backward pass for every batch, because of %s: samples may interact there.",
                graph_signature.unknown,
            )


_checks: WeakKeyDictionary[nn.Module, Checks] = WeakKeyDictionary()


def checks_of(model: nn.Module) -> Checks:
    """Return what has been compared so far, in sweeps of a model."""
    return _checks.setdefault(model, Checks())


def unfactored(model: nn.Module) -> frozenset[str]:
    """Return the parameters whose rows do not follow from their layers, as far as a comparison has found them."""
    return _unfactored.get(model, frozenset())


@contextmanager
def without_factors(model: nn.Module, wrong: Sequence[str]) -> Iterator[None]:
    """Remember that rows of these parameters do not follow from their layers, if a second attempt succeeds without.

    Raises:
        UnsupportedModel: naming them, if it does not.
    """
    before = unfactored(model)
    _unfactored[model] = before | set(wrong)
    try:
        yield
    except UnsupportedModel:
        _unfactored[model] = before
        refuse(wrong)


def wrong_rows(
    model: nn.Module,
    forward: Callable[[], Float[Tensor, "N C ..."]],
    sweep_result: SweepResult,
    engine: str,
    once_for: nn.Module,
) -> tuple[str, ...]:
    """Compare the rows of a sweep, if that is due, with a reverse pass; what was found is kept for a model, `once_for`.

    One pass catches sequence-first inputs, reshaped batches, weights that are used elsewhere, and samples that interact.

    Returns:
        The parameters whose rows are wrong.
    """
    parameters = trainable(model)
    kind = (
        engine, sweep_result.cotangents.shape, sweep_result.output.dtype, tuple(parameters), model.training,
        sweep_result.graph_signature.functions,
        tuple((layer.name, layer.factors[0].shape) for layer in sweep_result.layers),
    )  # fmt: skip
    checks = checks_of(once_for)
    if not checks.due(kind, sweep_result.graph_signature, parameters):
        return ()
    z = sweep_result.graph
    if z is None or checks.new(kind, sweep_result.graph_signature, parameters):
        with torch.enable_grad():
            z = forward()
    wrong, verified = compare_with_reverse_pass(parameters, z, sweep_result.cotangents, sweep_result.layers)
    if not wrong:
        checks.add(kind, sweep_result.graph_signature, verified)
    return wrong


def refuse(wrong: Sequence[str]) -> None:
    """Raise `UnsupportedModel` if there are parameters whose rows are wrong."""
    if wrong:
        raise UnsupportedModel(
            f"Rows per sample do not reproduce the gradient of {', '.join(wrong)}. Either samples interact, or the "
            "first axis of the model's inputs and outputs is not the sample (sequence-first inputs, reshaped batches, "
            "positions that were left out), or the model is random. Make the first axis the sample; where samples are the "
            "nodes of a graph, say with nodes= which of them carry rows."
        )


def compare_with_reverse_pass(
    parameters: Mapping[str, Tensor],
    z: Float[Tensor, "N C ..."],
    cotangents: Float[Tensor, "V N C ..."],
    layers: Sequence[LayerRows],
    *,
    coupled: bool = False,
    anywhere: Anywhere = bool,
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Compare random combinations of rows with one reverse pass through a graph, which is kept.

    Args:
        parameters: by name.
        z: outputs, with their graph.
        cotangents: rows at the output.
        layers: rows of the layers.
        coupled: whether samples interact, as in batch normalisation, so that only sums over them are gradients.
        anywhere: whether a flag is set in any of the processes that run each pass together.

    Returns:
        The parameters whose rows are wrong, and those that are right. A parameter is neither if its gradient is zero, and all are
        neither if something is not finite.

    Cost: one reverse pass, three more where round-off has to be measured.
    """
    comparison = Comparison(parameters, z, cotangents, coupled=coupled, anywhere=anywhere)
    for layer in layers:
        comparison.take(layer)
    return comparison.result()


class Comparison:
    """Compares a random combination of rows, as they come, with a reverse pass; see `compare_with_reverse_pass`."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        z: Float[Tensor, "N C ..."],
        cotangents: Float[Tensor, "V N C ..."],
        *,
        coupled: bool = False,
        anywhere: Anywhere = bool,
    ) -> None:
        self._parameters, self._z, self._cotangents, self._anywhere = parameters, z, cotangents, anywhere
        V, N = cotangents.shape[:2]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(V, 1 if coupled else N, generator=generator, dtype=torch.float64, device="cpu")
        self._weights = drawn.to(z).expand(V, N)
        self._found: dict[str, Tensor] = {}

    def take(self, layer: LayerRows) -> None:
        """Take the rows of a layer, of all cotangents."""
        combined = layer.rmatvec(self._weights.reshape(1, -1).to(layer.dtype))[0]
        self._found.update(layer.layout.split(combined))

    def result(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the parameters whose rows are wrong, and those that are right."""
        z, parameters, found = self._z, self._parameters, self._found
        cotangent = torch.einsum("vn,vn...->n...", self._weights, self._cotangents)
        expected = _pulled(z, parameters, cotangent)
        if self._anywhere(not all(bool(g.isfinite().all()) for g in (cotangent, *expected.values()))):
            return (), frozenset()
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (z, *expected.values()))
        errors = {name: float((value - expected[name]).norm()) for name, value in found.items()}
        sizes = {name: float(expected[name].norm()) for name in found}
        limits = {name: eps**0.5 * size for name, size in sizes.items()}
        largest = max(float(cotangent.norm()), *sizes.values())
        doubtful = [name for name in found if not errors[name] <= limits[name]]
        if self._anywhere(bool(doubtful)):
            # Gradients that cancel exactly, such as a shift before a softmax, are round-off of what cancels.
            noise = dict.fromkeys(doubtful, 0.0)
            for factor in SCALES:
                again = _pulled(z, parameters, cotangent / factor)
                for name in doubtful:
                    noise[name] = max(noise[name], float((factor * again[name] - expected[name]).norm()))
            for name in doubtful:
                limits[name] += NOISE * noise[name]
                if sizes[name] == 0:
                    limits[name] += NOTHING * eps * largest
        wrong = tuple(name for name in found if not errors[name] <= limits[name])
        return wrong, frozenset(name for name in found if sizes[name] > 0 and name not in wrong)


def _pulled(z: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Return gradients by name, dense ones, zero where the output does not depend on a parameter."""
    if not z.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    with unhooked(parameters.values()):
        gradients = torch.autograd.grad(
            z, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, gradients, strict=True)}
