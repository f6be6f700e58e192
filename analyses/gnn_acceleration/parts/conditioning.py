"""Singular values of the propagated features by depth, and the rank that the bounds need (claim 7)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.estimates import identities
from analyses.gnn_acceleration.config import Config
from analyses.gnn_acceleration.part import PAPER, Part, cells_of
from analyses.gnn_acceleration.setting import forms_of, setting_of
from analyses.part import TOLERANCE_FACTOR, Expectation, Observations, where
from curvlab.study import Cell, Claim, Identity
from curvlab.theory import graph_dynamics as theory

log = logging.getLogger("curvlab")

NAME = "conditioning"
NAMED = 12
"""Nodes that a warning names; the measurements hold all."""


def _cells(config: Config) -> list[Cell]:
    points = [
        {"aggregation": aggregation, "form": form, "split": split}
        for aggregation in config.aggregation
        for form in forms_of(config.problem)
        for split in config.splits
    ]
    cells = cells_of(NAME, config, points)
    # Nothing but the choice of the nodes is random.
    return cells if config.drawn_nodes else [cell for cell in cells if cell["seed"] == 0]


def _measure(cell: Cell, config: Config) -> Observations:
    setting = setting_of(cell, config)
    propagated = setting.propagated(config.swept_depths[-1])
    n = len(setting.nodes)
    rng = np.random.default_rng(int(cell["seed"]))
    Q, _ = np.linalg.qr(rng.normal(size=(len(propagated[0]), max(1, n // 4))))
    rows: list[dict[str, object]] = []
    for name, features in (("all", propagated), ("few", [Q.T @ G for G in propagated])):
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
                    {"quantity": "smallest", "value": float(found[-1]) ** 2, "depth": depth, **at},
                    {"quantity": "largest", "value": float(found[0]) ** 2, "depth": depth, **at},
                ]
                if name == "all":
                    rows.append({**_rank(cell, config, matrix, found, setting.nodes.numpy(), depth, sort), **at})
            rows += [{**row, **at} for row in _drops(values, matrices)]
    return rows


def _rank(
    cell: Cell,
    config: Config,
    features: Float[np.ndarray, "F n"],
    values: Float[np.ndarray, " _"],
    nodes: np.ndarray,
    depth: int,
    sort: str,
) -> dict[str, object]:
    """Ranks that features lack of the min(F, n) of the bounds, and the nodes in whose relations they are lost."""
    missing = int((values <= values[0] * max(features.shape) * np.finfo(float).eps).sum())
    # With more nodes than features every node has a part in some relation, whatever the rank.
    guilty = nodes[theory.dependent_nodes(features)] if missing and len(features) >= features.shape[1] else []
    if len(guilty):
        named = ", ".join(map(str, guilty[:NAMED])) + (
            f" and {len(guilty) - NAMED} more" if len(guilty) > NAMED else ""
        )
        log.warning(
            "%s %s, %s, %s features, %s of depth %d: %d of %d ranks are missing, so that no bound with sigma_min says anything; "
            "linear relations join the nodes %s.",
            config.problem, cell["split"], cell["aggregation"], cell["form"], sort, depth, missing, len(values), named,
        )  # fmt: skip
    return {
        "quantity": "missing",
        "value": missing,
        "tolerance": 0.0,
        "depth": depth,
        "nodes": " ".join(map(str, guilty)),
    }


def _drops(values: list[Float[np.ndarray, " _"]], matrices: list[Float[np.ndarray, "_ n"]]) -> list[dict[str, object]]:
    """Relative decrease of σ_min from one depth to the next, 0 for an increase."""
    rows: list[dict[str, object]] = []
    for depth in range(1, len(values)):
        before, after = (float(values[at][-1]) for at in (depth - 1, depth))
        # Relative to the largest σ, which sets the error of the least.
        error = max(matrices[depth].shape) * np.finfo(float).eps * float(values[depth][0])
        tolerance = TOLERANCE_FACTOR * error / max(before, error)
        drop = max(0.0, before - after) / max(before, error)
        rows.append({"quantity": "drop", "value": drop, "tolerance": tolerance, "depth": depth})
    return rows


def _claims(config: Config) -> list[Claim]:
    def claim(
        id_: str,
        statement: str,
        quantity: str,
        rows: Callable[[pd.DataFrame], pd.DataFrame],
        expected: Expectation,
        reason: str,
        **coordinates: object,
    ) -> Claim:
        return Claim(
            id=id_,
            statement=statement,
            source=f"{PAPER}, sections 3 and 4 (theory file, claim 7)",
            measured="Relative decrease of σ_min from one depth to the next."
            if quantity == "drop"
            else "Ranks that the features lack of min(F, n), every depth.",
            rule=Identity(),
            estimate=lambda table: identities(rows(table)),
            expected=expected,
            reason=reason,
            needs=where(NAME, **coordinates),
            quantities=(quantity,),
        )

    def of(features: str, sort: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
        return lambda table: table[(table["features"] == features) & (table["sort"] == sort)]

    claims = [
        claim(
            "rank-single", "The propagated features G_l have the rank min(F, n) that σ_min needs, at every depth.", "missing",
            of("all", "single"), "open", "No theorem says so; it is a condition on the graph, its features and the split.",
        ),
        claim(
            "rank-stack", "The stacked features G^[H] have the rank min((H + 1)F, n), at every depth.", "missing",
            of("all", "stack"), "open", "A scale of full rank would suffice where F ≥ n.",
        ),
    ]  # fmt: skip
    if max(config.swept_depths) == 0:
        return claims
    claims += [
        claim(
            "conditioning-stack", "σ_min(G^[H]) does not decrease with H where F ≥ n.", "drop",
            of("all", "stack"), "supported", "Rows are added, so the Gram matrix grows (derived).",
        ),
        claim(
            "conditioning-few", "σ_min(G^[H]) does not decrease with H where F < n.", "drop",
            of("few", "stack"), "refuted",
            "Added scales add singular values as long as (H + 1)F < n (derived); random combinations of the features, n/4 of them.",
        ),
    ]  # fmt: skip
    for aggregation in config.aggregation:
        claims.append(
            claim(
                f"conditioning-single-{aggregation}",
                f"σ_min(G_H) does not decrease with H with {aggregation.upper()} aggregation.",
                "drop",
                of("all", "single"),
                "refuted",
                "S has singular values below 1."
                if aggregation == "gcn"
                else "A + I has eigenvalues below 1 in absolute value, along which features shrink.",
                aggregation=aggregation,
            )
        )
    return claims


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda _: 1.0)
