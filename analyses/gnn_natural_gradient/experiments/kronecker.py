"""How good is A ⊗ G on a graph? Against the exact Fisher block of every layer, of labelled nodes (claim 5).

On karate, in float64 and without dropout, at the start of training and after it. Where the form is exact, it is an identity:
a single isolated node, and a graph without edges whose nodes are all labelled, on which it is K-FAC of an MLP.
"""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.claims import claim
from analyses.gnn_natural_gradient.arms import MEMORY
from analyses.gnn_natural_gradient.comparisons import PAPER
from analyses.gnn_natural_gradient.config import Config
from analyses.gnn_natural_gradient.recipe import ADAM
from analyses.gnn_natural_gradient.training import GraphTraining, Setting, izadi, setting_of
from curvlab import jacobian, sqrt_fisher, study
from curvlab.fisher import KFAC, BlockDiagonal
from curvlab.nn import GraphNetwork, gcn
from curvlab.rows import Rows

GRAPH = "karate"
STAGES = {"start": 0, "trained": 50}
"""Epochs of the published recipe before a measurement."""
EPSILON = ADAM.epsilon
HIDDEN = 16


def _measure(cell: study.Cell, _: study.Context[Config]) -> study.Observations:
    seed = int(cell["seed"])
    setting = setting_of(GRAPH, "public", "cpu", "float64", seed)
    if cell["stage"] == "exact":
        return [_isolated(setting, seed), _without_edges(setting, seed)]
    return _quality(_trained(setting, STAGES[str(cell["stage"])], seed), setting)


def _trained(setting: Setting, epochs: int, seed: int) -> GraphNetwork:
    """Return the network of a seed after some epochs, in evaluation mode."""
    run = GraphTraining(setting, ADAM, seed, epochs)
    study.follow(run, epochs)
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
    return float(((a.flatten() @ b.flatten()) / (a.norm() * b.norm())).clamp(-1, 1))


def _quality(model: GraphNetwork, setting: Setting) -> list[dict[str, object]]:
    """Errors of the blocks; cosines of the directions and of what they do to the outputs of all nodes."""
    nodes, loss = setting.graph.train, nn.CrossEntropyLoss()
    y = setting.labels[nodes]
    exact = BlockDiagonal().update(sqrt_fisher(model, loss, nodes, y, "exact"))
    kfac = izadi().update(sqrt_fisher(model, loss, nodes, y, "empirical"))
    F, K = exact.to_dense(), kfac.to_dense()
    rows = []
    for name, columns in _blocks(model).items():
        f, k = F[columns, columns], K[columns, columns]
        found = {"error": float((k - f).norm() / f.norm()), "scaled_error": sqrt(max(1 - _cosine(k, f) ** 2, 0.0))}
        rows += [study.observed(quantity, value, layer=name) for quantity, value in found.items()]
    gradient = _gradient(model, nodes, y)
    J = jacobian(model, torch.arange(len(setting.labels)))
    natural, theirs = exact.solve(gradient, EPSILON), kfac.solve(gradient, EPSILON)
    for space, of in (("parameters", lambda v: v), ("outputs", J.matvec)):
        cosines = {"kfac": _cosine(of(theirs), of(natural)), "gradient": _cosine(of(gradient), of(natural))}
        rows += [study.observed("cosine", value, direction=d, space=space) for d, value in cosines.items()]
        rows.append(study.observed(f"nearer_{space}", cosines["kfac"] - cosines["gradient"]))
    return rows


def _rows(model: nn.Module, x: Tensor, y: Tensor) -> Rows:
    return sqrt_fisher(model, nn.CrossEntropyLoss(), x, y, "empirical")


def _isolated(setting: Setting, seed: int) -> dict[str, object]:
    """Largest relative distance of a layer's A ⊗ G from its empirical Fisher block, on one node without edges."""
    node, none = seed % len(setting.labels), torch.zeros(2, 0, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    model = gcn(setting.features[node : node + 1], none, (HIDDEN, setting.graph.classes), generator=generator)
    rows = _rows(model, torch.tensor([0]), setting.labels[node : node + 1])
    K, F = izadi().update(rows).to_dense(), BlockDiagonal().update(rows).to_dense()
    value = max(float((K[at, at] - F[at, at]).norm() / F[at, at].norm()) for at in _blocks(model).values())
    return study.observed("isolated", value, tolerance=study.round_off(len(K)))


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
    return study.observed("without_edges", value, tolerance=study.round_off(len(gradient)) / EPSILON)


SOURCE = f"{PAPER} (docs/theory/izadi_2020.md, claim 5, derived)"
SPACES = {"parameters": "direction", "outputs": "response of the outputs of all nodes"}
"""Where cosines are taken, and of what."""


def _of_stage(stage: str) -> list[study.Claim]:
    return [
        claim(f"kronecker-error-{stage}", SOURCE, study.Inequality("error", "less", 1.0, centre="geometric mean"),
              f"A ⊗ G is nearer to a layer's exact Fisher block than zero is ({stage}).",
              "Frobenius norm of the difference over that of the block, the larger of the two layers; karate, one labelled node "
              "a class, drawn by the seed.",
              study.undecided("A sums over all nodes and divides by the labelled ones, which makes it large."),
              group="derived", bound_from="zero is at a distance of 1", at={"stage": stage}, estimate=study.worst_by_seed),
        *(
            claim(f"kronecker-{space}-{stage}", SOURCE, study.Inequality(f"nearer_{space}", "greater", 0.0, centre="mean"),
                  f"The preconditioned {what} is nearer to the natural one than the plain gradient's ({stage}).",
                  "Cosine with the step of the exact block-diagonal Fisher matrix at ρ = ε, that of K-FAC minus that of the "
                  "gradient; karate.",
                  study.undecided("No theorem covers interacting nodes."), group="derived", at={"stage": stage})
            for space, what in SPACES.items()
        ),
    ]  # fmt: skip


CLAIMS = [
    claim("kronecker-isolated", SOURCE, study.Identity("isolated"),
          "On a single isolated node A ⊗ G is the empirical Fisher block of a layer.",
          "Largest relative Frobenius distance over layers.",
          study.supported("One row is one Kronecker product."), group="self-check", at={"stage": "exact"}),
    claim("kronecker-mlp", SOURCE, study.Identity("without_edges"),
          "On a graph without edges, all nodes labelled, the step is that of K-FAC (empirical, √ε on each factor) of an MLP.",
          "Relative distance of the steps.",
          study.supported("Nodes do not interact, so each is a sample."), group="self-check", at={"stage": "exact"}),
    *(one for stage in STAGES for one in _of_stage(stage)),
]  # fmt: skip


KRONECKER: study.Experiment[Config] = study.Experiment(
    name="kronecker",
    cells=[{"stage": stage} for stage in (*STAGES, "exact")],
    measure=_measure,
    varies=("initialisation", "split", "draws"),
    claims=CLAIMS,
    seconds=0.3,
    memory=MEMORY,
)
