"""Optimisers that advice chooses among, each with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from curvlab.optim import NaturalGradient
from curvlab.rows.sweep import PickOutput

Method = Literal["natural gradient", "Adam", "SGD"]


@dataclass(frozen=True)
class Candidate:
    """An optimiser with settings.

    Attributes:
        method: which one.
        settings: its arguments, by name; all others as they are by default.
    """

    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        output: PickOutput = None,
        graph: bool = False,
    ) -> torch.optim.Optimizer:
        """Return the optimiser of a model.

        Args:
            model: the model.
            loss: its loss, which natural gradient needs.
            output: which tensor of a structured output the loss is called on.
            graph: whether the loss is called on nodes of one graph.
        """
        if self.method == "natural gradient":
            return NaturalGradient(model, loss, output=output, graph=graph, **self.settings)
        made = torch.optim.Adam if self.method == "Adam" else torch.optim.SGD
        return made([p for p in model.parameters() if p.requires_grad], **self.settings)

    def __str__(self) -> str:
        shown = [f"{name}={f'{x:g}' if isinstance(x, float) else x}" for name, x in self.settings.items()]
        return f"{self.method} ({', '.join(shown) or 'as it is'})"


def usual() -> list[Candidate]:
    """Return those that are raced by default: natural gradient in eight ways, Adam and SGD at four learning rates each."""
    natural: list[dict[str, Any]] = [
        {},
        {"kl_clip": 3e-2},
        {"kl_clip": 3e-3},
        {"kind": "empirical"},
        {"refresh_every": 5},
        {"structure": "ekfac"},
        {"structure": "diagonal"},
        {"lr": 0.5, "momentum": 0.5},
    ]
    found = [Candidate("natural gradient", settings) for settings in natural]
    found += [Candidate("Adam", {"lr": lr}) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    return found + [Candidate("SGD", {"lr": lr, "momentum": 0.9}) for lr in (1e-2, 3e-2, 1e-1, 3e-1)]
