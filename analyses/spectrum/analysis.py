"""The analysis as one object: its experiment, claims and figures."""

from functools import partial
from typing import Any

import pandas as pd

from analyses.claims import claim
from analyses.specs import described
from analyses.spectrum import panels
from analyses.spectrum.config import GGN, HESSIAN, Config
from analyses.spectrum.measure import WHOLE, measure
from curvlab.problems import data_hash, instance
from curvlab.study import Always, Analysis, Claim, Equivalence, Experiment, Inequality, supported, undecided
from curvlab.study.estimates import Estimate
from curvlab.study.panels import PanelGrid

SOURCE = "definitions of the structures (docs/theory/spectrum.md, {})"
SAME_TRACE = ("full", "block-diagonal", "block-tridiagonal", "unit-wise", "component-wise", "diagonal", "ekfac")
"""Structures with the trace of the exact Fisher matrix: they keep its diagonal, or like EKFAC the trace of each layer."""
COMPRESSED = ("block-diagonal", "unit-wise", "component-wise", "diagonal", "ekfac")
"""Structures none of whose eigenvalues is above the largest one of the exact Fisher matrix."""
ROUNDING = 0.001
"""Part of a largest eigenvalue by which the solver may be off."""


def _against_ggn(*structures: str, layers: bool = False) -> Estimate:
    """Return the estimate by the ratio of structures' values to the Gauss–Newton matrix', times the number of layers if asked."""

    def ratios(table: pd.DataFrame) -> pd.DataFrame:
        kept = table[table["layer"] == WHOLE]
        kept = kept[kept["index"] == 1] if "eigenvalue" in set(kept["quantity"]) else kept
        wide = kept.pivot_table("value", "seed", "matrix")
        times = max(1, table["layer"].nunique() - 1) if layers else 1
        return pd.concat([(times * wide[name] / wide[GGN]).rename("value").reset_index() for name in structures])

    return ratios


def _trace(structure: str) -> Claim:
    same = structure in SAME_TRACE
    kept = supported("It keeps the diagonal, or a block's trace.")
    return claim(
        f"trace-{structure}", SOURCE.format("relation 2"), Equivalence("trace", 1.0, 0.05, centre="geometric mean"),
        f"The {structure} structure has the trace of the Gauss–Newton matrix.",
        "Ratio of the two stochastic estimates, on the same probes at a seed.",
        kept if same else undecided("Σ_l tr A_l · tr B_l depends on how activations and gradients go together."),
        group="self-check" if same else "exploration", at={"matrix": (structure, GGN)}, estimate=_against_ggn(structure),
    )  # fmt: skip


def _largest(structure: str) -> Claim:
    same = structure == "full"
    return claim(
        f"largest-{structure}", SOURCE.format("relation 3"),
        Equivalence("eigenvalue", 1.0, ROUNDING if same else 0.5, centre="geometric mean"),
        f"The largest eigenvalue of the {structure} structure is "
        + ("that of the Gauss–Newton matrix." if same else "at least half and at most one and a half times that of the "
           "Gauss–Newton matrix."),
        "Ratio of the two.",
        supported("It is the same matrix.") if same else undecided("Theorems bound it, if at all, on one side only."),
        group="self-check" if same else "exploration", bound_from="tolerance of the solver" if same else "",
        at={"matrix": (structure, GGN)}, estimate=_against_ggn(structure),
    )  # fmt: skip


def _claims(config: Config) -> list[Claim]:
    compressed = tuple(name for name in COMPRESSED if name in config.structures)
    claims = [
        claim("hessian-positive", "Cohen et al. 2021 (docs/theory/cohen_2021.md, setting: Gauss–Newton part and residual part)",
              Inequality("negative_share", "less", 0.05, centre="mean"),
              "At this network few of the Hessian's eigenvalues are below −1e-3 of its largest modulus.",
              "Their share, by stochastic Lanczos quadrature.",
              undecided("The residual part decides, and it falls with training (--steps)."),
              group="exploration", at={"matrix": HESSIAN}),
        *(one(structure) for structure in config.structures for one in (_trace, _largest)),
    ]  # fmt: skip
    bound: dict[str, Any] = {"group": "self-check", "bound_from": "1, and the tolerance of the solver"}
    if compressed:
        claims.append(claim(
            "largest-compressed", SOURCE.format("relation 3"), Always("eigenvalue", "less", 1 + ROUNDING),
            "No structure made of blocks of the Gauss–Newton matrix has a larger eigenvalue than that has, nor has EKFAC.",
            "Ratio of the two largest eigenvalues.", supported("Blocks are compressions, and so is a diagonal in another basis."),
            at={"matrix": (*compressed, GGN)}, estimate=_against_ggn(*compressed), **bound,
        ))  # fmt: skip
    if "block-diagonal" in compressed:
        claims.append(claim(
            "largest-blocks", SOURCE.format("relation 3"), Always("eigenvalue", "greater", 1 - ROUNDING),
            "The block-diagonal structure has at least 1/L of the Gauss–Newton matrix' largest eigenvalue, L the layers.",
            "L times the ratio of the two.", supported("G ⪯ L·blockdiag(G)."),
            at={"matrix": ("block-diagonal", GGN)}, estimate=_against_ggn("block-diagonal", layers=True), **bound,
        ))  # fmt: skip
    return claims


SPECTRA: Experiment[Config] = Experiment(
    name="spectra",
    cells=lambda config: [
        {"problem": config.problem, "matrix": matrix} for matrix in (HESSIAN, GGN, *config.structures)
    ],
    measure=measure,
    varies=("initialisation", "draws"),
    claims=_claims,
    seconds=lambda _, config: 2.0 * config.top / 5,
    memory=4e8,
)

_layout = partial(PanelGrid, "python -m analyses.spectrum")

ANALYSIS: Analysis[Config] = Analysis(
    name="spectrum",
    version=3,
    question="What do the spectra of a network's Hessian, its Gauss–Newton matrix and every approximation look like?",
    paper="Cohen et al. 2021 and Karakida & Osawa 2020, for the quantities",
    examples=("--problem mnist --width 256 --steps 200", "--structures kfac ekfac --top 20"),
    cost="digits, N = 40, tanh network of width 64, Hessian, GGN and eight structures, 12 seeds: about two minutes.",
    config=Config,
    experiments=(SPECTRA,),
    subject=lambda config: described(
        instance(config.problem, **config.arguments), activation=config.activation, steps=config.steps
    ),
    data_hash=lambda config: data_hash(config.problem, **config.arguments),
    figures={
        "top": _layout([[panels.top_eigenvalues, panels.traces]], claims=("largest-", "trace-"), height=2.6),
        "layers": _layout([[panels.largest_by_layer]], claims=(), height=2.6),
        "density": _layout(panels.densities, claims=("hessian-",), height=1.7),
    },
    axes=("structures",),
    together=("seed",),
    memory_option="--width",
)
