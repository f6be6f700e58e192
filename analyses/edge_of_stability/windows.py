"""What a run says about the edge, over windows that are fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analyses.edge_of_stability.descent import Run

LONG = 200
"""Steps of a window over which the loss is to fall, "on long time scales"."""


@dataclass(frozen=True, eq=False)
class Edge:
    """A run against its threshold.

    Attributes:
        run: what was seen of it.
        threshold: curvature at which its optimiser is just stable.
        eta: step size.
    """

    run: Run
    threshold: float
    eta: float

    @property
    def steps(self) -> Float[np.ndarray, " K"]:
        """Steps at which the sharpness was measured."""
        return np.array([point.step for point in self.run.points])

    @property
    def sharpness(self) -> Float[np.ndarray, " K"]:
        """The largest eigenvalue at those steps."""
        return np.array([point.eigenvalues[0] for point in self.run.points])

    @property
    def ratio(self) -> Float[np.ndarray, " K"]:
        """Sharpness over threshold."""
        return np.asarray(self.sharpness / self.threshold)

    @property
    def crossing(self) -> int | None:
        """The first measured step with a sharpness at or above the threshold; None if there is none."""
        above = np.flatnonzero(self.ratio >= 1.0)
        return int(self.steps[above[0]]) if len(above) else None

    def quantities(self) -> dict[str, float]:
        """What claims decide on, by name; what does not exist for this run is left out."""
        return {"reached": float(self.crossing is not None), **self._below(), **self._after()}

    def _below(self) -> dict[str, float]:
        """Before the crossing: does the sharpness rise, and is the loss monotone?"""
        end = self.crossing if self.crossing is not None else int(self.steps[-1]) + 1
        losses = np.array(self.run.losses)[: end + 1]
        found = {"increase_before": _share(np.diff(losses) > 0)} if len(losses) > 1 else {}
        sharpness = self.sharpness[self.steps <= end]
        if len(sharpness) > 1:
            found["rising_share"] = _share(np.diff(sharpness) > 0)
        return found

    def _after(self) -> dict[str, float]:
        """From the crossing to the end."""
        if self.crossing is None:
            return {}
        there = self.steps >= self.crossing
        ratio = self.ratio[there]
        losses = np.array(self.run.losses[self.crossing :])
        found = {
            "crossing": float(self.crossing),
            "survived": float(self.run.diverged is None),
            "plateau_ratio": float(ratio.mean()),
            "plateau_maximum": float(ratio.max()),
            "plateau_spread": float(ratio.std()),
            "plateau_sharpness": float(self.sharpness[there].mean()),
            "increase_after": _share(np.diff(losses) > 0) if len(losses) > 1 else 0.0,
            "above_inverse": _share(self.eta * self.sharpness > 1.0),
            "step_share": float(np.mean([p.step_share for p in np.array(self.run.points, dtype=object)[there]])),
        }
        if len(losses) >= 2 * LONG and self.run.diverged is None:
            windows = losses[: len(losses) // LONG * LONG].reshape(-1, LONG).mean(axis=1)
            found["long_change"] = float(np.log(windows[-1] / windows[0]))
            squares = np.array(self.run.squares[self.crossing :])
            found["lemma_broken"] = _share(np.diff(losses) > -self.eta / 2 * squares[:-1])
        return found


def _share(happened: Float[np.ndarray, " K"]) -> float:
    return float(np.mean(happened))
