"""Race optimisers on a user's model, and say which one to take."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from torch import nn

from curvlab.advice.candidates import Candidate, usual
from curvlab.advice.damping import dampings
from curvlab.advice.race import Clock, Entrant, race
from curvlab.advice.result import Advice
from curvlab.compare.batches import Batch, randomness_kept, samples_of_batch
from curvlab.errors import CurvlabError
from curvlab.rows.batches import Data, pairs_of
from curvlab.rows.packed import part_of
from curvlab.rows.sweep import PickOutput
from curvlab.tools.progress import say
from curvlab.tools.text import duration

MOST_BATCHES = 512
"""Batches that are kept in memory; a loader that has more is taken from its start."""
HELD = 8
"""One batch in so many is held out, eight at most."""
FOR_DAMPING = 0.1
"""Part of the budget that is left for the interval of dampings."""
UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


def advise(
    model: nn.Module,
    loss: nn.Module,
    data: Data,
    budget: str | float | int = "5min",
    *,
    candidates: Sequence[Candidate] | None = None,
    output: PickOutput = None,
    graph: bool = False,
    progress: bool = False,
    clock: Clock = time.perf_counter,
) -> Advice:
    """Say which optimiser to train a model with, and with which settings.

    Natural gradient, Adam and SGD, each with several settings, train copies of the model from its present weights in equal times,
    in rounds after each of which the worse half drops out: an optimiser is tuned in the time that its rivals have, too. They are
    judged by the lowest loss, after any of their rounds, of data that none of them trains on. If natural gradient wins, a tenth
    of the time goes into the interval of dampings at which its steps do what they should, see `curvlab.advice.damping`.

    What wins a short race need not win a long one: learning rates that are best at first tend to be too large later. Give the race
    a share of the time that training will take.

    Args:
        model: any module, in the mode in which it is to be trained; it is left as it was found.
        loss: a module, called on the model's output and the targets.
        data: a loader or other iterable of pairs (inputs, targets), of which the first 512 are kept in memory and one in eight is
            held out, eight at most; or one pair, the last eighth of whose samples is held out. Order and random state of a loader
            stay as they are.
        budget: seconds, or a text such as "30s", "5min" or "1h".
        candidates: what races, `curvlab.advice.candidates.usual()` if None.
        output: which tensor of a structured output the loss is called on.
        graph: whether samples are nodes of one graph, which interact; nothing is held out of a pair then.
        progress: whether to print a line for every part of a round.
        clock: what the budget is counted by; `time.process_time` counts processor time, which is not taken up by others on a
            machine.

    Returns:
        The advice; print it.

    Raises:
        ValueError: for data without a batch, a budget that is no time, and if no candidate can train the model, with the reasons.

    Cost: the budget, the first steps, and memory for one copy of model and optimiser a candidate.
    """
    seconds = as_seconds(budget)
    chosen = usual() if candidates is None else list(candidates)
    if not chosen:
        raise ValueError("candidates is empty: leave it out for the usual ones.")
    console = Console(stderr=True)

    def told(entrant: Entrant, number: int) -> None:
        if progress:
            say(
                console,
                f"round {number + 1}, {entrant.candidate}: {entrant.trouble or f'loss {entrant.looks[-1].loss:.4g}'}",
            )

    with randomness_kept(data):
        batches, held, origin = _split(data, loss, graph=graph)
        entrants, refused = _enter(chosen, model, loss, output, graph=graph)
        before = next((entrant.look(held) for entrant in entrants), float("nan"))
        for entrant in entrants:
            entrant.looks.clear()
        end = clock() + seconds
        best = race(entrants, batches, held, (1 - FOR_DAMPING) * seconds, clock=clock, told=told) if entrants else []
        interval = None
        if best and best[0].candidate.method == "natural gradient":
            others = held if len(held) > 1 else _apart(held[0], batches, loss, graph=graph)
            how: dict[str, Any] = {"output": output, "graph": graph, "until": end, "clock": clock}
            interval = dampings(best[0].candidate, model, loss, batches[0], others, **how)
    if not best:
        reasons = refused | {
            str(e.candidate): e.trouble or "its loss on held-out data was not finite" for e in entrants
        }
        listed = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in reasons.items())
        raise ValueError(f"No candidate trains the {type(model).__name__} with {type(loss).__name__}. {listed}.")
    return Advice(best[0], entrants, refused, before, interval, origin, duration(seconds), loss, output, graph)


def as_seconds(budget: str | float | int) -> float:
    """Return a time in seconds; raises ValueError for what is none."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]+)\s*", budget) if isinstance(budget, str) else None
    try:
        seconds = float(budget) if found is None else float(found[1]) * UNITS[found[2]]
    except (TypeError, ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f'budget is a number of seconds above 0, or a text such as "30s", "5min" or "1h", got {budget!r}.'
        )
    return seconds


def _enter(
    candidates: Sequence[Candidate], model: nn.Module, loss: nn.Module, output: PickOutput, *, graph: bool
) -> tuple[list[Entrant], dict[str, str]]:
    """Return those that can start, and why others cannot."""
    entrants, refused = [], {}
    for candidate in candidates:
        try:
            entrants.append(Entrant.of(candidate, model, loss, output, graph=graph))
        except (CurvlabError, ValueError, TypeError) as problem:
            refused[str(candidate)] = str(problem).strip().splitlines()[0]
    return entrants, refused


def _apart(held: Batch, batches: Sequence[Batch], loss: nn.Module, *, graph: bool) -> list[Batch]:
    """Return the only batch that is held out in several, so that they differ from each other; none if it is trained on."""
    if any(held is batch for batch in batches):
        return []
    total = None if graph else samples_of_batch(held, loss)
    parts = 1 if total is None else min(HELD, total // 2)
    if total is None or parts < 2:
        return [held]
    cuts = [total * k // parts for k in range(parts + 1)]
    return [part_of(held, slice(a, b), total) for a, b in pairwise(cuts)]


def _split(data: Any, loss: nn.Module, *, graph: bool) -> tuple[list[Batch], list[Batch], str]:
    """Return batches to train on, batches that are held out, and where those come from."""
    batches = pairs_of(data, MOST_BATCHES)
    if len(batches) > 1:
        size = min(HELD, max(1, len(batches) // HELD))
        return batches[:-size], batches[-size:], f"the last {size} of {len(batches)} batches, held out,"
    total = None if graph else samples_of_batch(batches[0], loss)
    if total is None or total < 2:
        return batches, batches, "the batch that is trained on, as it cannot be cut,"
    cut = total - max(1, total // HELD)
    train, held = part_of(batches[0], slice(0, cut), total), part_of(batches[0], slice(cut, total), total)
    return [train], [held], f"the last {total - cut} of {total} samples, held out,"
