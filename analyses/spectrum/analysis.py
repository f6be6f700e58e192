"""The analysis as one object: its experiment, claims and figures."""

from functools import partial

import pandas as pd

from analyses.spectrum import panels
from analyses.spectrum.config import GGN, HESSIAN, Config
from analyses.spectrum.measure import WHOLE, measure
from curvlab.problems import data_hash
from curvlab.study import Analysis, Claim, Equivalence, Experiment, Inequality, supported, undecided
from curvlab.study.panels import PanelGrid

PAPER = "definitions (design of the structures)"
SAME_TRACE = ("full", "block-diagonal", "block-tridiagonal", "unit-wise", "component-wise", "diagonal", "ekfac")
"""Structures with the trace of the exact Fisher matrix: they keep its diagonal, or like EKFAC the trace of each layer."""


def _ratio(table: pd.DataFrame, of: str, to: str = GGN) -> pd.DataFrame:
    """Estimate by the ratio of two matrices' values, of each seed."""
    kept = table[table["layer"] == WHOLE]
    kept = kept[kept["index"] == 1] if "eigenvalue" in set(kept["quantity"]) else kept
    means = {name: kept[kept["matrix"] == name].set_index("seed")["value"] for name in (of, to)}
    return (means[of] / means[to]).rename("value").reset_index()


def _claims(config: Config) -> list[Claim]:
    claims = [
        Claim(
            id="hessian-positive",
            statement="At this network few of the Hessian's eigenvalues are below −1e-3 of its largest modulus.",
            rule=Inequality("negative_share", "less", 0.05),
            source="Cohen et al. 2021 (docs/theory/cohen_2021.md, setting: Gauss–Newton part and residual part)",
            measured="Their share, by stochastic Lanczos quadrature.",
            expected=undecided("The residual part decides, and it falls with training (--steps)."),
            at={"matrix": HESSIAN},
        )
    ]
    for structure in config.structures:
        compared = {"matrix": (structure, GGN)}
        claim = partial(Claim, source=PAPER, at=compared, estimate=partial(_ratio, of=structure))
        if structure in SAME_TRACE:
            claims.append(
                claim(
                    id=f"trace-{structure}",
                    statement=f"The {structure} structure has the trace of the Gauss–Newton matrix.",
                    rule=Equivalence("trace", 1.0, 0.05),
                    measured="Ratio of the two stochastic estimates.",
                    expected=supported("It keeps the diagonal, or a block's trace."),
                )
            )
        same = structure == "full"
        claims.append(
            claim(
                id=f"largest-{structure}",
                statement=f"The largest eigenvalue of the {structure} structure is that of the Gauss–Newton matrix.",
                rule=Equivalence("eigenvalue", 1.0, 0.1),
                measured="Ratio of the two.",
                expected=supported("It is the same matrix.") if same else undecided("No theorem covers it."),
            )
        )
    return claims


SPECTRA: Experiment[Config] = Experiment(
    name="spectra",
    cells=lambda config: [
        {"problem": config.problem, "matrix": matrix} for matrix in (HESSIAN, GGN, *config.structures)
    ],
    measure=measure,
    claims=_claims,
    seconds=lambda _, config: 2.0 * config.top / 5,
    memory=4e8,
)

_layout = partial(PanelGrid, "python -m analyses.spectrum")

ANALYSIS: Analysis[Config] = Analysis(
    name="spectrum",
    version=2,
    question="What do the spectra of a network's Hessian, its Gauss–Newton matrix and every approximation look like?",
    paper="Cohen et al. 2021 and Karakida & Osawa 2020, for the quantities",
    examples=("--problem mnist --width 256 --steps 200", "--structures kfac ekfac --top 20"),
    cost="digits, N = 40, tanh network of width 64, Hessian, GGN and eight structures, 6 seeds: under a minute.",
    config=Config,
    experiments=(SPECTRA,),
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
