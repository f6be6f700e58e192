"""What a race found: the optimiser to take, and the evidence."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from curvlab.advice.candidates import Candidate
from curvlab.advice.damping import Dampings
from curvlab.advice.race import Entrant
from curvlab.compare.printing import terminal_width
from curvlab.optim import NaturalGradient
from curvlab.rows.sweep import PickOutput
from curvlab.tools.shown import line, shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """What `curvlab.advise` found; `print` says it.

    Attributes:
        winner: the entrant of the last round whose held-out loss was lowest.
        entrants: all that raced.
        refused: candidates that could not start, by name, with the reason.
        before: the held-out loss at the weights that all started from.
        dampings: steps of natural gradient at a grid of dampings, if it has won; see `curvlab.advice.damping`.
        held_out: what is held out, in words.
        budget: of the race, in words.
        loss: the loss module.
        output: which tensor of a structured output the loss is called on.
        graph: whether samples are nodes of one graph.
    """

    winner: Entrant
    entrants: Sequence[Entrant]
    refused: Mapping[str, str]
    before: float
    dampings: Dampings | None
    held_out: str
    budget: str
    loss: nn.Module
    output: PickOutput
    graph: bool

    @property
    def candidate(self) -> Candidate:
        """The optimiser to take, with its settings."""
        return self.winner.candidate

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the optimiser to take, those that are as by default, too.

        Of natural gradient: structure, kind of rows, damping that it starts with (None if not even one step could be taken for it),
        whether that is adapted, lr, momentum, kl_clip and refresh_every; of others lr and betas or momentum.
        """
        made = self.winner.optimizer
        group = made.param_groups[0]
        if not isinstance(made, NaturalGradient):
            return {name: group[name] for name in ("lr", "betas", "momentum") if name in group}
        of = made.preconditioner
        return {
            "structure": of.structure.key,
            "kind": of.how.kind,
            "damping": self.dampings.start if self.dampings else None,
            "adapted": made.adapts,
            "lr": group["lr"],
            "momentum": group["momentum"],
            "kl_clip": of.kl_clip and of.kl_clip.value,
            "refresh_every": of.refresh_every.value,
        }

    @property
    def falls(self) -> bool:
        """Whether the held-out loss has fallen at all."""
        return self.winner.best < self.before

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of a model, made for the loss of the race; it starts as the winner did."""
        return self.candidate.make(model, self.loss, output=self.output, graph=self.graph)

    @property
    def table(self) -> pd.DataFrame:
        """One row an entrant, the best first: `method`, `settings`, `rounds`, `steps`, `seconds`, `loss`, `damping`, `trouble`.

        `loss` is the lowest held-out one that was seen; only entrants of the same number of rounds had the same
        time. `damping` is where that of natural gradient has arrived.
        """
        import pandas as pd  # takes as long to import as all of curvlab

        def row(entrant: Entrant) -> dict[str, Any]:
            settings = str(entrant.candidate).removeprefix(entrant.candidate.method).strip(" ()")
            own = {"method": entrant.candidate.method, "settings": settings, "rounds": len(entrant.looks)}
            run = {"steps": entrant.steps, "seconds": entrant.seconds, "loss": entrant.best, "damping": entrant.damping}
            return own | run | {"trouble": entrant.trouble or ""}

        return pd.DataFrame([row(entrant) for entrant in self.ordered()])

    def plot(self) -> Figure:
        """Draw the held-out loss against seconds in steps, a line an entrant; the best of each method is named and heavy.

        Where natural gradient has won, beside it what one step at each damping did.
        """
        from curvlab.advice.drawing import draw  # matplotlib takes as long to import as all of curvlab

        return draw(self.ordered(), self.before, self.dampings)

    def ordered(self) -> list[Entrant]:
        """Return the entrants, the best first."""
        return sorted(
            self.entrants, key=lambda entrant: (entrant is not self.winner, -len(entrant.looks), entrant.best)
        )

    def __str__(self) -> str:
        return "\n".join(textwrap.fill(text, terminal_width(), subsequent_indent="  ") for text in self._said())

    def _said(self) -> list[str]:
        rivals: dict[str, Entrant] = {}
        for entrant in self.ordered():
            rivals.setdefault(entrant.candidate.method, entrant)
        lines = [
            f"Take {self.candidate}.",
            f"In full: {', '.join(f'{n} {shown(x)}' for n, x in self.settings.items())}.",
        ]
        lines += [str(self.dampings)] if self.dampings else []
        lines += [f"The loss of {self.held_out} was {self.before:.4g} before."]
        lines += [f"{entrant.candidate}: {_told(entrant)}" for entrant in rivals.values()]
        lines += [f"{name} could not start: {reason}" for name, reason in self.refused.items()]
        if not self.falls:
            lines += ["No candidate has lowered it: give a larger budget, or look at the data."]
        return [*lines, f"Raced for {self.budget}; what wins a short race need not win a long one."]

    def __repr__(self) -> str:
        return line(self, str(self.candidate), before=self.before, after=self.winner.best, raced=len(self.entrants))

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{escape(text)}</p>" for text in (repr(self), *self._said()))
        return f"<div>{said}{self.table.to_html(index=False)}</div>"


def _told(entrant: Entrant) -> str:
    """Say how an entrant fared."""
    if entrant.trouble is not None:
        return entrant.trouble
    return f"down to {entrant.best:.4g} in {entrant.steps} steps, {entrant.seconds:.3g} s, {len(entrant.looks)} rounds."
