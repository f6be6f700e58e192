"""What a run says about the edge, over windows that are fixed beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.stats import kendalltau

from curvlab.study import Trace, observed, outside
from curvlab.study.loop import Seen

SETTLING = 200
"""Steps after the first crossing that no claim about the edge looks at, because the sharpness overshoots until the oscillation
along the top eigenvector has grown: by e^L after √(L/r) steps, where sharpness over threshold rises by r a step. For L = 15
that is 70 to 120 steps at the default step sizes and 250 in the README's run."""
FEWEST = 3
"""Measurements below the threshold that a trend needs."""
COURSE = ("sharpness", "second", "ratio", "loss", "gradient_alignment", "step_alignment")
"""Quantities of a measurement."""
AT_EDGE = ("plateau_ratio", "plateau_sharpness", "increase_after", "long_change", "lemma_broken", "step_share")
"""Quantities of the time at the edge: geometric means of the sharpness over the threshold and of the sharpness, the share of
steps with a loss that rises, the mean loss in the second half of that time over the first, the share of steps without the
descent lemma's decrease, and of the step in the top eigenspace."""
NEVER = "the run did not reach its threshold"


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

    @property
    def below(self) -> int:
        """The number of measurements before the crossing."""
        return len(self.steps) if self.crossing is None else int(np.sum(self.steps < self.crossing))

    @property
    def unsettled(self) -> str:
        """Why the run says nothing of the time at the edge; empty if it does."""
        if self.crossing is None:
            return NEVER
        if self.trace.diverged is not None:
            return "the run diverged"
        return "" if self.steps[-1] > self.start else f"the run ended within {SETTLING} steps of reaching its threshold"

    @property
    def start(self) -> int:
        """The step from which the run counts as at the edge, if it gets there."""
        return (self.crossing or 0) + SETTLING

    def rows(self) -> list[dict[str, object]]:
        """Observations: what claims decide on, and the course."""
        return [*self.before(), *self.reached(), *self.at_edge(), *self.course()]

    def course(self) -> list[dict[str, object]]:
        """Observations of every measurement, and of the divergence."""
        rows = divergence(self.trace)
        for seen in self.measured:
            found = {**seen, "ratio": seen["sharpness"] / self.threshold}
            at = {"step": seen["step"], "threshold": self.threshold}
            rows += [observed(name, found[name], **at) for name in COURSE if name in found]
        return rows

    def before(self) -> list[dict[str, object]]:
        """Observations of the time below the threshold: does the sharpness rise, and does the loss at every step?"""
        if self.below < FEWEST:
            few = f"it was measured fewer than {FEWEST} times below its threshold"
            return _told(dict.fromkeys(("trend", "increase_before"), np.nan), few)
        steps, sharpness = self.steps[: self.below], self.sharpness[: self.below]
        losses = self.losses[: int(steps[-1]) + 1]
        return _told({"trend": kendalltau(steps, sharpness).statistic, "increase_before": _share(np.diff(losses) > 0)})

    def reached(self) -> list[dict[str, object]]:
        """Observations of the crossing: when it is, and whether the run outlives it."""
        if self.crossing is None:
            return _told(dict.fromkeys(("crossing", "survived"), np.nan), NEVER)
        return _told({"crossing": self.crossing, "survived": self.trace.diverged is None})

    def at_edge(self) -> list[dict[str, object]]:
        """Observations of the time at the edge, which begins `SETTLING` steps after the crossing."""
        if self.unsettled:
            return _told(dict.fromkeys(AT_EDGE, np.nan), self.unsettled)
        there = self.steps >= self.start
        losses = self.losses[self.start :]
        squares = self.trace.series("square")[self.start : -1]
        shares = self.trace.series("step_alignment")
        ratio = float(np.exp(np.log(self.ratio[there]).mean()))
        first, second = np.array_split(losses, 2)
        values = (
            ratio,
            ratio * self.threshold,
            _share(np.diff(losses) > 0),
            float(second.mean() / first.mean()),
            _share(np.diff(losses) > -self.eta / 2 * squares),
            float(shares[there].mean()),
        )
        return _told(dict(zip(AT_EDGE, values, strict=True)))


def _told(found: Mapping[str, float], apart: str = "") -> list[dict[str, object]]:
    """Observations by name, outside the assumptions for a reason if there is one."""
    return [observed(name, float(value), **(outside(apart) if apart else {})) for name, value in found.items()]


def divergence(trace: Trace) -> list[dict[str, object]]:
    """The observation that a run diverged, if it did."""
    if trace.diverged is None:
        return []
    return [observed("diverged", float(trace.diverged), status=trace.status)]


def _share(happened: Float[np.ndarray, " K"]) -> float:
    return float(np.mean(happened))
