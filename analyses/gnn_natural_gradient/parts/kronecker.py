"""How good is A ⊗ G on a graph? Against the exact Fisher block of every layer, of labelled nodes (claim 5).

On karate, in float64 and without dropout, at the start of training and after it. Where the form is exact, it is an identity:
a single isolated node, and a graph without edges whose nodes are all labelled, on which it is K-FAC of an MLP.
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.estimates import by_seed, identities, worst_by_seed
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.part import PAPER, Part
from analyses.gnn_natural_gradient.recipe import ADAM
from analyses.gnn_natural_gradient.training import Run, Setting, setting_of
from analyses.part import TOLERANCE_FACTOR, Observations, where
from curvlab import jacobian, sqrt_fisher
from curvlab.fisher import KFAC, BlockDiagonal
from curvlab.nn import GraphNetwork, gcn
from curvlab.rows import Rows
from curvlab.study import Cell, Claim, Identity, Inequality

NAME = "kronecker"
GRAPH = "karate"
STAGES = {"start": 0, "trained": 50}
"""Epochs of the published recipe before a measurement."""
EPSILON = ADAM.epsilon
HIDDEN = 16


def izadi() -> KFAC:
    """Return the paper's structure."""
    return KFAC(sharing="gradient", factored_damping="equal")


def _cells(config: Config) -> list[Cell]:
    points = [*STAGES, "exact"]
    return [Cell({"part": NAME, "stage": stage, "seed": seed}) for stage in points for seed in range(config.seeds)]


def _measure(cell: Cell, config: Config) -> Observations:  # noqa: ARG001
    setting, seed = setting_of(GRAPH, "public", "cpu", "float64"), int(cell["seed"])
    if cell["stage"] == "exact":
        return [_isolated(setting, seed), _without_edges(setting, seed)]
    return _quality(_trained(setting, STAGES[str(cell["stage"])], seed), setting)


