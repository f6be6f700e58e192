"""The statistical decision on a family of claims, from the mean and the standard error of each.

Every claim is tested in both directions. Its *support* p-value has the null hypothesis that the claim is
false, its *refutation* p-value that the claim is true:

- `Inequality`, mean < b: support and refutation are the two one-sided t-tests of the mean against b.
- `Equivalence`, mean = target ± margin: support is TOST, the larger of the two one-sided p-values against the
  ends of the margin. Refutation is twice the smaller of the two one-sided p-values beyond those ends, the
  doubling because the mean may leave on either side (without it, a margin that is small against the noise
  would give 10 %, not 5 %).

Holm's procedure runs over the family once per direction, each time at the same level (5 %). Hence, for values
that are normally distributed over seeds and under any dependence between the claims: the probability that
*any* true claim is refuted is at most 5 %, and the probability that any false claim is supported is at most
5 %. No claim can come out both ways.

The family is fixed before the data are seen: a claim that turns out to be untestable stays in it with p = 1.

Intervals are those of the level α_i at which Holm's procedure tested the claim, and say the same as the
decision: confidence 1 − 2α_i, but 1 − α_i for a refuted equivalence; of a claim that passed neither test, the
wider of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from curvlab.study.claims import Equivalence, Inequality, Outcome
from curvlab.study.inference import Summary, holm


@dataclass(frozen=True)
class Decision:
    """Outcome of one claim, with the interval and the p-value of the test that decided; see `Verdict`."""

    outcome: Outcome
    low: float
    high: float
    confidence: float
    p_value: float
    p_adjusted: float


def decide(
    rules: Sequence[Equivalence | Inequality], summaries: Sequence[Summary | None], level: float
) -> list[Decision | None]:
    """Decide a family at the family-wise ``level``; None for a rule without a summary, which still counts."""
    p_values = [_p_values(rule, summary) for rule, summary in zip(rules, summaries, strict=True)]
    support = holm([p for p, _ in p_values], level)
    refutation = holm([p for _, p in p_values], level)
    decisions: list[Decision | None] = []
    for i, (rule, summary) in enumerate(zip(rules, summaries, strict=True)):
        if summary is None:
            decisions.append(None)
            continue
        sides = 1 if isinstance(rule, Equivalence) else 2
        confident, doubtful = 1 - 2 * float(support.level[i]), 1 - sides * float(refutation.level[i])
        outcome: Outcome = "inconclusive"
        confidence, test = max(confident, doubtful), support
        if support.rejected[i]:
            outcome, confidence = "supported", confident
        elif refutation.rejected[i]:
            outcome, confidence, test = "refuted", doubtful, refutation
        p_value = p_values[i][test is refutation]
        interval = summary.interval(confidence)
        decisions.append(Decision(outcome, *interval, confidence, p_value, float(test.adjusted[i])))
    return decisions


def _p_values(rule: Equivalence | Inequality, summary: Summary | None) -> tuple[float, float]:
    """p-values of support and of refutation."""
    if summary is None:
        return 1.0, 1.0
    if isinstance(rule, Inequality):
        below, above = summary.below(rule.bound), summary.above(rule.bound)
        return (below, above) if rule.direction == "less" else (above, below)
    low, high = rule.target - rule.margin, rule.target + rule.margin
    inside = max(summary.above(low), summary.below(high))
    outside = min(summary.below(low), summary.above(high))
    return inside, min(1.0, 2 * outside)
