"""What a run says about the edge, over windows that are fixed beforehand."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from curvlab.study import Trace, observed
from curvlab.study.loop import Seen

LONG = 200
"""Steps of a window over which the loss is to fall, "on long time scales"."""
COURSE = ("sharpness", "second", "ratio", "loss", "gradient_alignment", "step_alignment")
"""Quantities of a measurement."""


@dataclass(frozen=True, eq=False)
class Edge:
    """A run against its threshold.

    Attributes:
        trace: What was seen of it by a `TrackedDescent`.
        threshold: Curvature at which its optimiser is just stable.
        eta: Step size.
    """

    trace: Trace
    threshold: float
    eta: float

    @cached_property
    def losses(self) -> Float[np.ndarray, " K"]:
        """The loss before every step and after the last."""
        return self.trace.series("loss")

    @cached_property
    def measured(self) -> list[Seen]:
        """What was seen where the sharpness was."""
        return [seen for seen in self.trace.seen if "sharpness" in seen]

    @property
    def steps(self) -> Float[np.ndarray, " K"]:
        """Steps before which that was."""
        return np.array([seen["step"] for seen in self.measured])

    @property
    def sharpness(self) -> Float[np.ndarray, " K"]:
        """The largest eigenvalue at those steps."""
        return np.array([seen["sharpness"] for seen in self.measured])

    @property
    def ratio(self) -> Float[np.ndarray, " K"]:
        """Sharpness over threshold."""
        return np.asarray(self.sharpness / self.threshold)

    @property
    def crossing(self) -> int | None:
        """The first measured step with a sharpness at or above the threshold; None if there is none."""
        above = np.flatnonzero(self.ratio >= 1.0)
        return int(self.steps[above[0]]) if len(above) else None

    @property
    def late_share(self) -> float:
        """Sharpness at the end over its maximum."""
        return float(self.sharpness[-1] / self.sharpness.max())

    def rows(self) -> list[dict[str, object]]:
        """Observations: what claims decide on, and the course."""
        return [observed(name, value) for name, value in self.quantities().items()] + self.course()

    def course(self) -> list[dict[str, object]]:
        """Observations of every measurement, and of the divergence."""
        rows = divergence(self.trace)
        for seen in self.measured:
            found, at = {**seen, "ratio": seen["sharpness"] / self.threshold}, {"step": seen["step"]}
            rows += [observed(name, found[name], **at, threshold=self.threshold) for name in COURSE if name in found]
        return rows

    def quantities(self) -> dict[str, float]:
        """What claims decide on, by name; what does not exist for this run is left out."""
        return {"reached": float(self.crossing is not None), **self._below(), **self._after()}

    def _below(self) -> dict[str, float]:
        """Before the crossing: does the sharpness rise, and is the loss monotone?"""
        if not self.measured:
            return {}
        end = self.crossing if self.crossing is not None else int(self.steps[-1]) + 1
        losses = self.losses[: end + 1]
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
        losses = self.losses[self.crossing :]
        found = {
            "crossing": float(self.crossing),
            "survived": float(self.trace.diverged is None),
            "plateau_ratio": float(ratio.mean()),
            "plateau_maximum": float(ratio.max()),
            "plateau_spread": float(ratio.std()),
            "plateau_sharpness": float(self.sharpness[there].mean()),
            "increase_after": _share(np.diff(losses) > 0) if len(losses) > 1 else 0.0,
            "above_inverse": _share(self.eta * self.sharpness > 1.0),
            "step_share": float(np.array([seen["step_alignment"] for seen in self.measured])[there].mean()),
        }
        if len(losses) >= 2 * LONG and self.trace.diverged is None:
            windows = losses[: len(losses) // LONG * LONG].reshape(-1, LONG).mean(axis=1)
            found["long_change"] = float(np.log(windows[-1] / windows[0]))
            squares = self.trace.series("square")[self.crossing :]
            found["lemma_broken"] = _share(np.diff(losses) > -self.eta / 2 * squares[:-1])
        return found


def divergence(trace: Trace) -> list[dict[str, object]]:
    """The observation that a run diverged, if it did."""
    if trace.diverged is None:
        return []
    return [observed("diverged", float(trace.diverged), status=trace.status)]


def _share(happened: Float[np.ndarray, " K"]) -> float:
    return float(np.mean(happened))
