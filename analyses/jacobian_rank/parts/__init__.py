"""The parts of the analysis, one experiment a file; a new one is added to `PARTS`."""

from analyses.jacobian_rank.part import Part
from analyses.jacobian_rank.parts import (
    general,
    generalisation,
    kfac,
    modes,
    networks,
    paths,
    rank,
    structures,
    trained,
    training,
    width,
)

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        rank.PART,
        training.PART,
        networks.PART,
        kfac.PART,
        modes.PART,
        width.PART,
        general.PART,
        paths.PART,
        generalisation.PART,
        structures.PART,
        trained.PART,
    )
}
