"""What analyses ask of the names of problems and structures."""

from collections.abc import Collection
from typing import Any

from curvlab.fisher import STRUCTURES, LayerWise, of_theory
from curvlab.problems import GRAPHS, Problem, swept_arguments


def members() -> tuple[str, ...]:
    """Return the structures of theory but the layer-wise one, which is a family whose members with a name are here."""
    return tuple(name for name in of_theory() if name != LayerWise.key)


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


def described(problem: Problem, **swept: object) -> dict[str, object]:
    """What a problem is, by name, for the reports of what is measured on it: samples, network and loss.

    Args:
        problem: The problem.
        swept: What the analysis varies, instead of what the problem has; empty entries are left out.
    """
    (inputs, targets), tested = problem.train, len(problem.test[0])
    nodes = classifies_nodes(problem.name)
    parameters = sum(parameter.numel() for parameter in problem.model.parameters())
    entries = {
        "problem": problem.name,
        "N": f"{len(inputs)} {'nodes of one graph' if nodes else 'training samples'}, {tested} for testing",
        "input": " × ".join(map(str, inputs.shape[1:])) or "1",
        "target": " × ".join(map(str, targets.shape[1:])) or "a class",
        "network": f"{type(problem.model).__name__} with {parameters} parameters",
        "loss": str(problem.loss).removesuffix("()"),
    }
    return {name: entry for name, entry in (entries | swept).items() if entry not in ("", ())}


def squared(spec: str) -> dict[str, Any]:
    """Return the argument by which a problem that classifies by default has a half squared error; none if it has one."""
    return {"loss": "half-squared"} if swept_arguments(spec).get("loss") == "cross-entropy" else {}
