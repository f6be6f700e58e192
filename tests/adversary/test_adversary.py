"""Random models that try to make curvlab silently wrong: numbers are right or refused, and the model stays as it was."""

import logging
import sys
import time
import warnings

import pytest
import torch

from adversary.__main__ import BAD, main
from adversary.cases import KINDS, Named, run_case

SECONDS = 3.0
"""Time that a chunk of cases may take; how many it judges depends on the machine."""


@pytest.fixture(autouse=True)
def as_users_run_it(unchecked_types: None) -> None:
    """Leave errors to curvlab, and warnings to torch."""


@pytest.mark.parametrize("chunk", range(8))
def test_random_models(chunk: int) -> None:
    start, bad, judged = time.monotonic(), [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(10_000 * chunk, 10_000 * chunk + 200):
            if time.monotonic() - start > SECONDS:
                break
            result = run_case(seed)
            judged += result.verdict != "void"
            if result.verdict in BAD:
                bad.append(f"python -m tests.adversary --case {seed}: {result.why}\n    {result.description}")
    assert not bad, "\n".join(bad)
    assert judged


NAMED = [
    ("ZeroHead",),
    ("ReZero",),
    ("Gate",),
    ("Missing",),
    ("Clipped",),
    ("Rolled",),
    ("Positions",),
    ("Projected",),
    ("WeightAgain",),
    ("LateCall",),
    ("Sorted",),
    ("Hooked",),
    ("OwnFunction",),
    ("Listing",),
    ("Twice", "Dense", "Twice"),
]


@pytest.mark.parametrize("blocks", NAMED, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_one_trap(kind: str, blocks: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [run_case(seed, Named(kind, blocks)) for seed in range(2)]
    assert not [f"{r.why}\n{r.description}" for r in results if r.verdict in BAD]


def test_the_command_tells_progress_and_bad_cases_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["adversary", "--cases", "12"])
    logger, threads = logging.getLogger("curvlab"), torch.get_num_threads()
    level = logger.level
    with warnings.catch_warnings():
        try:
            assert main() == 0
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)
    out, err = capfd.readouterr()
    assert not err
    assert not caplog.records
    assert out.splitlines()[-1].split()[0] == "all"
