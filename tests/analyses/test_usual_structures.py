"""Which structures analyses have without being told."""

import pytest

from analyses.block_structure.config import Config as BlockStructure
from analyses.edge_of_stability.config import Config as EdgeOfStability
from analyses.jacobian_rank.config import Config as JacobianRank
from analyses.ntk_isotropy.config import Config as Isotropy
from analyses.specs import members
from analyses.spectrum.config import Config as Spectrum
from analyses.training.config import Config as Training
from curvlab.fisher import STRUCTURES, of_theory


@pytest.mark.parametrize("config", [BlockStructure, EdgeOfStability, JacobianRank, Isotropy, Spectrum, Training])
def test_analyses_have_the_structures_that_approximate_the_fisher_matrix(config: type) -> None:
    left_out = {"sketched", "adaptive-inverse"}
    assert left_out <= {key for key, structure in STRUCTURES.items() if structure.of_optimiser}
    assert set(members()) < set(of_theory()) <= set(STRUCTURES) - left_out
    assert config().structures in (of_theory(), members())
    assert config(structures=("sketched", "adaptive-inverse")).structures == ("sketched", "adaptive-inverse")
