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
from .margins import FAMILY, apart, is_identity, verdicts_with_margins, with_margins
from .runs import KEY, Results, canonical, coordinates

FOLDER = Path(__file__).parent
NOT_MEASURED = "not measured"
SHOWN = 12
"""Lines of a list that are printed."""


@dataclass
class Comparison:
    """What became of the stored results.

    Attributes:
        analysis: Its name.
        numbers: Numbers that were compared; those that are timed count as keys only.
        kinds: How many of each kind of margin, with those that are timed and those that changed on purpose.
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
    absent = {claim.id for claim in analysis.claims(analysis.defaults)} - judged
    absent |= {str(cell["experiment"]) for cell in analysis.cells(analysis.defaults)} - set(
        numbers["cell"].map(_experiment)
    )
    if absent:
        raise ValueError(f"the small runs of {name} lack {', '.join(sorted(absent))}")


def load(name: str, folder: Path = FOLDER) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The stored numbers and verdicts under today's names; `status` of a number is how that of its observation may begin."""
    numbers = pd.read_parquet(folder / f"{name}.parquet")
    numbers = stated(numbers.astype(dict.fromkeys([*KEY[:5], "kind"], "object")))
    cells = {cell: _translated(name, cell, names.ADDED.get(name, {})) for cell in numbers["cell"].unique()}
    labels = {label: _translated(name, label, {}) for label in numbers["labels"].unique()}
    numbers = numbers.assign(cell=numbers["cell"].map(cells), labels=numbers["labels"].map(labels))
    statuses, quantities = names.STATUSES.get(name, {}), names.QUANTITIES.get(name, {})
    known = zip(numbers["cell"].map(_experiment), numbers["quantity"], numbers["status"], strict=True)
    numbers["status"] = pd.Series([statuses.get(key, (key[2],)) for key in known], numbers.index)
    for (quantity, column), factor in names.FACTORS.get(name, {}).items():
        changed = (numbers["quantity"] == quantity) & (numbers["column"] == column)
        numbers["margin"] = numbers["margin"].mask(changed, (factor - 1.0) * numbers["number"].abs())
        numbers["kind"] = numbers["kind"].mask(changed, "changed")
    numbers = numbers[[quantities.get(quantity, quantity) is not None for quantity in numbers["quantity"]]]
    renamed = [
        str(quantities[quantity]).format_map(coordinates(label)) if quantity in quantities else quantity
        for quantity, label in zip(numbers["quantity"], numbers["labels"], strict=True)
    ]
    claims = names.CLAIMS.get(name, {})
    stored = json.loads((folder / f"{name}.json").read_text())
    verdicts = {
        run: {claims.get(claim, claim): verdict for claim, verdict in judged.items() if claims.get(claim, claim)}
        for run, judged in stored.items()
    }
    return numbers.assign(quantity=renamed), verdicts


def stated(numbers: pd.DataFrame) -> pd.DataFrame:
    """Numbers with the status of their observations in a column of its own, "" where there is none."""
    labels = {label: coordinates(label) for label in numbers["labels"].unique()}
    status = {label: entries.pop("status", "") for label, entries in labels.items()}
    others = {label: canonical(entries) for label, entries in labels.items()}
    return numbers.assign(labels=numbers["labels"].map(others), status=numbers["labels"].map(status))


def _translated(name: str, entries: str, added: Mapping[str, object]) -> str:
    renamed = {**names.EVERYWHERE, **names.COORDINATES.get(name, {})}
    translated = {renamed.get(entry, entry): value for entry, value in coordinates(entries).items()}
    return canonical({**added, **translated})


def _experiment(cell: str) -> str:
    return str(coordinates(cell)["experiment"])


def compare(name: str, found: Results, folder: Path = FOLDER) -> Comparison:
    """Compare the results of an analysis with the stored ones."""
    numbers, verdicts = load(name, folder)
    table = numbers.merge(
        stated(found.numbers), on=list(KEY), how="outer", suffixes=("", "_found"), indicator=True, validate="one_to_one"
    )
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
    comparison.deviations += _statuses(table[table["_merge"] == "both"])
    for run, stored in verdicts.items():
        judged_now = found.verdicts.get(run, {})
        allowed = _allowed(stored, judged_now, names.OUTCOMES.get(name, {}))
        for claim, verdict in allowed.items():
            where = f"claim {claim} ({run})"
            if claim in judged_now:
                comparison.deviations += _verdict(where, verdict, judged_now[claim])
            else:
                comparison.missing.append(where)
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
    experiments = rows["cell"].map(_experiment)
    return [
        f"{quantity}{'' if column == 'value' else f', {column}'}: {len(group)} numbers ({run} {experiment}), "
        f"such as in {group['cell'].iloc[0]} {group['labels'].iloc[0]}"
        for (run, experiment, quantity, column), group in rows.groupby(
            [rows["run"], experiments, rows["quantity"], rows["column"]]
        )
    ]


def _statuses(rows: pd.DataFrame) -> list[str]:
    """Observations whose status does not begin as it should."""
    rows = rows[rows["column"] == "value"]
    wrong = [
        not any(status.startswith(beginning) if beginning else status == "" for beginning in beginnings)
        for status, beginnings in zip(rows["status_found"], rows["status"], strict=True)
    ]
    return [
        f"status {row['status_found']!r} for {row['status']}, {row['quantity']}, {row['run']} {row['cell']} {row['labels']}"
        for _, row in rows[wrong].iterrows()
    ]


def _allowed(
    stored: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The stored verdicts of a run, with what claims may be now for which nothing was measured."""
    allowed = {}
    unseen = {claim for claim, each in stored.items() if each.get("outcome") == ["inconclusive"] and not each["seeds"]}
    left = any(
        found.get(claim, {}).get("outcome") == NOT_MEASURED and not is_identity(stored[claim]) for claim in unseen
    )
    for claim, verdict in stored.items():
        allowed[claim] = {field: entry for field, entry in verdict.items() if not (left and field in FAMILY)}
        if claim in unseen:
            allowed[claim]["outcome"] = ["inconclusive", outcomes.get(claim, NOT_MEASURED)]
    return allowed


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
