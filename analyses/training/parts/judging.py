"""Runs of every method in its configuration on fresh seeds: loss and accuracy against steps, and the steps to both targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

from analyses.part import Expectation, Observations
from analyses.training.comparison import Comparison
from analyses.training.config import Config
from analyses.training.methods import INVERT_EVERY, KL_CLIP, METHODS, PASSES
from analyses.training.part import Part, cells_of
from analyses.training.race import entrants, race
from analyses.training.tuning import chosen
from curvlab.study import Cell, Claim, Inequality

NAME = "judging"
KFAC_PAPER = "Martens & Grosse 2015"
PRACTICE = f"{KFAC_PAPER}, section 13: K-FAC against SGD"


def _cells(config: Config) -> list[Cell]:
    return cells_of(NAME, config.raced, [{"method": method.name} for method in entrants(config)])


def _measure(cell: Cell, config: Config) -> Observations:
    name, task = str(cell["method"]), config.task
    trace = race(METHODS[name], chosen(name, config), config, int(cell["seed"]))
    reached = {
        "steps_to_loss": trace.steps_to(lambda point: point.loss <= task.loss),
        "steps_to_accuracy": trace.steps_to(lambda point: point.accuracy >= task.accuracy),
    }
    rows: list[dict[str, object]] = [
        {
            "quantity": quantity,
            "value": task.steps if steps is None else steps,
            "status": "ok" if steps is not None else "not reached" if trace.status == "ok" else trace.status,
        }
        for quantity, steps in reached.items()
    ]
    rows.append({"quantity": "final_loss", "value": trace.final_loss, "status": trace.status})
    if trace.diverged_at is not None:
        rows.append({"quantity": "diverged_at", "value": trace.diverged_at, "status": trace.status})
    for point in trace.points:
        rows += [
            {"quantity": "loss", "value": point.loss, "step": point.step},
            {"quantity": "accuracy", "value": point.accuracy, "step": point.step},
        ]
    return rows


TARGETS = {"steps_to_loss": "loss", "steps_to_accuracy": "accuracy"}
"""What is counted, and the target's name in ids."""

EXPECTED: Mapping[str, tuple[Expectation, str]] = {
    "full": ("supported", "It has all curvature of the batch."),
    "block-diagonal": ("supported", "It has the curvature of each layer."),
    "kfac": ("supported", "It averages the curvature of each layer over batches."),
    "ekfac": ("supported", "It averages the curvature of each layer over batches."),
    "block-tridiagonal": ("refuted", "It is indefinite, so its steps need not descend."),
}


def words(target: str, config: Config) -> str:
    """Return a target in words."""
    task = config.task
    return f"a training loss of {task.loss:g}" if target == "loss" else f"a test accuracy of {task.accuracy:g}"


def structure_comparisons(config: Config) -> list[Comparison]:
    """Return every structure against all rivals; none where there is no rival."""
    names = {
        family: [m.name for m in entrants(config) if m.family == family] for family in ("structure", "first order")
    }
    rivals = tuple(names["first order"])
    return [Comparison(name, rivals) for name in names["structure"] if name in config.structures and rivals]


def _structure_claims(config: Config) -> list[Claim]:
    claims = []
    for versus in structure_comparisons(config):
        expected, reason = EXPECTED.get(
            versus.method, ("open", "Its curvature leaves out much, or is that of one batch.")
        )
        claims += [
            Claim(
                id=f"steps-{target}-{versus.method}",
                statement=f"{versus.method} natural gradient needs fewer steps to {words(target, config)} than the best tuned "
                "first-order method.",
                source=f"{PRACTICE}, for every structure",
                measured="log10 of its steps over those of the rival that is best on the same seeds.",
                rule=Inequality(0.0, "less"),
                estimate=versus.steps,
                expected=expected,
                reason=reason,
                assumptions=versus.outside,
                needs=versus.needs(NAME),
                quantities=(quantity,),
            )
            for quantity, target in TARGETS.items()
        ]
    return claims


@dataclass(frozen=True)
class Faster:
    """What is claimed of the seconds of a step."""

    statement: str
    reason: str
    expected: Expectation = "open"


@dataclass(frozen=True)
class Ingredient:
    """What is claimed of an ingredient of K-FAC.

    Attributes:
        name: in the claim's id.
        versus: the method that has it, against the one that has not.
        statement: its gain.
        source: paper and section.
        bound: the largest log10 of the ratio of steps that counts as a gain.
        reason: what speaks for it and against it.
        expected: what is expected of it.
        faster: the claim that its steps take less time, if that is what it is for.
    """

    name: str
    versus: Comparison
    statement: str
    source: str
    reason: str
    bound: float = 0.0
    expected: Expectation = "open"
    faster: Faster | None = None