def _trained(setting: Setting, epochs: int, seed: int) -> GraphNetwork:
    """Return the network of a seed after some epochs, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        run = Run(setting, ADAM, seed, max(epochs, 1))
        for _ in range(epochs):
            run.step()
    return run.model.eval()


def _gradient(model: nn.Module, nodes: Tensor, y: Tensor) -> Float[Tensor, " P"]:
    loss = nn.functional.cross_entropy(model(nodes), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def _blocks(model: nn.Module) -> dict[str, slice]:
    """Columns of every layer, whose weight and bias are neighbours."""
    blocks, start = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = sum(parameter.numel() for parameter in module.parameters())
            blocks[name] = slice(start, start + size)
            start += size
    return blocks


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a.flatten() @ b.flatten()) / (a.norm() * b.norm()))


def _quality(model: GraphNetwork, setting: Setting) -> list[dict[str, object]]:
    """Errors of the blocks; cosines of the directions and of what they do to the outputs of all nodes."""
    nodes, loss = setting.graph.train, nn.CrossEntropyLoss()
    y = setting.labels[nodes]
    exact = BlockDiagonal().update(sqrt_fisher(model, loss, nodes, y, "exact"))
    kfac = izadi().update(sqrt_fisher(model, loss, nodes, y, "empirical"))
    F, K = exact.to_dense(), kfac.to_dense()
    rows: list[dict[str, object]] = []
    for name, columns in _blocks(model).items():
        f, k = F[columns, columns], K[columns, columns]
        found = {"error": float((k - f).norm() / f.norm()), "scaled_error": sqrt(max(1 - _cosine(k, f) ** 2, 0.0))}
        rows += [{"quantity": quantity, "value": value, "layer": name} for quantity, value in found.items()]
    gradient = _gradient(model, nodes, y)
    J = jacobian(model, torch.arange(len(setting.labels)))
    natural, theirs = exact.solve(gradient, EPSILON), kfac.solve(gradient, EPSILON)
    for space, of in (("parameters", lambda v: v), ("outputs", J.matvec)):
        cosines = {"kfac": _cosine(of(theirs), of(natural)), "gradient": _cosine(of(gradient), of(natural))}
        rows += [{"quantity": "cosine", "value": value, "direction": d, "space": space} for d, value in cosines.items()]
        rows.append({"quantity": f"nearer_{space}", "value": cosines["kfac"] - cosines["gradient"]})
    return rows


def _rows(model: nn.Module, x: Tensor, y: Tensor) -> Rows:
    return sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, "empirical")


def _tolerance(size: int) -> float:
    return TOLERANCE_FACTOR * size * torch.finfo(torch.float64).eps


def _isolated(setting: Setting, seed: int) -> dict[str, object]:
    """Largest relative distance of a layer's A ⊗ G from its empirical Fisher block, on one node without edges."""
    node, none = seed % len(setting.labels), torch.zeros(2, 0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    model = gcn(setting.features[node : node + 1], none, (HIDDEN, setting.graph.classes), generator=generator)
    rows = _rows(model, torch.tensor([0]), setting.labels[node : node + 1])
    K, F = izadi().update(rows).to_dense(), BlockDiagonal().update(rows).to_dense()
    value = max(float((K[at, at] - F[at, at]).norm() / F[at, at].norm()) for at in _blocks(model).values())
    return {"quantity": "isolated", "value": value, "tolerance": _tolerance(len(K))}


def _without_edges(setting: Setting, seed: int) -> dict[str, object]:
    """Relative distance of the direction from that of K-FAC on an MLP, on a graph without edges, all nodes labelled."""
    x, y = setting.features, setting.labels
    generator = torch.Generator().manual_seed(seed)
    graph = gcn(x, torch.zeros(2, 0, dtype=torch.long), (HIDDEN, setting.graph.classes), generator=generator)
    layers = [module for module in graph.network if isinstance(module, nn.Linear)]
    mlp = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    nodes = torch.arange(len(y))
    gradient = _gradient(mlp, x, y)
    theirs = izadi().update(_rows(graph, nodes, y)).solve(gradient, EPSILON)
    ours = KFAC(factored_damping="equal").update(_rows(mlp, x, y)).solve(gradient, EPSILON)
    assert isinstance(theirs, Tensor)
    assert isinstance(ours, Tensor)
    value = float((theirs - ours).norm() / ours.norm())
    return {"quantity": "without_edges", "value": value, "tolerance": _tolerance(len(gradient)) / EPSILON}


def _claims(config: Config) -> list[Claim]:  # noqa: ARG001
    source = f"{PAPER} (theory file, claim 5, derived)"
    claims = [
        Claim(
            id=f"kronecker-{name}",
            statement=statement,
            source=source,
            measured=measured,
            rule=Identity(),
            estimate=identities,
            expected="supported",
            reason=reason,
            needs=where(NAME, stage="exact"),
            quantities=(quantity,),
        )
        for name, quantity, statement, measured, reason in (
            ("isolated", "isolated", "On a single isolated node A ⊗ G is the empirical Fisher block of a layer.",
             "Largest relative Frobenius distance over layers.", "One row is one Kronecker product."),
            ("mlp", "without_edges", "On a graph without edges, all nodes labelled, the step is that of K-FAC (empirical, √ε on "
             "each factor) of an MLP.", "Relative distance of the steps.", "Nodes do not interact, so each is a sample."),
        )
    ]  # fmt: skip
    for stage in STAGES:
        claims.append(
            Claim(
                id=f"kronecker-error-{stage}",
                statement=f"A ⊗ G is nearer to a layer's exact Fisher block than zero is ({stage}).",
                source=source,
                measured="Frobenius norm of the difference over that of the block, the larger of the two layers; karate, the "
                "split's labels.",
                rule=Inequality(1.0, "less"),
                estimate=worst_by_seed,
                expected="open",
                reason="A sums over all nodes and divides by the labelled ones, which makes it large.",
                needs=where(NAME, stage=stage),
                quantities=("error",),
            )
        )
        for space, words in (("parameters", "direction"), ("outputs", "response of the outputs of all nodes")):
            claims.append(
                Claim(
                    id=f"kronecker-{space}-{stage}",
                    statement=f"The preconditioned {words} is nearer to the natural one than the plain gradient's ({stage}).",
                    source=source,
                    measured="Cosine with the step of the exact block-diagonal Fisher matrix at ρ = ε, that of K-FAC minus that "
                    "of the gradient; karate.",
                    rule=Inequality(0.0, "greater"),
                    estimate=by_seed,
                    expected="open",
                    reason="No theorem covers interacting nodes.",
                    needs=where(NAME, stage=stage),
                    quantities=(f"nearer_{space}",),
                )
            )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 0.3)
