"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.ntk_isotropy.part import Part
from analyses.ntk_isotropy.parts import (
    cross_entropy,
    damping,
    gradient_descent,
    inputs,
    positivity,
    response,
    stability,
    steps,
    tridiagonal,
)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        response.PART,
        tridiagonal.PART,
        inputs.PART,
        steps.PART,
        gradient_descent.PART,
        damping.PART,
        positivity.PART,
        cross_entropy.PART,
        stability.PART,
    )
}
