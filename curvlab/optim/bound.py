"""What a preconditioner was made for: a model's layers and trainable parameters, which may not change unnoticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from curvlab.errors import StateError, UnsupportedModel
from curvlab.fisher import Structure
from curvlab.rows.owners import Owner, no_rows_beside
from curvlab.rows.sharded import is_sharded

CHANGED = "Call rebind() of the Preconditioner; instead of a NaturalGradient, make a new one."
"""What to do when the model is another one: optimisers hold parameters of the former one."""


@dataclass(frozen=True)
class Bound:
    """A model as it was when a preconditioner was made.

    Attributes:
        trained: its trainable parameters by name.
        modules: its modules that own some of those that are preconditioned, by name.
        ruleless: parameters that are preconditioned, of modules without factored rows.
    """

    trained: Mapping[str, nn.Parameter]
    modules: Mapping[str, nn.Module]
    ruleless: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, owners: Sequence[Owner]) -> Bound:
        """Look at a model."""
        owning = {owner.module for owner in owners}
        return cls(
            {name: p for name, p in model.named_parameters() if p.requires_grad},
            {name: module for name, module in model.named_modules() if module in owning},
            tuple(name for owner in owners if not owner.ruled for name in owner.names.values()),
        )

    def check(
        self, model: nn.Module, structure: Structure, coupled: Sequence[str], *, sharded: bool, by_batch: bool
    ) -> None:
        """Refuse a model that has changed, or whose samples interact where rows of single ones are needed.

        Args:
            model: as it is now.
            structure: of its curvature.
            coupled: modules that make the samples of a batch interact.
            sharded: whether it was sharded.
            by_batch: whether there is one row a batch.

        Raises:
            StateError: if it has changed.
            UnsupportedModel: if samples interact.
        """
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if trained != set(self.trained):
            changed = ", ".join(sorted(trained ^ set(self.trained)))
            raise StateError(
                f"Since the preconditioner was made, parameters were added, removed, frozen or unfrozen: {changed}. {CHANGED}"
            )
        if is_sharded(model) and not sharded:
            raise StateError(f"Since the preconditioner was made, fully_shard was applied to the model. {CHANGED}")
        present = dict(model.named_modules())
        replaced = [name for name, module in self.modules.items() if present.get(name) is not module]
        if replaced:
            raise StateError(f"Since the preconditioner was made, {', '.join(replaced)} were replaced. {CHANGED}")
        if coupled and self.ruleless:
            raise no_rows_beside(coupled, self.ruleless)
        if coupled and not (structure.averages or by_batch):
            raise UnsupportedModel(
                f"The normalisation in {', '.join(coupled)} is that of the batch, in training mode, so samples interact and the "
                f"{structure.key} structure has no rows. Call eval() on it, or use a structure of moments such as 'kfac'."
            )


def coupled_modules(model: nn.Module) -> list[str]:
    """Return the names of modules that make the samples of a batch interact."""
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
