"""What analyses ask of the names of problems and structures."""

from collections.abc import Collection
from typing import Any

from curvlab.fisher import STRUCTURES, LayerWise
from curvlab.problems import GRAPHS, swept_arguments


def members() -> tuple[str, ...]:
    """Return the structures but the layer-wise one, which is a family whose members with a name are here."""
    return tuple(name for name in STRUCTURES if name != LayerWise.key)


def check_structures(names: Collection[str], *, families: bool = True) -> None:
    """Make sure that structures, keys or ``module:Class``, exist; without families that they are no whole family.

    Raises:
        ValueError: one does not, with the nearest known one; or it is a family.
        BrokenPlugin: one cannot be imported.
    """
    for name in names:
        loaded = STRUCTURES[name] if ":" in name or name not in STRUCTURES else None
        if not families and (name == LayerWise.key or loaded is LayerWise):
            raise ValueError(f"{name!r} is a family of structures, not one; choose from {', '.join(members())}.")


def classifies_nodes(spec: str) -> bool:
    """Whether the inputs of a problem are nodes of a graph, so that no other network can be built on them."""
    return spec.removesuffix("-gcn") in GRAPHS


def squared(spec: str) -> dict[str, Any]:
    """Return the argument by which a problem that classifies by default has a half squared error; none if it has one."""
    return {"loss": "half-squared"} if swept_arguments(spec).get("loss") == "cross-entropy" else {}
