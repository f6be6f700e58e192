"""The effect of a claim over several problems, each of which has its own true effect."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import stdtrit

from curvlab.study.overviews.standing import Standing
from curvlab.study.report import Finding

ENOUGH = 5
"""Problems from which on effects are pooled: an interval over fewer says little."""
PER_PROBLEM = Float[np.ndarray, " problems"]


@dataclass(frozen=True)
class Pooled:
    """A mean of the true effects of several problems, by random effects.

    Attributes:
        estimate: The mean, on the claim's own scale: of a log scale the geometric mean.
        low: Lower end of its 95 % interval, by Hartung and Knapp (Statistics in Medicine 20, 2001).
        high: Upper end.
        heterogeneity: The share I² of the variation between the estimates that is not noise of the seeds (Higgins and
            Thompson, Statistics in Medicine 21, 2002).
        problems: How many problems that is over.
    """

    estimate: float
    low: float
    high: float
    heterogeneity: float
    problems: int

    def like(self, finding: Finding) -> Finding:
        """A finding whose estimate and interval are these, to be drawn beside those of the problems."""
        alone = replace(finding, low=math.nan, high=math.nan, values=(), seeds=0)
        return replace(alone, estimate=self.estimate, low_95=self.low, high_95=self.high)


def pooled(standing: Standing) -> Pooled | str:
    """The effect over all problems on which a claim was measured inside its assumptions, or why there is none."""
    found = {
        problem: one.finding
        for problem, one in standing.judged.items()
        if one.finding.outcome in ("supported", "refuted", "inconclusive")
    }
    if len(found) < ENOUGH:
        return f"not pooled: measured on {len(found)} problems, and an interval needs {ENOUGH}"
    scales = {finding.scale for finding in found.values()}
    if any(finding.sort == "Spread" for finding in found.values()) or scales not in ({"linear"}, {"log"}):
        return "not pooled: only means and geometric means are, where Student's t rests on their seeds on every problem"
    if standing.reworded:
        return f"not pooled: the claim is another on {', '.join(standing.reworded)}"
    logarithmic = scales == {"log"}
    values = [np.asarray(finding.values, dtype=float) for finding in found.values()]
    values = [np.log(one) for one in values] if logarithmic else values
    variances = np.array([one.var(ddof=1) / len(one) for one in values])
    if not (variances > 0).all():
        return "not pooled: the values of a problem do not vary over seeds"
    mean, error, heterogeneity = random_effects(np.array([one.mean() for one in values]), variances)
    half = -float(stdtrit(len(found) - 1, 0.025)) * error
    ends = (mean, mean - half, mean + half)
    estimate, low, high = map(math.exp, ends) if logarithmic else ends
    return Pooled(estimate, low, high, heterogeneity, len(found))


def random_effects(effects: PER_PROBLEM, variances: PER_PROBLEM) -> tuple[float, float, float]:
    """Return the mean of the true effects of several problems, its standard error, and the heterogeneity I².

    The variance τ² between the true effects is that of Paule and Mandel (Journal of Research of the NBS 87, 1982). The error
    is that of Hartung and Knapp, with one degree of freedom less than there are problems, and at least that of the seeds alone
    (Knapp and Hartung, Statistics in Medicine 22, 2003): problems that agree by chance do not make it vanish.

    Args:
        effects: Their estimates, two at least.
        variances: Squares of their standard errors, all positive.
    """
    freedom = len(effects) - 1

    def weighed(between: float) -> tuple[PER_PROBLEM, float, float]:
        weights = 1 / (variances + between)
        mean = float(weights @ effects / weights.sum())
        return weights, mean, float(weights @ (effects - mean) ** 2)

    _, _, noise = weighed(0.0)
    most = float(np.sum((effects - effects.mean()) ** 2)) / freedom
    between = 0.0
    if noise > freedom:
        between = most * float(brentq(lambda share: weighed(share * most)[2] - freedom, 0.0, 1.0, xtol=1e-14))
    weights, mean, rest = weighed(between)
    error = math.sqrt(max(1.0, rest / freedom) / weights.sum())
    return mean, error, max(0.0, 1 - freedom / noise) if noise > 0 else 0.0
