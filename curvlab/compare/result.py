"""What a comparison found: a table to read, to compute with and to draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isnan, nan
from typing import TYPE_CHECKING, Any

from curvlab.compare.candidates import Candidate
from curvlab.compare.printing import note_lines, page, terminal_width
from curvlab.tools.shown import line
from curvlab.tools.text import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS: Mapping[str, str] = {
    "structure": "",
    "damping": "",
    "eta": "learning rate whose step lowers the second batch's loss most, by `fall`, among those up to eta_repeated",
    "fall": "",
    "eta_repeated": "largest that holds for steps in a row, the structure fitted anew before each",
    "eta_batch": "largest at which one real step lowers the loss of the batch",
    "eta_second": "largest at which it lowers the loss of the second batch",
    "eta_linear": "2/λ_max, stable in the linearised model, first step only",
    "ratio": "real fall of the batch's loss at eta over the quadratic model's",
    "momentum": "factor by which momentum 0.9 changes the largest learning rate, structure left as it is",
    "alpha": "scale of the response",
    "anisotropy": "of the response, 0 if all outputs move alike",
    "cosine": "of the step with that of the full exact matrix",
    "lambda_max": "",
    "rank": "",
    "rho": "",
    "rho_rel": "",
    "seconds": "to build the structure and take a step",
    "mib": "held from step to step in training",
    "peak_mib": "most at once while it is built and takes a step",
    "note": "",
}
"""Columns of the table, the first ones to be read first, with what the print says of them."""
REAL = ("eta", "fall", "eta_repeated", "eta_batch", "eta_second", "ratio", "momentum")
"""Columns of real steps, which are not printed where there were none."""
WHOLE = 10**7
"""Whole numbers below it are written out."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `curvlab.compare` found. `print` shows what was measured at the width of the terminal, `text` at any other.

    Attributes:
        records: one a candidate, see `table`; the texts of its column `note` under `notes`.
        single_steps: one a single real step, see `steps`.
        about: model, loss, data and where the second batch comes from, in a sentence.
        in_a_row: real steps in a row that a learning rate has to hold for, 0 if none were taken.
    """

    records: Sequence[Mapping[str, Any]]
    single_steps: Sequence[Mapping[str, Any]]
    about: str
    in_a_row: int

    @property
    def table(self) -> pd.DataFrame:
        """One row a structure and damping, with the columns that `curvlab.compare` lists."""
        return _frame([{**record, "note": "; ".join(record["notes"])} for record in self.records], COLUMNS)

    @property
    def steps(self) -> pd.DataFrame:
        """One row a single real step: `structure`, `damping`, `learning_rate`, how far the losses fell, and were to fall.

        `fall` is of the batch, `second_fall` of the second batch, `predicted_fall` of the quadratic model of the batch.
        """
        return _frame(
            self.single_steps, ("structure", "damping", "learning_rate", "fall", "second_fall", "predicted_fall")
        )

    def best(self) -> pd.Series[Any]:
        """Return the row whose step at `eta` lowers the loss of the *second* batch most, of the batch itself if there is no second.

        Only rows whose learning rate was seen to hold for steps in a row have an `eta`.

        Raises:
            ValueError: if there is no such row.
        """
        table = self.table
        if (why := self._nothing()) is not None:
            raise ValueError(f"There is no best candidate: {why}. The column `note` says what was not measured.")
        return table.iloc[int(table["fall"].argmax())]

    def _nothing(self) -> str | None:
        """Return why there is no best candidate, None if there is one."""
        if any(record["eta"] > 0 for record in self.records):
            return None
        if not self.in_a_row:
            return "no real steps were taken (steps=0)"
        if any(record["eta_repeated"] > 0 for record in self.records):
            return "at no learning rate that holds does the loss of the second batch fall"
        return "no learning rate was seen to hold for steps in a row"

    def text(self, width: int | None = None) -> str:
        """Return the table as text, in groups of columns that fit into a width, that of the terminal if None."""
        width = terminal_width() if width is None else width
        shown = [name for name in COLUMNS if name != "note" and (self.in_a_row or name not in REAL)]
        measured = [record for record in self.records if not isnan(record["lambda_max"])]
        rows = [[_shown(record[name]) for name in shown] for record in measured]
        meanings = [f"{name}: {COLUMNS[name]}" for name in shown if COLUMNS[name]]
        notes = note_lines(self.records)
        above = [self.about, *self._recommended()]
        return page(above, shown, rows, [*notes, "; ".join(meanings) + "."], width)

    def _recommended(self) -> list[str]:
        """Say which row is the best, or why there is none."""
        if (why := self._nothing()) is not None:
            return [f"There is no best candidate: {why}."] if self.in_a_row else []
        best = self.best()
        return [
            f"Best for the second batch: {best['structure']} at damping {best['damping']} and learning rate "
            f"{number(best['eta'], 3)}, whose step lowers its loss by {number(best['fall'], 3)}; it holds for "
            f"{self.in_a_row} steps in a row."
        ]

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        names = dict.fromkeys(str(record["structure"]) for record in self.records)
        return line(
            self, "print it, or see .table, .best() and .plot()", candidates=len(self.records), structures=list(names)
        )

    def _repr_html_(self) -> str:
        shown = self.table.map(_shown)
        above = "".join(f"<p>{escape(text)}</p>" for text in (repr(self), self.about, *self._recommended()))
        return f"<div>{above}{shown.to_html(index=False)}</div>"

    def plot(self) -> Figure:
        """Draw how far the loss of the second batch falls at each learning rate, and the learning rates of every candidate.

        Without real steps, scale and anisotropy of the response are drawn.
        """
        from curvlab.compare.drawing import draw  # matplotlib starts slowly

        return draw(self.table, self.steps, real=bool(self.in_a_row))


def record_of(candidate: Candidate) -> dict[str, Any]:
    """Return what was measured of a candidate by the names of `COLUMNS`, and its notes."""
    record: dict[str, Any] = dict.fromkeys(COLUMNS, nan)
    record |= {"structure": candidate.name, "damping": candidate.damping, "notes": tuple(candidate.notes)}
    record |= {"rank": candidate.rank, "seconds": candidate.seconds}
    record |= {"mib": candidate.state / 2**20, "peak_mib": candidate.peak / 2**20}
    if (response := candidate.response) is not None:
        names = ("rho", "rho_rel", "alpha", "anisotropy", "cosine", "lambda_max", "eta_linear")
        record |= {name: getattr(response, name) for name in names}
    if (found := candidate.trial) is not None:
        record |= {"eta_batch": found.eta_batch, "eta_second": found.eta_second, "momentum": candidate.momentum}
        record["eta_repeated"] = candidate.eta_repeated
        if (best := found.best(candidate.eta_repeated)) is not None:
            record |= {"eta": best.rate, "fall": found.fall(best), "ratio": found.ratio(best)}
    return record


def _frame(records: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> pd.DataFrame:
    import pandas as pd  # takes as long to import as all of curvlab

    return pd.DataFrame(list(records), columns=list(columns))


def _shown(value: Any) -> str:
    """Whole numbers as they are, others with three digits, a dash for what was not measured."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < WHOLE else number(value, 3)
