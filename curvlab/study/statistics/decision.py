"""The statistical decision on a family of claims, from the evidence that the seeds give for each.

Every claim is tested in both directions. Its *support* p-value has the null hypothesis that the claim is
false, its *refutation* p-value that the claim is true; `curvlab.study.statistics.rules` has both for every rule.

Holm's procedure runs over the family once per direction, each time at the same level (5 %). Hence, on the domain of
each rule's evidence and under any dependence between the claims: the probability that *any* true claim is refuted is
at most 5 %, and the probability that any false claim is supported is at most 5 %. No claim can come out both ways.

The family is fixed before the data are seen: a claim that turns out to be untestable stays in it with p = 1.

A sequential run looks several times, and the same holds over all its looks together: Holm's procedure runs over the
repeated p-values of `curvlab.study.statistics.multiplicity.Looks`. A claim stands on the seeds of the look that decided it.

Intervals are those of the level α_i at which Holm's procedure tested the claim, and say the same as the
decision: confidence 1 − 2α_i, but 1 − α_i for a refuted equivalence; of a claim that passed neither test, the
wider of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from curvlab.study.statistics.evidence import Evidence
from curvlab.study.statistics.multiplicity import Holm, Looks, holm
from curvlab.study.statistics.rules import Tested

SUPPORT, REFUTATION = 0, 1


@dataclass(frozen=True)
class Decision:
    """What became of one claim.

    Attributes:
        supported: Whether its support is significant; None if neither that nor its refutation is.
        look: The look that it stands on.
        evidence: The evidence at that look.
        low: Lower end of the interval at the level at which Holm's procedure tested the claim.
        high: Upper end.
        confidence: Confidence of that interval.
        p_value: p-value of the test that was passed: for refutation if the claim is refuted, else for support.
        p_adjusted: The same after Holm's correction, over all looks.
        levels: At which p-value it was supported, and at which refuted, at the look that it stands on.
        detectable: The smallest effect that its test for support finds with a probability of 80 %, in words.
    """

    supported: bool | None
    look: int
    evidence: Evidence
    low: float
    high: float
    confidence: float
    p_value: float
    p_adjusted: float
    levels: tuple[float, float]
    detectable: str

    def outcome(self, p_values: tuple[float, float]) -> bool | None:
        """Whether other p-values, of the same evidence, are significant at its levels: as `supported`."""
        support, refutation = (p <= level for p, level in zip(p_values, self.levels, strict=True))
        return True if support else False if refutation else None


@dataclass
class _Claim:
    """A claim while its family is decided."""

    rule: Tested
    evidence: Sequence[Evidence | None]
    repeated: list[float] = field(default_factory=lambda: [1.0, 1.0])
    look: int = -1
    passed: int | None = None

    def examine(self, look: int, looks: Looks) -> None:
        """Take the evidence of one more look, unless the claim is decided or was not measured further."""
        evidence = self.evidence[look] if look < len(self.evidence) else None
        if self.passed is None and evidence is not None:
            self.look = look
            p_values = self.rule.p_values(evidence)
            self.repeated = [min(p, looks.repeated(q, look)) for p, q in zip(self.repeated, p_values, strict=True)]


def decide(
    tests: Sequence[tuple[Tested, Sequence[Evidence | None]]], level: float, looks: Looks | None = None
) -> list[Decision | None]:
    """Decide a family at the family-wise ``level``.

    Args:
        tests: The rule of each claim, and the evidence at each look that was made for it; None where a look has none.
            A claim without evidence is not decided, but counts.
        level: Of support and of refutation.
        looks: When there are looks; None if only once.

    Returns:
        One decision per claim, None where there is no evidence.
    """
    looks = looks or Looks((1,))
    family = [_Claim(rule, evidence) for rule, evidence in tests]
    corrected: list[Holm] = []
    for look in range(max((len(claim.evidence) for claim in family), default=0)):
        for claim in family:
            claim.examine(look, looks)
        corrected = [holm([claim.repeated[way] for claim in family], level) for way in (SUPPORT, REFUTATION)]
        for i, claim in enumerate(family):
            if claim.passed is None:
                claim.passed = next((way for way in (SUPPORT, REFUTATION) if corrected[way].rejected[i]), None)
    at = [[(float(found.level[i]), float(found.adjusted[i])) for found in corrected] for i in range(len(family))]
    return [_decision(claim, at[i], looks) for i, claim in enumerate(family)]


def _decision(claim: _Claim, corrected: Sequence[tuple[float, float]], looks: Looks) -> Decision | None:
    evidence = claim.evidence[claim.look] if claim.look >= 0 else None
    if evidence is None:
        return None
    levels = [looks.nominal(level, claim.look) for level, _ in corrected]
    confident, doubtful = 1 - 2 * levels[SUPPORT], 1 - claim.rule.sides * levels[REFUTATION]
    confidence = {SUPPORT: confident, REFUTATION: doubtful, None: max(confident, doubtful)}[claim.passed]
    way = REFUTATION if claim.passed == REFUTATION else SUPPORT
    low, high = evidence.interval(confidence)
    return Decision(
        supported=None if claim.passed is None else claim.passed == SUPPORT,
        look=claim.look,
        evidence=evidence,
        low=low,
        high=high,
        confidence=confidence,
        p_value=claim.rule.p_values(evidence)[way],
        p_adjusted=corrected[way][1],
        levels=(levels[SUPPORT], levels[REFUTATION]),
        detectable=evidence.detectable(levels[SUPPORT]),
    )
