"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.gnn_natural_gradient.part import Part
from analyses.gnn_natural_gradient.parts import ablations, accuracy, kronecker, sensitivity, timing, tuning, unlabelled

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        tuning.PART, accuracy.PART, timing.PART, unlabelled.PART, ablations.PART, sensitivity.PART, kronecker.PART,
    )
}  # fmt: skip
