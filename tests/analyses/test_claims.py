"""The claims of every analysis: each has an id of its own, says where it comes from, and can be decided by a planned cell."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest

SOURCES: Mapping[str, str] = {
    "block_structure": "",
    "edge_of_stability": "Cohen et al. 2021",
    "gnn_acceleration": "Xu, Zhang, Jegelka & Kawaguchi 2021",
    "gnn_natural_gradient": "Izadi, Fang, Stevenson & Lin 2020",
    "jacobian_rank": "Zhang, Martens & Grosse 2019",
    "ntk_isotropy": "",
    "spectrum": "",
    "training": "",
}
"""By analysis, what every claim's source names; "" where the sources are several."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "block_structure": {"depths": (1, 2), "widths": (6, 8), "races": True},
    "edge_of_stability": {
        "adam": (0.001,), "batch_size": (16, 32), "sweep_depths": (2,), "sweep_widths": (16,), "sweep_samples": (64,),
        "published": True,
    },
    "jacobian_rank": {"published": True},
}  # fmt: skip
"""What plans the cells of all claims, where the run without options does not."""


@pytest.mark.parametrize("name", SOURCES)
def test_claims_have_distinct_ids_sources_and_cells(name: str) -> None:
    analysis = import_module(f"analyses.{name}").ANALYSIS
    config = analysis.config(**OPTIONS.get(name, {}))
    claims, cells = analysis.claims(config), analysis.cells(config)
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.source, claim.id
        assert SOURCES[name] in claim.source, claim.id
        assert any(claim.needs(cell) for cell in cells), claim.id
