"""The terms of the speed against autodiff, over random graphs, depths, widths and losses (claim 4; the start of claim 8)."""

import numpy as np
import torch
from torch import Tensor, nn

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.networks import Loss, MultiscaleNetwork, gradients, loss_of
from analyses.gnn_acceleration.points import by_aggregation, memory, page
from analyses.gnn_acceleration.setting import powers, random_propagation
from curvlab import study
from curvlab.theory import graph_dynamics as theory

GRAPHS_A_SEED = 8
"""Random models of a cell."""
LOSSES = ("squared", "cross-entropy", "log-cosh")


def _measure(cell: study.Cell, _: study.Context[Config]) -> study.Observations:
    weights = study.generator(int(cell["seed"]), "weights")
    rng = np.random.default_rng(study.stream(int(cell["seed"]), "graphs"))
    rows = []
    for index in range(GRAPHS_A_SEED):
        depth, N, C = int(rng.integers(0, 5)), int(rng.integers(3, 9)), int(rng.integers(1, 4))
        widths = [int(width) for width in rng.integers(1, 6, size=depth + 1)]
        S = random_propagation(rng, N, str(cell["aggregation"]))
        x = torch.randn(N, widths[0], generator=weights, dtype=torch.float64)
        nodes = torch.from_numpy(np.sort(rng.choice(N, size=int(rng.integers(1, N + 1)), replace=False)))
        loss = loss_of(LOSSES[index % len(LOSSES)], torch.from_numpy(rng.integers(0, C, size=len(nodes))), C)
        for name, scales in (("single", (depth,)), ("multi", tuple(range(depth + 1)))):
            model = MultiscaleNetwork(S, widths, C, scales, nn.Identity(), weights)
            with torch.no_grad():
                for head in model.heads:
                    head.copy_(torch.randn(head.shape, generator=weights, dtype=torch.float64))
            rows += _compare(model, x, nodes, loss, name)
    return rows


def _compare(model: MultiscaleNetwork, x: Tensor, nodes: Tensor, loss: Loss, name: str) -> list[dict[str, object]]:
    """Every term against the square of its gradient, and their sum against ‖∇L‖²."""
    _, head_gradients, layer_gradients = gradients(model, x, nodes, loss)
    z = model(x)[nodes].detach().requires_grad_()
    (V,) = torch.autograd.grad(loss(z), z)
    features = [h[nodes].numpy().T for h in powers(model.propagation, x, len(model.layers))]
    heads = {scale: head.detach().numpy() for scale, head in zip(model.scales, model.heads, strict=True)}
    layers = [layer.detach().numpy() for layer in model.layers]
    of_heads, of_layers = theory.speed_terms(heads, layers, features, V.numpy().T)
    expected = [float(g.square().sum()) for g in (*head_gradients, *layer_gradients)]
    found = [*of_heads.values(), *of_layers]
    # ‖V‖²‖G‖² Π‖B‖², the size of what is summed up in the largest term.
    scale = max(
        float(V.square().sum()) * max(float(np.square(G).sum()) for G in features)
        * float(np.prod([max(1.0, float(np.square(w).sum())) for w in (*layers, *heads.values())])),
        np.finfo(float).tiny,
    )  # fmt: skip
    tolerance = study.round_off(max(z.numel(), 1))
    at: dict[str, object] = {"model": name, "depth": len(layers), "tolerance": tolerance}
    kinds = ["head"] * len(of_heads) + ["layer"] * len(of_layers)
    terms = [
        study.observed(f"{kind}_error", abs(a - b) / scale, **at)
        for kind, a, b in zip(kinds, found, expected, strict=True)
    ]
    return [*terms, study.observed("speed_error", abs(sum(found) - sum(expected)) / scale, **at)]


CLAIMS = [
    claim(id_, page("section 4", "claim 4"), study.Identity(quantity),
          statement,
          "Distance from the square of the autodiff gradient, over ‖V‖² max_l ‖G_l‖² Π‖W‖²‖B‖²; random graphs, depths 0 to 4, "
          f"widths, single- and multiscale models, losses {', '.join(LOSSES)}.",
          study.supported("It is the chain rule."), group="self-check")
    for id_, quantity, statement in (
        ("speed-heads", "head_error", "The part of head l in −dL/dt is ‖vec[V G_lᵀ]‖² in the metric F_l."),
        ("speed-layers", "layer_error", "The part of layer i in −dL/dt is ‖Σ_l J_{i,l} vec[V G_lᵀ]‖²."),
        ("speed-total", "speed_error", "All terms together are ‖∇L‖², the speed −dL/dt of gradient flow."),
    )
]  # fmt: skip

IDENTITIES: study.Experiment[Config] = study.Experiment(
    name="identities",
    cells=by_aggregation,
    measure=_measure,
    varies=("initialisation", "data"),
    claims=CLAIMS,
    seconds=0.1,
    memory=memory,
)
