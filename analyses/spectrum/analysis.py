"""The analysis as one object: its cells, claims and figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from analyses.assembly import data_hash, problem_faults
from analyses.drawing import Layout
from analyses.estimates import by_seed
from analyses.spectrum import panels
from analyses.spectrum.config import GGN, HESSIAN, Config
from analyses.spectrum.measure import WHOLE, measure
from curvlab.study import Analysis, Cell, Claim, Equivalence, Inequality

PAPER = "definitions (design of the structures)"
SAME_TRACE = ("full", "block-diagonal", "block-tridiagonal", "unit-wise", "diagonal", "ekfac")
"""Structures that keep the diagonal of the exact Fisher matrix, and with it its trace."""


def _matrices(config: Config) -> tuple[str, ...]:
    return (HESSIAN, GGN, *config.structures)


def _cells(config: Config) -> list[Cell]:
    return [
        Cell({"problem": config.problem, "matrix": matrix, "seed": seed})
        for seed in range(config.seeds)
        for matrix in _matrices(config)
    ]


def _ratio(table: pd.DataFrame, quantity: str, of: str, to: str = GGN) -> pd.DataFrame:
    """Estimate by the ratio of two matrices' values, of each seed."""
    kept = table[(table["quantity"] == quantity) & (table["layer"] == WHOLE)]
    kept = kept[kept["index"] == 1] if quantity == "eigenvalue" else kept
    means = {name: kept[kept["matrix"] == name].set_index("seed")["value"] for name in (of, to)}
    return (means[of] / means[to]).rename("value").reset_index()


def _claims(config: Config) -> list[Claim]:
    def of(*matrices: str) -> Callable[[Cell], bool]:
        return lambda cell: cell["matrix"] in matrices

    claims = [
        Claim(
            id="hessian-positive",
            statement="At this network few of the Hessian's eigenvalues are below −1e-3 of its largest modulus.",
            source="Cohen et al. 2021 (theory file, setting: Gauss–Newton part and residual part)",
            measured="Their share, by stochastic Lanczos quadrature.",
            rule=Inequality(0.05, "less"),
            estimate=by_seed,
            expected="open",
            reason="The residual part decides, and it falls with training (--steps).",
            needs=of(HESSIAN),
            quantities=("negative_share",),
        )
    ]
    for structure in config.structures:
        if structure in SAME_TRACE:
            claims.append(
                Claim(
                    id=f"trace-{structure}",
                    statement=f"The {structure} structure has the trace of the Gauss–Newton matrix.",
                    source=PAPER,
                    measured="Ratio of the two stochastic estimates.",
                    rule=Equivalence(1.0, 0.05),
                    estimate=partial(_ratio, quantity="trace", of=structure),
                    expected="supported",
                    reason="It keeps the diagonal, or a block's trace.",
                    needs=of(structure, GGN),
                    quantities=("trace",),
                )
            )
        claims.append(
            Claim(
                id=f"largest-{structure}",
                statement=f"The largest eigenvalue of the {structure} structure is that of the Gauss–Newton matrix.",
                source=PAPER,
                measured="Ratio of the two.",
                rule=Equivalence(1.0, 0.1),
                estimate=partial(_ratio, quantity="eigenvalue", of=structure),
                expected="supported" if structure == "full" else "open",
                reason="It is the same matrix." if structure == "full" else "No theorem covers it.",
                needs=of(structure, GGN),
                quantities=("eigenvalue",),
            )
        )
    return claims


@problem_faults()
def _data_hash(config: Config) -> str:
    return data_hash(config.problem, **config.arguments)


def _resources(cell: Cell, config: Config) -> tuple[float, float]:  # noqa: ARG001
    return 2.0 * config.top / 5, 4e8


_layout = partial(Layout, "python -m analyses.spectrum")

ANALYSIS: Analysis[Config] = Analysis(
    name="spectrum",
    version=1,
    question="What do the spectra of a network's Hessian, its Gauss–Newton matrix and every approximation look like?",
    paper="Cohen et al. 2021 and Karakida & Osawa 2020, for the quantities",
    examples=("--problem mnist --width 256 --steps 200", "--structures kfac ekfac --top 20"),
    cost="digits, N = 40, tanh network of width 64, Hessian, GGN and seven structures, 6 seeds: under a minute.",
    config=Config,
    claims=_claims,
    cells=_cells,
    data_hash=_data_hash,
    measure=measure,
    resources=_resources,
    figures={
        "top": _layout([[panels.top_eigenvalues, panels.traces]], claims=("largest-", "trace-"), height=2.6),
        "layers": _layout([[panels.largest_by_layer]], claims=(), height=2.6),
        "density": _layout(
            [[partial(panels.density, matrix=name) for name in row] for row in panels.DENSITIES],
            claims=("hessian-",),
            height=1.7,
        ),
    },
    axes=("structures",),
    memory_option="--width",
)
