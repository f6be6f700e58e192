"""Runs of every method in its configuration on fresh seeds: loss and accuracy against steps, and the steps to both targets."""

from collections.abc import Callable, Mapping

from analyses.claims import claim
from analyses.training.comparison import Comparison, against_rivals
from analyses.training.config import Config
from analyses.training.entrants import TUNING, VARIES, chosen, entrants, final_loss, run, seconds, steps_to, trained
from analyses.training.ingredients import KFAC_PAPER, Ingredient, compared
from analyses.training.methods import DEFAULTS, METHODS, Entrant
from analyses.training.races import TARGETS, Target
from curvlab import study
from curvlab.study.claims import Group

PRACTICE = f"{KFAC_PAPER}, section 13: K-FAC against SGD with momentum on autoencoders"
EXPLORED = 12
"""Seeds that had been seen when methods came to be compared one by one."""


def _measure(cell: study.Cell, context: study.Context[Config]) -> study.Observations:
    method = METHODS[str(cell["method"])]
    trace = run(method, chosen(method, context), int(cell["seed"]), context)
    rows = [steps_to(target, trace, context.config.race, f"steps_to_{target}") for target in TARGETS]
    rows.append(final_loss(trace, "final_loss"))
    rows.append(trained(trace, context.config.race))
    if trace.diverged is not None:
        rows.append(study.observed("diverged_at", trace.diverged, status=trace.status))
    for seen in trace.seen:
        rows += [study.observed(target, seen[target], step=seen["step"]) for target in TARGETS]
    return rows


Expecting = Callable[..., study.Expected]

EXPECTED: Mapping[str, tuple[Expecting, str]] = {
    "full": (study.supported, "It has all curvature of the batch."),
    "block-diagonal": (study.supported, "It has the curvature of each layer."),
    "kfac": (study.supported, "It averages the curvature of each layer over batches."),
    "ekfac": (study.supported, "It averages the curvature of each layer over batches."),
    "block-tridiagonal": (study.refuted, "It is indefinite, so its steps need not descend."),
}
"""Of the steps of structures against methods that know no curvature but along coordinates; of the others nobody knows."""


def _expected(versus: Comparison) -> study.Expected:
    if versus.method in DEFAULTS:
        return study.undecided("Nothing of it is fitted to the problem, all of the rival is.", explored=EXPLORED)
    if versus.other == "muon":
        return study.undecided("Muon, too, steps as far along every direction of a layer.", explored=EXPLORED)
    known, reason = EXPECTED.get(
        versus.method, (study.undecided, "Its curvature leaves out much, or is that of one batch.")
    )
    return known(reason, explored=EXPLORED)


def group_of(versus: Comparison) -> Group:
    """Return the group of claims on a structure against a rival: the paper has K-FAC against SGD, on other problems."""
    return "derived" if versus.methods == ("kfac", "sgd") else "exploration"


def _trains(method: Entrant, config: Config) -> study.Claim:
    return claim(
        f"trains-{method.name}", "what is promised of curvlab's defaults; no paper", study.Always("trained", "greater", 1.0),
        f"{method.title} reaches {config.race.described('loss')} at every seed, and does not diverge.",
        f"1 for a run that gets there within {config.race.steps} steps and does not diverge before their end, 0 for any other.",
        study.undecided("Its parts are made for that, but no theorem says so.", explored=EXPLORED), group="exploration",
        at={"method": method.name}, bound_from="1: every run",
    )  # fmt: skip


def _tuned(versus: Comparison) -> str:
    """How the two methods of a comparison came to their configurations."""
    if METHODS[versus.method].tuned:
        return "both tuned over as many configurations on seeds of their own"
    return "the rival tuned on seeds of its own, the other not at all"


def _fewer_steps(versus: Comparison, target: Target, config: Config) -> study.Claim:
    return claim(
        f"steps-{target}-{versus.method}-{versus.other}", PRACTICE, study.Wins(f"steps_to_{target}", "less"),
        f"{METHODS[versus.method].title} needs fewer steps to {config.race.described(target)} than {versus.other}.",
        f"Its steps minus those of the rival, seed by seed, {_tuned(versus)}; a run that does not get there counts as "
        f"{config.race.steps}.",
        _expected(versus), group=group_of(versus), at={"method": versus.methods}, estimate=versus.difference,
        assumptions=versus.outside,
    )  # fmt: skip


def _gain(ingredient: Ingredient, config: Config) -> study.Claim:
    versus = ingredient.versus
    return claim(
        f"ingredient-{ingredient.name}", ingredient.source,
        study.Inequality("steps_to_loss", "less", ingredient.bound, centre="geometric mean"),
        ingredient.statement,
        f"Steps of {ingredient.method} to {config.race.described('loss')} over those of {ingredient.without}, "
        f"{'neither tuned' if ingredient.of_default else 'each tuned over as many configurations'}.",
        ingredient.expected, group=ingredient.group, at={"method": versus.methods}, estimate=versus.ratio,
        assumptions=versus.outside, bound_from=ingredient.bound_from,
    )  # fmt: skip


def _claims(config: Config) -> list[study.Claim]:
    return [
        *(_trains(METHODS[name], config) for name in config.defaults),
        *(_fewer_steps(versus, target, config) for versus in against_rivals(config) for target in TARGETS),
        *(_gain(ingredient, config) for ingredient in compared(config)),
    ]


JUDGING: study.Experiment[Config] = study.Experiment(
    name="judging",
    cells=lambda config: [{"method": method.name} for method in entrants(config)],
    measure=_measure,
    varies=VARIES,
    claims=_claims,
    seconds=seconds,
    memory=8e8,
    after=(TUNING,),
)
