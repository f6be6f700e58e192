"""The stored results of an analysis, and what differs from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import names
from .margins import apart, verdicts_with_margins, with_margins
from .runs import KEY, Results, canonical, coordinates

FOLDER = Path(__file__).parent
SHOWN = 12
"""Lines of a list that are printed."""


@dataclass
class Comparison:
    """What became of the stored results.

    Attributes:
        analysis: Its name.
        numbers: Numbers that were compared; those that are timed count as keys only.
        kinds: How many of each kind of margin, with those that are timed.
        verdicts: Verdicts that were compared.
        largest: In words, the number that is furthest from the stored one in units of its margin.
        deviations: Numbers and verdicts beyond their margins.
        missing: What is stored and was not measured.
        new: What was measured and is not stored; no fault.
    """

    analysis: str
    numbers: int
    kinds: dict[str, int]
    verdicts: int
    largest: str
    deviations: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether everything that is stored is there, and within its margin."""
        return not self.deviations and not self.missing

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{self.analysis}: {self.numbers} values ({kinds}) and {self.verdicts} verdicts compared; "
            f"{'clean' if self.clean else 'DIFFERENT'}",
            f"  largest deviation: {self.largest}",
        ]
        for title in ("deviations", "missing", "new"):
            found = getattr(self, title)
            lines += [f"  {title}: {line}" for line in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  {title}: and {len(found) - SHOWN} more")
        return "\n".join(lines)


def store(name: str, plain: Results, echo: Results, folder: Path = FOLDER) -> None:
    """Write the results of an analysis.

    Raises:
        ValueError: they lack an experiment or a claim of the run without options.
    """
    numbers, verdicts = with_margins(name, plain, echo), verdicts_with_margins(name, plain, echo)
    check_whole(name, numbers, verdicts)
    labels = [*KEY[:5], "kind"]
    numbers = numbers.astype(dict.fromkeys(labels, "category")).astype({"occurrence": "int32"})
    numbers.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd", compression_level=19)
    lines = [
        f"{json.dumps(run)}: {{\n"
        + ",\n".join(
            f"{json.dumps(claim)}: {json.dumps(verdict, ensure_ascii=False)}" for claim, verdict in judged.items()
        )
        + "\n}"
        for run, judged in verdicts.items()
    ]
    (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check_whole(name: str, numbers: pd.DataFrame, verdicts: Mapping[str, Mapping[str, object]]) -> None:
    """Raise a ValueError unless every experiment and every claim of the run without options is among the results."""
    analysis = import_module(f"analyses.{name}").ANALYSIS
    judged = {claim for run in verdicts.values() for claim in run}
    parts = {coordinates(cell).get("part") for cell in numbers["cell"].unique()}
    absent = {claim.id for claim in analysis.claims(analysis.defaults)} - judged
    absent |= {
        str(cell.coordinates.get("part"))
        for cell in analysis.cells(analysis.defaults)
        if cell.coordinates.get("part") not in parts
    }
    if absent:
        raise ValueError(f"the small runs of {name} lack {', '.join(sorted(absent))}")


def load(name: str, folder: Path = FOLDER) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The stored numbers and verdicts under today's names."""
    numbers = pd.read_parquet(folder / f"{name}.parquet")
    numbers = numbers.astype(dict.fromkeys([*KEY[:5], "kind"], "object"))
    renamed = {cell: _translated(cell) for cell in {*numbers["cell"], *numbers["labels"]}}
    quantities = names.QUANTITIES.get(name, {})
    numbers = numbers.assign(
        cell=numbers["cell"].map(renamed),
        labels=numbers["labels"].map(renamed),
        quantity=[quantities.get(quantity, quantity) for quantity in numbers["quantity"]],
    )
    claims = names.CLAIMS.get(name, {})
    stored = json.loads((folder / f"{name}.json").read_text())
    verdicts = {
        run: {claims.get(claim, claim): verdict for claim, verdict in judged.items() if claims.get(claim, claim)}
        for run, judged in stored.items()
    }
    return numbers[numbers["quantity"].notna()], verdicts


def _translated(entries: str) -> str:
    return canonical(
        {
            names.COORDINATES.get(name, name): names.VALUES.get(name, {}).get(entry, entry)
            for name, entry in coordinates(entries).items()
        }
    )


def compare(name: str, found: Results, folder: Path = FOLDER) -> Comparison:
    """Compare the results of an analysis with the stored ones."""
    numbers, verdicts = load(name, folder)
    table = numbers.merge(found.numbers, on=list(KEY), how="outer", suffixes=("", "_found"), indicator=True)
    both = table[table["_merge"] == "both"]
    kinds: dict[str, int] = both["kind"].value_counts().to_dict()
    both = both[both["kind"] != "timed"]
    distance = apart(both["number"], both["number_found"])
    margin = both["margin"].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (distance / margin).mask((distance <= margin) & ~np.isfinite(margin), 0.0).mask(distance == 0.0, 0.0)
    judged = [(run, claim) for run, stored in verdicts.items() for claim in stored]
    comparison = Comparison(
        name,
        len(both),
        kinds,
        sum(claim in found.verdicts.get(run, {}) for run, claim in judged),
        _number(both.loc[share.idxmax()], float(share.max())) if len(share) and share.max() > 0 else "none",
        [
            _number(both.loc[index], float(share[index]))
            for index in share[share > 1.0].sort_values(ascending=False).index
        ],
        _groups(table[table["_merge"] == "left_only"]),
        _groups(table[table["_merge"] == "right_only"]),
    )
    for run, claim in judged:
        verdict = found.verdicts.get(run, {}).get(claim)
        if verdict is None:
            comparison.missing.append(f"claim {claim} ({run})")
        else:
            comparison.deviations += _verdict(f"claim {claim} ({run})", verdicts[run][claim], verdict)
    comparison.new += [
        f"claim {claim} ({run})"
        for run, judged_now in found.verdicts.items()
        for claim in judged_now
        if claim not in verdicts.get(run, {})
    ]
    return comparison


def _number(row: pd.Series, share: float) -> str:
    column = "" if row["column"] == "value" else f", {row['column']}"
    return (
        f"{share:.2g} of its margin ({row['kind']}): {row['number_found']:.17g} for {row['number']:.17g} ± {row['margin']:.2g}, "
        f"{row['quantity']}{column}, {row['run']} {row['cell']} {row['labels']}"
    )


def _groups(rows: pd.DataFrame) -> list[str]:
    """Numbers without a counterpart, by quantity and experiment, each with the first of its cells."""
    if not len(rows):
        return []
    experiment = names.COORDINATES.get("part", "part")
    parts = rows["cell"].map(lambda cell: coordinates(cell).get(experiment, ""))
    return [
        f"{quantity}{'' if column == 'value' else f', {column}'}: {len(group)} numbers ({run} {part}), "
        f"such as in {group['cell'].iloc[0]} {group['labels'].iloc[0]}"
        for (run, part, quantity, column), group in rows.groupby([rows["run"], parts, rows["quantity"], rows["column"]])
    ]


def _verdict(where: str, stored: Mapping[str, Any], found: Mapping[str, Any]) -> Sequence[str]:
    """What differs in a verdict."""
    differences = []
    for name in names.VERDICT:
        if name not in stored:
            continue
        expected, now = stored[name], found[name]
        if name == "outcome":
            same = now in expected
        elif isinstance(expected, list):
            value, margin = expected
            same = now is not None and abs(now - value) <= margin
        else:
            same = now == expected
        if not same:
            differences.append(f"{where}: {name} is {now}, stored {expected}")
    return differences
