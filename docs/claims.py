"""Write the tables of claims into the pages of `docs/theory`, from the analyses: `python docs/claims.py`.

A page says which analysis it wants the claims of by a pair of comments, between which the table is:

    <!-- claims of ntk_isotropy -->
    <!-- end of claims -->

Claims that differ by one word only, such as the name of a structure, share a row.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path

from curvlab.study import Claim
from curvlab.study.report.markdown import table

PAGES = Path(__file__).parent / "theory"
PLACE = re.compile(r"(<!-- claims of (\w+) -->\n).*?(<!-- end of claims -->)", flags=re.DOTALL)
HEADER = ("claim", "statement", "decided by", "expected", "source")
GAP = "…"


def updated(page: str) -> str:
    """The text of a page with the claims as the analyses have them by default."""
    return PLACE.sub(lambda place: f"{place[1]}\n{table_of(place[2])}\n\n{place[3]}", page)


def analyses_of(page: str) -> list[str]:
    """The analyses whose claims a page shows."""
    return [place[2] for place in PLACE.finditer(page)]


def table_of(analysis: str) -> str:
    """The claims of an analysis by default, as a table in Markdown."""
    described = import_module(f"analyses.{analysis}").ANALYSIS
    families = folded(described.claims(described.defaults))
    rows = [[f"`{name}`", text, str(one.rule), one.expected.outcome, one.source] for name, text, one in families]
    return table(HEADER, rows)


def folded(claims: Sequence[Claim]) -> list[tuple[str, str, Claim]]:
    """Families of claims: ids, as `trace-{full, kfac}`, the statement with a gap for what differs, and one of them.

    A family decides by the same rule, expects the same and has the same source; its ids and statements are the same but for
    one word, which stands in the id and may stand in the statement.
    """
    families: list[tuple[list[Claim], str, str]] = []
    for claim in claims:
        for i, (members, name, text) in enumerate(families):
            shared = [pair for pair in _joined(members[0], claim) if len(members) == 1 or pair == (name, text)]
            if shared:
                families[i] = ([*members, claim], *shared[0])
                break
        else:
            families.append(([claim], claim.id, claim.statement))
    return [(_named(members, name), text, members[0]) for members, name, text in families]


def _joined(first: Claim, claim: Claim) -> Iterator[tuple[str, str]]:
    """Yield ids and statements that two claims share, with gaps for a word each; the shortest words of the first come first."""
    decided = [(str(one.rule), one.expected.outcome, one.source) for one in (first, claim)]
    parts = first.id.split("-")
    for size, start in product(range(1, len(parts) + 1), range(len(parts))):
        before = "".join(f"{part}-" for part in parts[:start])
        after = "".join(f"-{part}" for part in parts[start + size :])
        between = re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", claim.id)
        if between and decided[0] == decided[1]:
            word = "-".join(parts[start : start + size])
            texts = [_without(word, first.statement), _without(between[1], claim.statement)]
            if texts[0] == texts[1]:
                yield f"{before}{GAP}{after}", texts[0]


def _without(word: str, text: str) -> str:
    """A text with gaps for a word."""
    return re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", GAP, text)


def _named(members: Sequence[Claim], name: str) -> str:
    if len(members) == 1:
        return name
    before, after = name.split(GAP)
    words = [claim.id.removeprefix(before).removesuffix(after) for claim in members]
    return f"{before}{{{', '.join(words)}}}{after}"


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(updated(path.read_text()))
