"""Fisher matrices of kinds with few rows, by passes through the model: `Jᵀ (Σ_k r_k r_kᵀ) J` with rows r at the output.

It is the GGN with another matrix at the output: outer products of draws, or of the gradients of loss terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.func import vjp

from curvlab.nn import Linearized
from curvlab.rows.batches import Data
from curvlab.rows.loss import RowPer, flat_outputs
from curvlab.rows.passes import Pass
from curvlab.rows.samples import samples_of
from curvlab.spectrum.autodiff import GGN
from curvlab.spectrum.objective import Parameters, Part

AXES: dict[RowPer, tuple[int, ...]] = {"term": (2,), "sample": (2, 3), "signs": (2, 3), "batch": (1, 2, 3)}
"""Axes of outputs `[K, N, C, X]` that a row runs over."""


class OuterProducts(GGN):
    """`Jᵀ (Σ_k r_k r_kᵀ) J`; vectors go one at a time.

    Args:
        model, loss, data, parameters, group: see `GGN`; the loss is one that has rows.
        how: which rows; its generator starts every product from the state that it has now.

    Raises:
        UnsupportedModel, ValueError: see `GGN` and `curvlab.sqrt_fisher`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        data: Data,
        how: Pass,
        parameters: str | Sequence[str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.how = how
        self._state = None if how.generator is None else how.generator.get_state()
        super().__init__(model, loss, data, parameters=parameters, output=how.output, chunk_size=1, group=group)

    def _by_forward(self, vectors: Parameters) -> Float[Tensor, "K P"]:
        self._rewind()
        return super()._by_forward(vectors)

    def _by_backward(self, vectors: Parameters) -> Float[Tensor, "K P"]:
        self._rewind()
        return super()._by_backward(vectors)

    def _rewind(self) -> None:
        if self.how.generator is not None and self._state is not None:
            self.how.generator.set_state(self._state)

    def _curved(self, part: Part, z: Tensor, change: Tensor) -> Tensor:
        return self._bend(part, z)(change)

    def _bend(self, part: Part, z: Tensor) -> Callable[[Tensor], Tensor]:
        called = part.model.base if isinstance(part.model, Linearized) else part.model
        samples = samples_of(called, None, part.arguments, None)
        terms = samples.terms(part.loss, samples.choose(z).to(torch.promote_types(z.dtype, self.dtype)), part.targets)  # type: ignore[arg-type]
        terms.check(self.how.kind, part=not self.objective.single)
        rows, axes = self.how.together(terms), AXES[self.how.per]

        def product(change: Tensor) -> Tensor:
            laid_out, bring_back = vjp(samples.lay_out, change)[:2]
            flat = flat_outputs(laid_out).to(rows.dtype)
            along = torch.stack([(row * flat).sum([axis - 1 for axis in axes], keepdim=True) for row in rows])
            bent = rows[0] * along[0]
            for row, coefficient in zip(rows[1:], along[1:], strict=True):
                bent.addcmul_(row, coefficient)
            (found,) = bring_back(bent.view(laid_out.shape).to(z.dtype))
            return found  # type: ignore[no-any-return]

        return product
