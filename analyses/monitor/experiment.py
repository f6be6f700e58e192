"""What is measured of a training run with a monitor, and what is claimed of the monitor."""

from collections.abc import Sequence

import torch

from analyses.claims import claim
from analyses.clock import no_older_garbage, one_thread
from analyses.monitor.config import Config
from analyses.monitor.courses import COURSES, OTHERWISE, SHOWS, SMOOTH, Followed, follow
from curvlab import study
from curvlab.monitor import Edge
from curvlab.problems import resolve

CONSTANT, RAMP = "constant", "ramp"
SHARE, MEASURED, TOLD, SHOWN, BEFORE, AHEAD = "share", "measured", "told", "shown", "before", "ahead"
MOSTLY = 0.8
"""Share of the runs whose instability is to be told before, over all problems."""
EXPLORED = 10
SOURCE = "curvlab.monitor"
STEP_SECONDS = {"digits-mlp": 7e-4, "karate-gcn": 1.2e-3, "fashion-lenet": 7e-3, "characters": 2e-2}


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    config, seed, name, ramped = context.config, int(cell["seed"]), str(cell["problem"]), cell["rate"] == RAMP
    problem = resolve(name, seed=seed).to(config.device, getattr(torch, config.dtype))
    with one_thread(), no_older_garbage(), torch.random.fork_rng():
        torch.manual_seed(study.stream(seed, "draws"))
        found = follow(
            problem,
            name,
            config.steps,
            config.budget,
            ramp=config.ramp if ramped else 1.0,
            quantities=[Edge()] if ramped else None,
            seed=seed,
        )
    return _observations(found, config.budget, ramped=ramped)


def _observations(found: Followed, budget: float, *, ramped: bool) -> list[dict[str, object]]:
    told, shown = found.told, found.shown
    rows = [
        study.observed(
            SHARE,
            found.share,
            steps=found.steps,
            step_seconds=found.seconds / found.steps,
            budget=budget,
            dropped=", ".join(found.dropped),
        ),
        *(study.observed(MEASURED, number, of=quantity) for quantity, number in found.measured.items()),
        *(study.observed(name, step) for name, step in ((TOLD, told), (SHOWN, shown)) if step is not None),
    ]
    if ramped:
        before = shown is not None and told is not None and told < shown
        ahead = shown - told if shown is not None and told is not None else 0
        status = {} if shown is not None else study.outside("the loss shows no instability up to the largest rate")
        rows += [study.observed(BEFORE, float(before), **status), study.observed(AHEAD, ahead, **status)]
    return rows


def _shares(names: Sequence[str], config: Config, suffix: str, where: str, group: str) -> list[study.Claim]:
    found = [
        ("always", study.Always(SHARE, "less", config.budget), f"The monitor never takes more than its budget{where}."),
        (
            "mean",
            study.Inequality(SHARE, "less", config.budget, centre="mean"),
            f"On average, the monitor takes less than its budget{where}.",
        ),
    ]
    return [
        claim(
            f"share-{kind}{suffix}", SOURCE, rule, statement,
            "Seconds of the monitor a second of training by the clock of the loop, all quantities at a constant learning rate and "
            f"the edge alone at a growing one; {', '.join(names)}.",
            study.undecided("A measurement that takes far longer than those before overdraws the budget.", explored=EXPLORED),
            group=group, at={"problem": tuple(names)}, bound_from="the budget (--budget)",
        )
        for kind, rule, statement in found
    ]  # fmt: skip


def _told(names: Sequence[str], config: Config, suffix: str, words: str, group: str, bound: float) -> study.Claim:
    return claim(
        f"told-before{suffix}", SOURCE, study.Share(BEFORE, "greater", bound),
        f"{words}, the monitor tells that steps are at the edge before the loss shows an instability.",
        f"Whether the event comes first, as the learning rate grows {config.ramp:g}-fold over {config.steps} steps; the loss shows "
        f"an instability once its mean over {SMOOTH} steps is {SHOWS:g} times the lowest so far; {', '.join(names)}.",
        study.undecided("Noise of small batches can make steps unstable below the edge.", explored=EXPLORED),
        group=group, at={"problem": tuple(names), "rate": RAMP}, bound_from="what was asked of the monitor",
    )  # fmt: skip


def _ahead(name: str) -> study.Claim:
    return claim(
        f"ahead-{name}", SOURCE, study.Inequality(AHEAD, "greater", float(SMOOTH), centre="median"),
        f"On {name}, the event comes earlier than the loss by more steps than the {SMOOTH} over which that is averaged.",
        "Steps from the event to where the loss shows an instability, 0 without an event.",
        study.undecided("A look at the edge comes every few hundred steps.", explored=EXPLORED),
        group="exploration", at={"problem": name, "rate": RAMP}, bound_from="the steps of the mean loss",
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    names = config.problems
    each = [
        one
        for name in names
        for one in (
            *_shares([name], config, f"-{name}", f" on {name}", "exploration"),
            _told([name], config, f"-{name}", f"On {name}, in most runs", "exploration", 0.5),
            _ahead(name),
        )
    ]
    return [
        *_shares(names, config, "", "", "derived"),
        _told(names, config, "", "In more than four runs of five", "derived", MOSTLY),
        *each,
    ]


def _cells(config: Config) -> list[study.Point]:
    return [
        {"problem": problem, "rate": rate, "seed": seed}
        for problem, seeds in config.seeds_by_problem.items()
        for seed in seeds
        for rate in (CONSTANT, RAMP)
    ]


def title(problem: str) -> str:
    """Return how a problem is trained, in words."""
    return COURSES.get(problem, OTHERWISE).title


RUNS: study.Experiment[Config] = study.Experiment(
    name="runs",
    cells=_cells,
    measure=_measure,
    varies=("initialisation", "batches", "draws"),
    claims=_claims,
    seconds=lambda cell, config: config.steps * STEP_SECONDS.get(str(cell["problem"]), 2e-3),
    memory=1e9,
)
