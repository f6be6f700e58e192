"""Singular values of the propagated features by depth, and the rank that the bounds need (claim 7)."""

import logging

import numpy as np
from jaxtyping import Float, Int

from analyses.claims import claim
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.points import memory, page
from analyses.gnn_acceleration.setting import few, forms_of, named, setting_of
from curvlab import study
from curvlab.theory import graph_dynamics as theory

log = logging.getLogger("curvlab")


def _points(config: Config) -> list[study.Point]:
    # On a fixed split one draw of the few features is enough.
    fixed = {} if config.drawn_nodes else {"seed": 0}
    return [
        {"aggregation": aggregation, "form": form, "split": split, **fixed}
        for aggregation in config.aggregation
        for form in forms_of(config.problem)
        for split in config.splits
    ]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config = context.config
    setting = setting_of(cell, config)
    propagated = setting.propagated(config.propagations)
    n = len(setting.nodes)
    combined = few(len(propagated[0]), n, int(cell["seed"])).T
    rows = []
    for name, features in (("all", propagated), ("few", [combined @ G for G in propagated])):
        for sort, matrices in (
            ("single", features),
            ("stack", [np.concatenate(features[: depth + 1]) for depth in range(len(features))]),
        ):
            values = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
            at: dict[str, object] = {
                "features": name,
                "sort": sort,
                "monotone": sort == "stack" and len(features[0]) >= n,
            }
            for depth, (matrix, found) in enumerate(zip(matrices, values, strict=True)):
                rows += [
                    study.observed("smallest", float(found[-1]) ** 2, depth=depth, **at),
                    study.observed("largest", float(found[0]) ** 2, depth=depth, **at),
                ]
                rows.append({**_rank(cell, config, matrix, found, setting.nodes.numpy(), depth, sort), **at})
            rows += [{**row, **at} for row in _drops(values, matrices)]
    return rows


def _rank(
    cell: study.Cell,
    config: Config,
    features: Float[np.ndarray, "F n"],
    values: Float[np.ndarray, " _"],
    nodes: Int[np.ndarray, " n"],
    depth: int,
    sort: str,
) -> dict[str, object]:
    """Ranks that features lack of the min(F, n) of the bounds, and the nodes in whose relations they are lost."""
    missing = int((values <= values[0] * max(features.shape) * np.finfo(float).eps).sum())
    # With more nodes than features every node has a part in some relation, whatever the rank.
    guilty = nodes[theory.dependent_nodes(features)] if missing and len(features) >= features.shape[1] else nodes[:0]
    if len(guilty):
        log.warning(
            "%s %s, %s, %s features, %s of depth %d: %d of %d ranks are missing, so that no bound with sigma_min says anything; "
            "linear relations join the nodes %s.",
            config.problem, cell["split"], cell["aggregation"], cell["form"], sort, depth, missing, len(values), named(guilty),
        )  # fmt: skip
    lacking = study.observed("missing", missing, tolerance=0.0)
    return {**lacking, "depth": depth, "nodes": " ".join(map(str, guilty))}


def _drops(values: list[Float[np.ndarray, " _"]], matrices: list[Float[np.ndarray, "_ n"]]) -> list[dict[str, object]]:
    """Relative decrease of σ_min from one depth to the next, 0 for an increase."""
    rows = []
    for depth in range(1, len(values)):
        before, after = (float(values[at][-1]) for at in (depth - 1, depth))
        # Relative to the largest σ, which sets the error of the least.
        error = max(matrices[depth].shape) * np.finfo(float).eps * float(values[depth][0])
        tolerance = study.round_off(max(matrices[depth].shape)) * float(values[depth][0]) / max(before, error)
        drop = max(0.0, before - after) / max(before, error)
        rows.append(study.observed("drop", drop, tolerance=tolerance, depth=depth))
    return rows


SOURCE = page("sections 3 and 4", "claim 7")
SHRINKING = {
    "gcn": "S has singular values below 1.",
    "gin": "A + I has eigenvalues below 1 in absolute value, along which features shrink.",
}
"""Why the least singular value falls with depth, by aggregation."""


def _rank_claim(sort: str, statement: str, reason: str) -> study.Claim:
    return claim(
        f"rank-{sort}", SOURCE, study.Identity("missing"),
        statement,
        "Ranks that the features lack of min(F, n), every depth; all features and n/4 random combinations of them.",
        study.undecided(reason), group="exploration", estimate=study.among(study.identities, sort=sort),
    )  # fmt: skip


def _drop_claim(
    id_: str, statement: str, expected: study.Expected, *, features: str = "all", sort: str = "stack", **at: object
) -> study.Claim:
    return claim(
        f"conditioning-{id_}", SOURCE, study.Identity("drop"),
        statement,
        "Relative decrease of σ_min from one depth to the next.",
        expected, group="derived", at=at, estimate=study.among(study.identities, features=features, sort=sort),
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        _rank_claim("single", "The propagated features G_l have the rank min(F, n) that σ_min needs, at every depth.",
                    "No theorem says so; it is a condition on the graph, its features and the split."),
        _rank_claim("stack", "The stacked features G^[H] have the rank min((H + 1)F, n), at every depth.",
                    "A scale of full rank would suffice where F ≥ n."),
        _drop_claim("stack", "σ_min(G^[H]) does not decrease with H where F ≥ n.",
                    study.supported("Rows are added, so the Gram matrix grows (derived).")),
        _drop_claim("few", "σ_min(G^[H]) does not decrease with H where F < n.",
                    study.refuted("Added scales add singular values as long as (H + 1)F < n (derived); random combinations of "
                                  "the features, n/4 of them."), features="few"),
        *(
            _drop_claim(f"single-{name}", f"σ_min(G_H) does not decrease with H with {name.upper()} aggregation.",
                        study.refuted(SHRINKING[name]), sort="single", aggregation=name)
            for name in config.aggregation
        ),
    ]  # fmt: skip


CONDITIONING: study.Experiment[Config] = study.Experiment(
    name="conditioning",
    cells=_points,
    measure=_measure,
    varies=lambda config: ("split", "draws") if config.drawn_nodes else ("draws",),
    claims=_claims,
    seconds=0.1,
    memory=memory,
)
