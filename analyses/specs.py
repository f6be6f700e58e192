"""What analyses ask of the names of problems and structures."""

from typing import Any

from curvlab.fisher import STRUCTURES, LayerWise
from curvlab.problems import GRAPHS, swept_arguments

MEMBERS = tuple(name for name in STRUCTURES if name != LayerWise.key)
"""Structures but the layer-wise one, which is a family whose members with a name are here."""


def classifies_nodes(spec: str) -> bool:
    """Whether the inputs of a problem are nodes of a graph, so that no other network can be built on them."""
    return spec.removesuffix("-gcn") in GRAPHS


def squared(spec: str) -> dict[str, Any]:
    """Return the argument by which a problem that classifies by default has a half squared error; none if it has one."""
    return {"loss": "half-squared"} if swept_arguments(spec).get("loss") == "cross-entropy" else {}
