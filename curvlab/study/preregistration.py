"""What an analysis claims, as data with a fingerprint: written down before a run, and referred to by its results."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from curvlab.study.analysis import Analysis
from curvlab.study.cells import phrase
from curvlab.study.claims import Claim
from curvlab.study.environment import git_state
from curvlab.study.faults import UsageError
from curvlab.study.options import HOW, SEEDS, SHOWN, C, recorded
from curvlab.tools.functions import described
from curvlab.tools.storage import digest, make_folder, write_json

WHATEVER = HOW | SHOWN | SEEDS
"""Options that change no claim."""


@dataclass(frozen=True)
class Registration:
    """Claims that were written down.

    Attributes:
        path: The file.
        written: When, in ISO format.
        options: The options with which the analysis was to be run.
    """

    path: Path
    written: str
    options: Mapping[str, object]

    def differing(self, config: C) -> dict[str, tuple[object, object]]:
        """The options of a configuration that are others than those written down, each with both values."""
        return differing(self.options, _options(config))


def registered(analysis: Analysis[C], config: C) -> dict[str, dict[str, object]]:
    """All that fixes the verdicts beforehand: of each claim, by id, what it says, of what, and how it is decided."""
    neutral = {name: getattr(analysis.defaults, name) for name in WHATEVER}
    return {claim.id: _registered(claim) for claim in analysis.claims(dataclasses.replace(config, **neutral))}


def fingerprints(claims: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """A digest of each registered claim: another one means that its words, bound, expectation or statistic have changed."""
    return {name: digest(claim) for name, claim in claims.items()}


def fingerprint(claims: Mapping[str, Mapping[str, object]]) -> str:
    """The digest of all registered claims, in whatever order."""
    return digest(fingerprints(claims))


def preregister(analysis: Analysis[C], config: C) -> Registration:
    """Write down what an analysis claims, unless that is done already.

    Raises:
        UsageError: there is a damaged file in its place.
        WriteError: it cannot be written.
    """
    claims = registered(analysis, config)
    path = _folder(analysis, config) / f"{_prefix(claims)}{digest(_options(config))[:8]}.json"
    if not path.exists():
        make_folder(path.parent)
        content = {
            "analysis": analysis.name,
            "version": analysis.version,
            "written": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "git": git_state(analysis.file),
            "options": _options(config),
            "fingerprint": fingerprint(claims),
            "claims": claims,
        }
        write_json(path, content)
    return _read(path)


def registration(analysis: Analysis[C], config: C) -> Registration | None:
    """The first time that these claims were written down, with these options or else with the nearest; None if never.

    Raises:
        UsageError: a file with them is damaged.
    """
    prefix = _prefix(registered(analysis, config))
    found = [_read(path) for path in _folder(analysis, config).glob(f"{prefix}*.json")]
    return min(found, key=lambda one: (len(one.differing(config)), one.written), default=None)


def differing(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The entries that differ, each with both values; None where there is none."""
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _registered(claim: Claim) -> dict[str, object]:
    return {
        "statement": claim.statement,
        "source": claim.source,
        "measured": claim.measured,
        "group": claim.group,
        "given": claim.given,
        "varies": list(claim.varies),
        "cells": phrase(claim.where),
        "where": described(claim.where),
        "decided by": str(claim.rule),
        "rule": {"name": type(claim.rule).__name__} | {n: described(e) for n, e in vars(claim.rule).items()},
        "bound from": claim.bound_from,
        "statistic": described(claim.estimate or claim.rule.reduced),
        "assumptions": described(claim.assumptions),
        "expected": dataclasses.asdict(claim.expected),
    }


def _options(config: C) -> dict[str, object]:
    return {name: value for name, value in recorded(config).items() if name not in SHOWN}


def _folder(analysis: Analysis[C], config: C) -> Path:
    """Where preregistrations lie: beside the results."""
    return config.results / analysis.name


def _prefix(claims: Mapping[str, Mapping[str, object]]) -> str:
    return f"preregistered-{fingerprint(claims)[:12]}-"


def _read(path: Path) -> Registration:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        datetime.fromisoformat(content["written"])
        if content["fingerprint"] != fingerprint(content["claims"]) or not path.name.startswith(
            _prefix(content["claims"])
        ):
            raise ValueError("its claims are not those of its fingerprint")
        return Registration(path, content["written"], content["options"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or remove it and preregister again"
        ) from error
