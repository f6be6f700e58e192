"""Hessian and generalised Gauss-Newton matrix, matrix-free, by products with blocks of vectors.

    Hessian   H v = ∂/∂ε ∇L(θ + εv)     forward over reverse
    GGN       G v = Jᵀ (∂²L/∂z²) J v    forward, forward over reverse at the output, reverse

A chunk of vectors goes through at once: the passes that do not depend on the vectors are done once, the others are batched by
`torch.func.vmap`. One vector goes alone, and all do where outputs are large, as logits of a vocabulary are: the product is then
written part by part as the reverse pass brings it, and a cross-entropy is differentiated some tokens at a time
(`curvlab.spectrum.at_output`). On four blocks of width 256 and a vocabulary of 50 000 a product with the GGN takes the memory of
one training step, with the Hessian of 1.6. What has a forward-mode derivative in it takes plain attention, whose weights
`[N, heads, T, T]` fused attention does not keep: all passes of the Hessian, of the GGN only the forward pass that keeps nothing.

Every operator compares one product of each of these forms with double backward when it is made. What has no forward-mode
derivative or batching rule, or another derivative than in reverse mode (`no_grad` inside the model, the padding of an
embedding), or what the user's hooks look at, goes by double backward for good, one vector at a time; it says so once.

Products are taken at the parameters that the model has when they are asked for: one operator serves along a training run.
Where they stay the same, `held` lets double backward record the gradient once.

Source: Pearlmutter 1994, Fast exact multiplication by the Hessian; Schraudolph 2002, Fast curvature matrix-vector
products for second-order gradient descent.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.func import grad, jvp, vjp, vmap

from curvlab.errors import UnsupportedModel
from curvlab.nn.hooks import has_forward_hooks
from curvlab.nn.linearize import differentiable_attention
from curvlab.rows.batches import Data
from curvlab.rows.sweep import PickOutput
from curvlab.spectrum.at_output import curved, slope_and_curved
from curvlab.spectrum.in_place import ChangesInPlace, is_own
from curvlab.spectrum.objective import Loss, Objective, Parameters, Part
from curvlab.spectrum.operator import Operator
from curvlab.spectrum.pull import Flat, pull, start
from curvlab.spectrum.push import moving, push

logger = logging.getLogger("curvlab")

CHUNK_SIZE = 16
"""Vectors that go through at once, by default."""
OUTPUTS = 1 << 23
"""Outputs, of all vectors that go through at once."""
SLOPE = 0.05
"""Largest relative distance of a product from a difference of gradients."""
ONCE = ("is not implemented", "once_differentiable", "ouble backward", "ouble-backward")
"""What torch's errors say of functions without a second derivative."""
CERTAIN = 20.0
"""How much farther off than differences are from each other a product must be to be refused."""
_announced: WeakSet[nn.Module] = WeakSet()

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Multiplies one vector; both are given by parameter."""


class DerivativeOperator(Operator):
    """What Hessian and GGN share.

    Args:
        model: any module; frozen parameters have no columns. It is left as it was found.
        loss: called as `loss(outputs, targets)`, any differentiable function with a scalar result. Over several batches
            it needs a `reduction` of "mean" or "sum", by which they merge.
        data: one pair (inputs, targets), or an iterable of pairs such as a DataLoader, which is passed over once a chunk.
        parameters: names of parameters, or of modules for all parameters below them; all trainable ones if None.
        output: which tensor of a structured output to use, as in `curvlab.jacobian`.
        batched: whether several vectors may go through at once; if not, products go by double backward.
        chunk_size: vectors that go through at once, at most; memory is that many times that of a forward pass with its gradient.
            Where outputs are large, they are fewer.
        group: processes that have a part of the data each and ask for the same products, such as
            `torch.distributed.group.WORLD`; None for this one with all data.

    Cost of making one: two gradients and three products, double backward in the memory of about five training steps.

    Raises:
        UnsupportedModel: if the model has no trainable parameter, a function in it can be differentiated once only, or two
            passes over the data disagree; names what is random.
        ValueError: see `Objective`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        *,
        parameters: str | Sequence[str] | None = None,
        output: PickOutput = None,
        batched: bool = True,
        chunk_size: int = CHUNK_SIZE,
        group: ProcessGroup | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size is a number of vectors ≥ 1, got {chunk_size}.")
        self.objective = Objective(model, loss, data, parameters, output, group)
        self.space, self.dtype, self.device = self.objective.space, self.objective.dtype, self.objective.device
        self.chunk_size = max(1, min(chunk_size, OUTPUTS // self.objective.outputs))
        self._recorded: list[Product] | None = None
        self.batched = batched and self._agrees()
        self._check()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold parameters and data: double backward records the gradient of a single batch once for all chunks.

        Memory: that of a gradient with its graph. Parameters that change nevertheless are an error of autograd's.
        """
        before = self._recorded
        if before is None and self.objective.single:
            self._recorded = []
        try:
            yield
        finally:
            self._recorded = before

    def matmat(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """Multiply a block of vectors. Cost per chunk of K vectors: one gradient, and about K more for the Hessian."""
        if len(block) <= self.chunk_size:
            return self._chunk(block)
        products = torch.empty_like(block)
        for part, into in zip(block.split(self.chunk_size), products.split(self.chunk_size), strict=True):
            into.copy_(self._chunk(part))
        return products

    def _chunk(self, block: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        return (self._by_forward if self.batched else self._by_backward)(self.space.unflatten(block))

    def _by_forward(self, vectors: Parameters) -> Float[Tensor, "K P"]:
        if len(next(iter(vectors.values()))) == 1:
            vector = {name: value[0] for name, value in vectors.items()}
            return self._total(lambda part: self._alone(part, vector)[None], vectors)
        with differentiable_attention():
            return self._total(lambda part: self.space.flatten(vmap(self._forward(part))(vectors)), vectors)

    def _by_backward(self, vectors: Parameters) -> Float[Tensor, "K P"]:
        with torch.enable_grad(), differentiable_attention(), _named_derivatives():
            return self._total(lambda part: self._products(self._product(part), vectors), vectors)

    def _total(self, share: Callable[[Part], Tensor], vectors: Parameters) -> Float[Tensor, "K P"]:
        return self.objective.total(share, len(next(iter(vectors.values()))), self.size)

    def _product(self, part: Part) -> Product:
        if self._recorded is None:
            return self._record(part)
        if not self._recorded:
            self._recorded.append(self._record(part))
        return self._recorded[0]

    def _products(self, product: Product, vectors: Parameters) -> Float[Tensor, "K P"]:
        single = list(zip(*vectors.values(), strict=True))
        products = torch.empty(len(single), self.size, dtype=self.dtype, device=self.device)
        for vector, row in zip(single, products, strict=True):
            torch.cat([piece.flatten() for piece in product(vector)], out=row)
        return products

    def _agrees(self) -> bool:
        """Return whether products of a random vector, alone and in a chunk, are that by double backward; says so if not."""
        if has_forward_hooks(self.objective.model, self.objective.loss):
            # Within a transform they might store tensors that are dead afterwards.
            return self._announce("there are hooks on forward passes")
        vectors = self.space.unflatten(self._random(1))
        reference = self._by_backward(vectors)
        try:
            found = [self._by_forward(vectors)]
            if self.chunk_size > 1:
                found.append(
                    self._by_forward({name: vector.expand(2, *vector.shape[1:]) for name, vector in vectors.items()})
                )
            bound = torch.finfo(self.dtype).eps ** 0.5 * float(reference.norm())
            if all(bool(((products - reference).norm(dim=1) <= bound).all()) for products in found):
                return True
            reason = "forward mode differs, as it does for functions under no_grad and for padding_idx"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as problem:
            reason = str(problem).strip().splitlines()[0]
        return self._announce(reason)

    def _announce(self, reason: str) -> Literal[False]:
        """Say once why products go by double backward."""
        if self.objective.given not in _announced:
            _announced.add(self.objective.given)
            logger.info("Products by double backward, one vector at a time: %s.", reason.rstrip("."))
        return False

    def _check(self) -> None:
        """Refuse products that are not those of a symmetric matrix of second derivatives."""

    @abstractmethod
    def _forward(self, part: Part) -> Callable[[Parameters], Parameters]:
        """Return the product of a batch with one vector, for `vmap`."""

    @abstractmethod
    def _alone(self, part: Part, vector: Parameters) -> Float[Tensor, " P"]:
        """Return the product of a batch with one vector, in little memory."""

    @abstractmethod
    def _record(self, part: Part) -> Product:
        """Return the product of a batch with one vector, by reverse mode alone."""

    def _random(self, number: int) -> Float[Tensor, "K P"]:
        shape, generator = (number, self.size), torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device="cpu").to(self.device)

    def _attached(self) -> Parameters:
        return {name: value.requires_grad_() for name, value in self.objective.parameters.items()}


class Hessian(DerivativeOperator):
    """The Hessian of a loss over a data set with respect to a model's parameters.

    When it is made, two products are compared with each other by symmetry, in float64 one with a difference of gradients, too.

    Raises:
        UnsupportedModel: if products are not those of a symmetric matrix or, in float64, certainly not the change of the gradient,
            because a second derivative is wrong.
    """

    def _check(self) -> None:
        u, v = self._random(2)
        Hu, Hv = self.matmat(torch.stack([u, v]))
        eps = torch.finfo(self.dtype).eps
        asymmetry, size = float((u @ Hv - v @ Hu).abs()), float(Hu.norm() + Hv.norm())
        if not asymmetry <= eps**0.25 * size:
            raise UnsupportedModel(
                f"Products with the Hessian are not symmetric: uᵀHv and vᵀHu differ by {asymmetry:.2g}, beside ‖Hu‖ + ‖Hv‖ = "
                f"{size:.2g}. {self._blame}"
            )
        if self.dtype == torch.float64:
            self._compare(v, Hv)

    def _compare(self, v: Float[Tensor, " P"], Hv: Float[Tensor, " P"]) -> None:
        """Compare a product with differences of gradients.

        It is wrong if differences forwards and backwards, over two steps, all agree with each other and not with it, while the
        gradient itself is the slope of the loss. Across kinks differences disagree, and a model that stops gradients has none
        of its loss; then a product that no difference confirms is only named.

        Raises:
            UnsupportedModel: if it is wrong.
        """
        eps = torch.finfo(self.dtype).eps
        step = eps ** (1 / 3) * (1 + float(self.space.flatten(self.objective.parameters).norm())) / float(v.norm())
        steps, (loss, here) = (step, step / 4), self.objective.gradient()
        above = [self.objective.moved(v, h) for h in steps]
        below = [self.objective.moved(v, -h) for h in steps]
        slopes = [(up[1] - down[1]) / (2 * h) for up, down, h in zip(above, below, steps, strict=True)]
        round_off = 100 * eps * float(here.norm()) / step
        errors = [float((slope - Hv).norm()) for slope in slopes]
        apart = float((slopes[0] - slopes[1]).norm())
        if min(errors) <= max(SLOPE * float(Hv.norm()), 4 * apart, round_off):
            return
        sides = [(up[1] - here) / h for up, h in zip(above, steps, strict=True)]
        sides += [(here - down[1]) / h for down, h in zip(below, steps, strict=True)]
        spread = max(float((side - slopes[1]).norm()) for side in sides)
        climb, rise = float(here @ v), float(above[0][0] - below[0][0]) / (2 * step)
        is_gradient = abs(rise - climb) <= SLOPE * abs(climb) and abs(rise) > 1e3 * eps * float(loss.abs()) / step
        if is_gradient and min(errors) > max(CERTAIN * (spread + round_off), SLOPE * float(slopes[1].norm())):
            raise UnsupportedModel(
                f"A product with the Hessian, of norm {float(Hv.norm()):.2g}, is {min(errors):.2g} away from the change of the "
                f"gradient, on which differences agree to {spread:.2g}. {self._blame}"
            )
        logger.warning("A product with the Hessian is not the change of the gradient. %s", self._blame)

    @property
    def _blame(self) -> str:
        return (
            "A function inside the model has a wrong second derivative, or stops gradients. Use GGN, which takes first "
            "derivatives only, or write that function in plain torch."
        )

    def _forward(self, part: Part) -> Callable[[Parameters], Parameters]:
        at, gradient = self.objective.parameters, grad(part.value)

        def product(vector: Parameters) -> Parameters:
            change: Parameters = jvp(gradient, (at,), (vector,))[1]
            return change

        return product

    def _alone(self, part: Part, vector: Parameters) -> Float[Tensor, " P"]:
        with torch.enable_grad(), differentiable_attention(), forward_ad.dual_level():
            # Leaves with a tangent: gradients of leaves made dual would all wait for the end of the reverse pass.
            at = self.objective.parameters
            leaves = {name: moving(p, vector[name]).requires_grad_() for name, p in at.items()}
            flat = Flat(leaves, self.space, lambda g: forward_ad.unpack_dual(g).tangent)
            with ChangesInPlace(flat):
                output = part.output(leaves)
            z, tangent = forward_ad.unpack_dual(output)
            change = torch.zeros_like(z) if tangent is None else tangent
            slope, product = slope_and_curved(part, z.data, change.data, over=is_own(output))
            number = start(z, moving(slope, product))
            del output, z, tangent, change, slope, product
            return flat.pull(number)

    def _record(self, part: Part) -> Product:
        at = self._attached()
        inputs = list(at.values())
        gradient = pull([part.value(at)], inputs, create_graph=True)
        return lambda vector: pull(gradient, inputs, vector)


class GGN(DerivativeOperator):
    """The generalised Gauss-Newton matrix `Jᵀ (∂²L/∂z²) J` of a loss over a data set.

    Arguments as for `DerivativeOperator`, and

    Args:
        kind: "ggn" for any loss, convex in the outputs or not; "exact" for the Fisher matrix, which it is under the
            losses that curvlab knows.

    Raises:
        UnsupportedModel: for kind="exact" and a loss whose Hessian is not known to be a Fisher matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Data,
        *,
        kind: Literal["exact", "ggn"] = "ggn",
        parameters: str | Sequence[str] | None = None,
        output: PickOutput = None,
        batched: bool = True,
        chunk_size: int = CHUNK_SIZE,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            model, loss, data, parameters=parameters, output=output, batched=batched, chunk_size=chunk_size, group=group
        )
        if kind == "exact":
            self.objective.check_fisher()

    def _forward(self, part: Part) -> Callable[[Parameters], Parameters]:
        at = self.objective.parameters

        def product(vector: Parameters) -> Parameters:
            z, change = jvp(part.output, (at,), (vector,))[:2]
            pulled: Parameters = vjp(part.output, at)[1](self._curved(part, z, change))[0]
            return pulled

        return product

    def _alone(self, part: Part, vector: Parameters) -> Float[Tensor, " P"]:
        cotangent = self._curved(part, *push(part, self.objective.parameters, vector))
        leaves = self._attached()
        with torch.enable_grad():
            number = start(part.output(leaves), cotangent)
        del cotangent
        return Flat(leaves, self.space).pull(number)

    def _record(self, part: Part) -> Product:
        at = self._attached()
        inputs = list(at.values())
        z = part.output(at)
        cotangent = torch.zeros_like(z, requires_grad=True)
        pulled = pull([z], inputs, [cotangent], create_graph=True)
        bend = self._bend(part, z.detach())

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor]:
            (change,) = pull(pulled, [cotangent], vector)
            return pull([z], inputs, [bend(change)])

        return product

    def _curved(self, part: Part, z: Tensor, change: Tensor) -> Tensor:
        """Return the product of the matrix at the output with a change of the output."""
        return curved(part, z, change)

    def _bend(self, part: Part, z: Tensor) -> Callable[[Tensor], Tensor]:
        """Return that product as a function of the change, by reverse mode alone."""
        end = z.requires_grad_()
        slope = pull([part.of_output(end)], [end], create_graph=True)
        return lambda change: pull(slope, [end], [change])[0]


@contextmanager
def _named_derivatives() -> Iterator[None]:
    """Name a function that can be differentiated once only."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0].rstrip(".")
        if not any(sign in told for sign in ONCE):
            raise
        raise UnsupportedModel(
            f"A function inside the model, or the loss, can be differentiated once only, so it has no products: {told}. Write "
            "that function in plain torch; the rows of curvlab.sqrt_fisher take one derivative."
        ) from error
