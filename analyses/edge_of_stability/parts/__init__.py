"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.edge_of_stability.part import Part
from analyses.edge_of_stability.parts import (
    chebyshev,
    flow,
    losses,
    preconditioned,
    published,
    quadratic,
    schedules,
    structures,
    training,
)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        quadratic.PART,
        training.PART,
        flow.PART,
        schedules.PART,
        losses.PART,
        structures.PART,
        preconditioned.PART,
        chebyshev.PART,
        published.PART,
    )
}
