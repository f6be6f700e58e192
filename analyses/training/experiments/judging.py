"""Runs of every method in its configuration on fresh seeds: loss and accuracy against steps, and the steps to both targets."""

from collections.abc import Mapping

from analyses.claims import claim
from analyses.training.comparison import Comparison, against_rivals
from analyses.training.config import Config
from analyses.training.entrants import TUNING, chosen, entrants, final_loss, run, seconds, steps_to
from analyses.training.ingredients import KFAC_PAPER, Ingredient, compared
from analyses.training.methods import METHODS
from analyses.training.races import TARGETS, Target
from curvlab import study

PRACTICE = f"{KFAC_PAPER}, section 13: K-FAC against SGD"


def racing(config: Config, points: list[study.Point]) -> list[study.Point]:
    """Return points at the fresh seeds that races are judged on."""
    return [{**point, "seed": seed} for point in points for seed in range(config.raced)]


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    method = METHODS[str(cell["method"])]
    trace = run(method, chosen(method, context), int(cell["seed"]), context)
    rows = [steps_to(target, trace, context.config.race, f"steps_to_{target}") for target in TARGETS]
    rows.append(final_loss(trace, "final_loss"))
    if trace.diverged is not None:
        rows.append(study.observed("diverged_at", trace.diverged, status=trace.status))
    for seen in trace.seen:
        rows += [study.observed(target, seen[target], step=seen["step"]) for target in TARGETS]
    return rows


EXPECTED: Mapping[str, study.Expected] = {
    "full": study.supported("It has all curvature of the batch."),
    "block-diagonal": study.supported("It has the curvature of each layer."),
    "kfac": study.supported("It averages the curvature of each layer over batches."),
    "ekfac": study.supported("It averages the curvature of each layer over batches."),
    "block-tridiagonal": study.refuted("It is indefinite, so its steps need not descend."),
}
"""Of the steps of structures; of the others nobody knows."""


def _fewer_steps(versus: Comparison, target: Target, config: Config) -> study.Claim:
    return claim(
        f"steps-{target}-{versus.method}", f"{PRACTICE}, for every structure",
        study.Inequality(f"steps_to_{target}", "less", 0.0),
        f"{versus.method} natural gradient needs fewer steps to {config.race.described(target)} than the best tuned "
        "first-order method.",
        "log10 of its steps over those of the rival that is best on the same seeds.",
        EXPECTED.get(versus.method, study.undecided("Its curvature leaves out much, or is that of one batch.")),
        at={"method": versus.methods}, estimate=versus.steps, assumptions=versus.outside,
    )  # fmt: skip


def _gain(ingredient: Ingredient, config: Config) -> study.Claim:
    versus = ingredient.versus
    return claim(
        f"ingredient-{ingredient.name}", ingredient.source, study.Inequality("steps_to_loss", "less", ingredient.bound),
        ingredient.statement,
        f"log10 of the steps of {ingredient.method} to {config.race.described('loss')} over those of {ingredient.without}, "
        "each tuned over as many configurations.",
        ingredient.expected, at={"method": versus.methods}, estimate=versus.steps, assumptions=versus.outside,
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(_fewer_steps(versus, target, config) for versus in against_rivals(config) for target in TARGETS),
        *(_gain(ingredient, config) for ingredient in compared(config)),
    ]


JUDGING: study.Experiment[Config] = study.Experiment(
    name="judging",
    cells=lambda config: racing(config, [{"method": method.name} for method in entrants(config)]),
    measure=_measure,
    claims=_claims,
    seconds=seconds,
    memory=8e8,
    after=(TUNING,),
)
