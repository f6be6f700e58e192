"""What single ingredients add to K-FAC, and to natural gradient by default: the one table of what is claimed of them."""

from dataclasses import dataclass

from analyses.training.comparison import Comparison
from analyses.training.config import Config
from analyses.training.entrants import entrants
from analyses.training.methods import DEFAULT, INVERT_EVERY, KL_CLIP, METHODS, PASSES
from curvlab.study import Expected, supported, undecided
from curvlab.study.claims import Group

KFAC_PAPER = "Martens & Grosse 2015"
TRUST_PAPER = "Ba, Grosse & Martens 2017"

SLIGHT = 1.1
"""The ratio of steps up to which more of them count as no loss."""


@dataclass(frozen=True)
class Ingredient:
    """What is claimed of an ingredient of K-FAC, or of natural gradient by default.

    Attributes:
        name: In the claim's id.
        label: In figures.
        statement: Its gain in steps.
        source: Paper and section.
        expected: What is expected of that.
        bound: The largest ratio of steps that counts as a gain.
        faster: The claim that its steps take less time, if that is what it is for.
        expected_faster: What is expected of that.
        lacking: The method that lacks it, whose base has it; if none, `kfac-<name>` has it, and lacks it in its base.
        group: Of both claims; what a paper says of it on other problems is derived.
    """

    name: str
    label: str
    statement: str
    source: str
    expected: Expected
    bound: float = 1.0
    faster: str = ""
    expected_faster: Expected | None = None
    lacking: str = ""
    group: Group = "derived"

    @property
    def bound_from(self) -> str:
        """Where the bound comes from; that of a slight loss is by hand."""
        return "" if self.bound == SLIGHT else "1: no difference"

    @property
    def method(self) -> str:
        """The method that has it."""
        return METHODS[self.lacking].base if self.lacking else f"kfac-{self.name}"

    @property
    def without(self) -> str:
        """The method that has it not."""
        return self.lacking or METHODS[self.method].base

    @property
    def of_default(self) -> bool:
        """Whether it is one of natural gradient by default."""
        return not METHODS[self.without].tuned

    @property
    def versus(self) -> Comparison:
        """What has it against what has it not."""
        return Comparison(self.method, self.without)


INGREDIENTS = (
    Ingredient(
        "adapted",
        "Levenberg–Marquardt damping",
        "Levenberg–Marquardt damping needs fewer steps than fixed damping.",
        f"{KFAC_PAPER}, section 6.5",
        undecided(
            "It lowers the damping as the quadratic model comes to hold, but in a short run from a tuned start it has little to "
            "do."
        ),
    ),
    Ingredient(
        "quadratic",
        "quadratic-model step",
        "Step size and momentum from the quadratic model need fewer steps than a fixed, tuned step size.",
        f"{KFAC_PAPER}, sections 6.4 and 7",
        undecided("The step fits the place, but also the noise of a small batch."),
    ),
    Ingredient(
        "clipped",
        "trust region",
        f"A trust region of {KL_CLIP:g} needs fewer steps than none.",
        f"{TRUST_PAPER}, section 5",
        undecided("It admits less damping and longer steps later, but shortens the first ones."),
    ),
    Ingredient(
        "split",
        "split damping",
        "Damping split over the factors needs fewer steps than damping of their product.",
        f"{KFAC_PAPER}, section 6.3",
        undecided("It is cheaper, an approximation of the same step; at equal ρ it damps more."),
    ),
    Ingredient(
        "average",
        "averaged factors",
        "Factors averaged over batches (decay 0.95) need fewer steps than those of the latest batch.",
        f"{KFAC_PAPER}, section 5",
        supported("A batch that is smaller than the layers determines few directions."),
        lacking="kfac-latest",
    ),
    Ingredient(
        "rare",
        "rare inverses",
        f"Inverses that are made every {INVERT_EVERY} updates, layers in turn, need at most a tenth more steps.",
        f"{KFAC_PAPER}, section 8",
        supported("The averaged factors change slowly."),
        SLIGHT,
        "A step of K-FAC with rare inverses takes less time than one with inverses of every batch.",
        supported("Inverses are most of what the method adds to a step on small layers."),
    ),
    Ingredient(
        "accumulated",
        "accumulated passes",
        f"Steps on gradients and factors of {PASSES} passes, in the memory of one, are fewer than those on one.",
        f"{KFAC_PAPER}, section 13: larger batches",
        undecided(f"They see {PASSES} times the samples, but near the start noise is not what limits a step."),
    ),
    Ingredient(
        "autocast",
        "autocast and loss scaling",
        "Passes under autocast, with a scaled loss, need at most a tenth more steps.",
        "Micikevicius et al. 2018, section 3",
        supported("Their round-off is small beside the noise of a batch; factors and inverses keep full precision."),
        SLIGHT,
        "A step of K-FAC from a pass under autocast takes less time than one in full precision.",
        undecided("It pays where products in half precision are faster, on large layers."),
    ),
    Ingredient(
        "plain",
        "plain output layer",
        "Leaving the output layer to the plain gradient needs at most a tenth more steps.",
        "practice with many classes, whose factor is the largest; no paper",
        undecided(
            "The other layers' curvature may do, but the output layer then moves at their rate without their damping."
        ),
        SLIGHT,
        "A step of K-FAC that leaves the output layer to the plain gradient takes less time than one on all layers.",
        supported("It makes no factors and inverses there."),
        group="exploration",
    ),
    Ingredient(
        "default-clipped",
        "by default: trust region",
        "By default, the trust region needs fewer steps than none.",
        f"{TRUST_PAPER}, section 5",
        undecided("It keeps the first steps, from a curvature of few batches, short; later it may cost steps."),
        lacking=f"{DEFAULT}-unclipped",
    ),
    Ingredient(
        "default-adapted",
        "by default: adapted damping",
        "By default, Levenberg–Marquardt damping needs fewer steps than the damping that it starts with.",
        f"{KFAC_PAPER}, section 6.5",
        undecided(
            "Where it starts follows from the first gradient, and nobody knows how far that is from what serves."
        ),
        lacking=f"{DEFAULT}-steady",
    ),
    Ingredient(
        "default-split",
        "by default: split damping",
        "By default, but with inverses of every batch, split damping needs fewer steps than damping of the product.",
        f"{KFAC_PAPER}, section 6.3",
        undecided("It damps more at equal ρ, which adapts to that."),
        lacking=f"{DEFAULT}-product",
    ),
    Ingredient(
        "default-rare",
        "by default: rare inverses",
        "By default, inverses that are made rarely, layers in turn, need at most a tenth more steps.",
        f"{KFAC_PAPER}, section 8",
        supported("The averaged factors change slowly."),
        SLIGHT,
        "A step of natural gradient by default takes less time than one with inverses of every batch.",
        supported("Inverses are most of what the method adds to a step on small layers."),
        lacking=f"{DEFAULT}-fresh",
    ),
)


def compared(config: Config) -> list[Ingredient]:
    """Return the ingredients whose two methods take part."""
    present = {method.name for method in entrants(config)}
    return [one for one in INGREDIENTS if {one.method, one.without} <= present]
