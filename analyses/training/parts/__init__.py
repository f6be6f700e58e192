"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.training.part import Part
from analyses.training.parts import contraction, isotropic, judging, timing, tuning

PARTS: dict[str, Part] = {
    part.name: part for part in (tuning.PART, judging.PART, timing.PART, isotropic.PART, contraction.PART)
}
