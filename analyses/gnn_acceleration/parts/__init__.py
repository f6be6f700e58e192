"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.gnn_acceleration.part import Part
from analyses.gnn_acceleration.parts import conditioning, flows, identities, labels, relu, search

PARTS: dict[str, Part] = {
    part.name: part for part in (identities.PART, flows.PART, search.PART, conditioning.PART, labels.PART, relu.PART)
}
