"""How far a number may be from the stored one.

Every number is measured twice before it is stored, the second time with other instructions of the processor, which round
differently: an *echo*. How far the two are apart tells what round-off does to it, in a well-conditioned solve and in a
chaotic run alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .runs import KEY, RUNS, Results, coordinates

ECHO = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Nehalem",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Environment of the second measurement."""

EXACT = {"float64": 1e-9, "float32": 1e-4}
"""Of the scale of a quantity, the largest modulus that it has in cells that differ in the seed alone, by precision."""
CHAOTIC = 1e-6
"""The same in double precision for runs that amplify round-off."""
AMPLIFYING = ("edge_of_stability", "gnn_natural_gradient", "training")
SINGLE = ("gnn_natural_gradient", "training")
"""Analyses whose precision is single unless said otherwise."""
NOTHING = 1e-12
"""Of the median modulus of a quantity in an experiment: what differs by less is the same where the scale is nothing."""
HEADROOM = 100.0
"""The margin over the largest echo of a quantity at a step, in cells that differ in the seed alone."""
LOST = 1e-3
"""Of the scale: with a margin beyond it a quantity has lost its digits."""
SATURATED = 10.0
"""The margin over the echo then: what has grown so far grows no more."""
LOCATIONS = ("estimate", "low", "high")
PROBABILITIES = ("confidence", "p_value", "p_adjusted")
FAMILY = ("low", "high", "confidence", "p_adjusted")
"""What depends on all claims of a family: not compared where one of them is timed, or has another p-value in the echo."""
P_VALUE = 1e-6
"""The least margin of a probability."""
TIMED = frozenset({"seconds_per_step", "seconds_per_epoch"})
"""Quantities that are stored without their value."""
TIMED_CLAIMS = ("time-", "seconds-")
"""How ids of claims on them begin."""


def precision(name: str, run: str) -> float:
    """Of the scale of a number, what it may be off in a run by round-off alone."""
    if name in SINGLE and "float64" not in RUNS[name][run]:
        return EXACT["float32"]
    return CHAOTIC if name in AMPLIFYING else EXACT["float64"]


def with_margins(name: str, plain: Results, echo: Results) -> pd.DataFrame:
    """The numbers with their `margin`, and in `kind` where it comes from.

    The kind is "round-off"; "tolerance", that of the observation itself; "echo", round-off that was amplified; "seeds", the
    range over the seeds, where digits are lost; "timed", without a value.

    Raises:
        ValueError: the echo has other numbers.
    """
    table = plain.numbers.merge(echo.numbers, on=list(KEY), how="outer", suffixes=("", "_echo"), indicator=True)
    alone = table[table["_merge"] != "both"]
    if len(alone):
        raise ValueError(
            f"{name}: {len(alone)} numbers are not in both measurements, such as\n{alone.iloc[0].to_string()}"
        )
    cells = table["cell"].map(coordinates)
    table["experiment"] = [cell["experiment"] for cell in cells]
    table["fellow"] = [str({key: entry for key, entry in cell.items() if key != "seed"}) for cell in cells]
    table["step"] = [
        next((label[key] for key in ("step", "epoch") if key in label), -1)
        for label in table["labels"].map(coordinates)
    ]
    table["apart"] = apart(table["number"], table["number_echo"])

    fellow = ["run", "fellow", "quantity", "column"]
    modulus = table["number"].abs().where(np.isfinite(table["number"]), 0.0)
    scale = modulus.groupby([table[key] for key in fellow]).transform("max")
    usual = modulus.groupby([table[key] for key in ("run", "experiment", "quantity", "column")]).transform("median")
    echoes = echoed(table.groupby([*fellow, "step"])["apart"].transform("max").to_numpy(), scale.to_numpy())
    alike = table.groupby([*fellow, "labels", "occurrence"])["number"]
    seeds = (alike.transform("max") - alike.transform("min")).fillna(np.inf)
    observation = [key for key in KEY if key != "column"]
    tolerances = table[table["column"] == "tolerance"].set_index(observation)["number"]
    own = pd.MultiIndex.from_frame(table[observation])
    tolerance = pd.Series(tolerances.reindex(own).to_numpy(), table.index).where(table["column"] == "value").fillna(0.0)

    choices = pd.DataFrame(
        {
            "round-off": table["run"].map(lambda run: precision(name, run)) * scale + NOTHING * usual,
            "tolerance": tolerance,
            "echo": echoes,
            "seeds": seeds.where(echoes >= LOST * scale, 0.0),
        }
    )
    kind, margin = choices.idxmax(axis=1), choices.max(axis=1)
    timed = table["quantity"].isin(TIMED)
    kind[timed], margin[timed] = "timed", np.nan
    return table[list(KEY)].assign(
        number=table["number"].mask(timed), margin=margin.map(rounded_up).astype("float32"), kind=kind
    )


def echoed(echo: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The margin of numbers of a scale, from their echo."""
    lost = np.maximum(SATURATED * echo, LOST * scale)
    return np.where(HEADROOM * echo > LOST * scale, lost, HEADROOM * echo)


def verdicts_with_margins(name: str, plain: Results, echo: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """The verdicts with the outcomes that they may have, and the margins of their numbers."""
    found = {}
    for run, verdicts in plain.verdicts.items():
        loose = any(
            claim.startswith(TIMED_CLAIMS) or _unsteady(verdict["p_value"], echo.verdicts[run][claim]["p_value"])
            for claim, verdict in verdicts.items()
        )
        compared = [field for field in (*LOCATIONS, *PROBABILITIES) if not (loose and field in FAMILY)]
        found[run] = {
            claim: _verdict(verdict, echo.verdicts[run][claim], compared, precision(name, run))
            for claim, verdict in verdicts.items()
        }
    return found


def _unsteady(plain: float | None, echo: float | None) -> bool:
    """Whether a p-value is another one in the echo."""
    return plain != echo and (plain is None or echo is None or abs(plain - echo) > P_VALUE)


def _verdict(
    plain: Mapping[str, Any], echo: Mapping[str, Any], compared: Sequence[str], least: float
) -> dict[str, Any]:
    """What is stored of a verdict; a number as [number, margin], and not at all where it is no number in one measurement."""
    found = {"rule": plain["rule"], "expected": plain["expected"]}
    if plain["claim"].startswith(TIMED_CLAIMS):
        return found
    found |= {"outcome": sorted({plain["outcome"], echo["outcome"]}), "seeds": plain["seeds"]}
    if is_identity(plain):  # its estimate is a measurement, and compared as such
        return found
    scale = max((abs(plain[field]) for field in LOCATIONS if plain[field] is not None), default=0.0)
    for field in compared:
        if None in (plain[field], echo[field]):
            continue
        exact, size = (P_VALUE, 1.0) if field in PROBABILITIES else (least * scale, scale)
        margin = max(exact, float(echoed(abs(plain[field] - echo[field]), size)))
        found[field] = [plain[field], rounded_up(margin)]
    return found


def is_identity(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict is on an identity, which has no p-value and is in no family."""
    return str(verdict["rule"]).startswith("|value|")


def apart(first: pd.Series, second: pd.Series) -> pd.Series:
    """|first − second|; 0 where both are the same infinity or both NaN, infinite where one is."""
    with np.errstate(invalid="ignore"):
        distance = (first - second).abs()
    same = (first == second) | (first.isna() & second.isna())
    return distance.mask(same, 0.0).fillna(np.inf)


def rounded_up(margin: float) -> float:
    """The next power of two, which takes little room."""
    if margin == 0.0 or not math.isfinite(margin):
        return margin
    return 2.0 ** math.ceil(math.log2(margin))