SLIGHT = log10(1.1)
"""More steps, as log10 of the ratio, that count as no loss."""

INGREDIENTS = (
    Ingredient(
        "adapted",
        Comparison("kfac-adapted", ("kfac",)),
        "Levenberg–Marquardt damping needs fewer steps than fixed damping.",
        f"{KFAC_PAPER}, section 6.5",
        "It lowers the damping as the quadratic model comes to hold, but in a short run from a tuned start it has little to do.",
    ),
    Ingredient(
        "quadratic",
        Comparison("kfac-quadratic", ("kfac",)),
        "Step size and momentum from the quadratic model need fewer steps than a fixed, tuned step size.",
        f"{KFAC_PAPER}, sections 6.4 and 7",
        "The step fits the place, but also the noise of a small batch.",
    ),
    Ingredient(
        "clipped",
        Comparison("kfac-clipped", ("kfac",)),
        f"A trust region of {KL_CLIP:g} needs fewer steps than none.",
        "Ba, Grosse & Martens 2017, section 5",
        "It admits less damping and longer steps later, but shortens the first ones.",
    ),
    Ingredient(
        "split",
        Comparison("kfac-split", ("kfac",)),
        "Damping split over the factors needs fewer steps than damping of their product.",
        f"{KFAC_PAPER}, section 6.3",
        "It is cheaper, an approximation of the same step; at equal ρ it damps more.",
    ),
    Ingredient(
        "average",
        Comparison("kfac", ("kfac-latest",)),
        "Factors averaged over batches (decay 0.95) need fewer steps than those of the latest batch.",
        f"{KFAC_PAPER}, section 5",
        "A batch that is smaller than the layers determines few directions.",
        expected="supported",
    ),
    Ingredient(
        "rare",
        Comparison("kfac-rare", ("kfac-split",)),
        f"Inverses that are made every {INVERT_EVERY} updates, layers in turn, need at most a tenth more steps.",
        f"{KFAC_PAPER}, section 8",
        "The averaged factors change slowly.",
        bound=SLIGHT,
        expected="supported",
        faster=Faster(
            "A step of K-FAC with rare inverses takes less time than one with inverses of every batch.",
            "Inverses are most of what the method adds to a step on small layers.",
            expected="supported",
        ),
    ),
    Ingredient(
        "accumulated",
        Comparison("kfac-accumulated", ("kfac",)),
        f"Steps on gradients and factors of {PASSES} passes, in the memory of one, are fewer than those on one.",
        f"{KFAC_PAPER}, section 13: larger batches",
        f"They see {PASSES} times the samples, but near the start noise is not what limits a step.",
    ),
    Ingredient(
        "autocast",
        Comparison("kfac-autocast", ("kfac",)),
        "Passes under autocast, with a scaled loss, need at most a tenth more steps.",
        "Micikevicius et al. 2018, section 3",
        "Their round-off is small beside the noise of a batch; factors and inverses keep full precision.",
        bound=SLIGHT,
        expected="supported",
        faster=Faster(
            "A step of K-FAC from a pass under autocast takes less time than one in full precision.",
            "It pays where products in half precision are faster, on large layers.",
        ),
    ),
    Ingredient(
        "plain",
        Comparison("kfac-plain", ("kfac",)),
        "Leaving the output layer to the plain gradient needs at most a tenth more steps.",
        "practice with many classes, whose factor is the largest; no paper",
        "The other layers' curvature may do, but the output layer then moves at their rate without their damping.",
        bound=SLIGHT,
        faster=Faster(
            "A step of K-FAC that leaves the output layer to the plain gradient takes less time than one on all layers.",
            "It makes no factors and inverses there.",
            expected="supported",
        ),
    ),
)


def ingredient_claims_apply(config: Config) -> list[Ingredient]:
    """Return the ingredients whose two methods take part."""
    present = {method.name for method in entrants(config)}
    return [which for which in INGREDIENTS if {which.versus.method, *which.versus.others} <= present]


def _claims(config: Config) -> list[Claim]:
    return _structure_claims(config) + [
        Claim(
            id=f"ingredient-{which.name}",
            statement=which.statement,
            source=which.source,
            measured=f"log10 of the steps of {which.versus.method} to {words('loss', config)} over those of "
            f"{which.versus.others[0]}, each tuned over as many configurations.",
            rule=Inequality(which.bound, "less"),
            estimate=which.versus.steps,
            expected=which.expected,
            reason=which.reason,
            assumptions=which.versus.outside,
            needs=which.versus.needs(NAME),
            quantities=("steps_to_loss",),
        )
        for which in ingredient_claims_apply(config)
    ]


PART = Part(NAME, _cells, _measure, _claims, seconds=lambda steps: 0.008 * steps)
