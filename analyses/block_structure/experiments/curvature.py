"""Maps by blocks, products, steps and spectra of networks in training (claims 1, 2, 4, 5, 6 and 10)."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from analyses.block_structure import spectra
from analyses.block_structure.config import EMPIRICAL, GGN, HESSIAN, MATRICES, Config
from analyses.block_structure.measure import measure
from analyses.block_structure.points import ADAM, DERIVED, END, FAILS, MINI, START, correlation, page, quotient, too_few
from analyses.claims import claim
from curvlab.study import (
    Claim,
    Equivalence,
    Expected,
    Experiment,
    Inequality,
    Share,
    Wins,
    among,
    by_seed,
    difference_by_seed,
    geometric_by_seed,
    needs_several,
    slope_by_seed,
    supported,
    undecided,
)  # fmt: skip
from curvlab.study import Point as Place
from curvlab.study.claims import Group

VECTORS = ("random", "gradient", "top")
FAILING = 0.5
"""A relative error of order one, fixed beforehand."""
POOR = 0.87
"""A poor alignment: √(1 − FAILING²), what random directions have at that error."""
RACED = (6, 8, 12)
"""Widths of the networks that race."""


def cells(config: Config) -> list[Place]:
    """All problems as they are, and the first one at other depths and widths."""
    found: list[dict[str, object]] = [{"problem": problem} for problem in config.compared]
    found += [{"problem": config.problem, "depth": depth} for depth in config.depths]
    found += [{"problem": config.problem, "width": width} for width in config.widths]
    if config.races:
        found += [{"problem": problem, "width": width} for problem in config.compared for width in RACED]
    points: list[Place] = []
    for point in found:
        wanted = {"depth": 0, "width": 0} | point
        sizes = {key: value for key, value in wanted.items() if isinstance(value, int)}
        dense = config.dense(str(point["problem"]), **sizes)
        points.append(wanted | {"dense": dense, "first": point == {"problem": config.problem}})
    return points


def _claims(config: Config) -> list[Claim]:
    own: Mapping[str, object] = {"first": True}
    formed: Mapping[str, object] = {"first": True, "dense": True}
    compared: Mapping[str, object] = {"problem": config.compared, "depth": 0, "width": 0, "dense": True}
    return [
        *_failing(own),
        *_random(own),
        *_stepping(formed, compared),
        *(one for other in config.compared[1:] for one in _heterogeneous(config.problem, other, compared)),
        *_scale(formed, compared),
        *_dense_blocks(formed),
        *_sweeps(config.problem),
    ]


def _failing(own: Mapping[str, object]) -> list[Claim]:
    what = {"random": "random directions", "gradient": "the gradient", "top": "the three leading eigenvectors"}
    words = {HESSIAN: "the Hessian", GGN: "the Gauss–Newton matrix", EMPIRICAL: "the empirical Fisher matrix"}
    claims = []
    for matrix in MATRICES:
        group = "paper" if matrix == HESSIAN else "exploration"
        for vectors in VECTORS:
            expected = (
                supported("Published for models of up to 100 billion parameters.")
                if matrix == HESSIAN
                else undecided("Published of the Hessian alone; rows of like layers make the share large.")
            )
            claims.append(claim(
                f"{matrix}-error-{vectors}", page(FAILS, 1),
                Inequality("product_error", "greater", FAILING, centre="geometric mean"),
                f"After training, products of {words[matrix]} with {what[vectors]} are off by more than half if only the "
                "blocks of layers are kept.",
                "‖(C − BD)v‖/‖Cv‖, root of the ratio of mean squares; partition: layers.", expected, group=group, at=own,
                estimate=among(geometric_by_seed, matrix=matrix, vectors=vectors, time=END),
                bound_from="order one, fixed beforehand as more than a half",
            ))  # fmt: skip
        if matrix == HESSIAN:
            claims += [claim(
                f"{matrix}-alignment-{vectors}", page(FAILS, 1), Inequality("alignment", "less", POOR, centre="mean"),
                f"After training, products of {words[matrix]} with {what[vectors]} are poorly aligned with those of the blocks "
                "of layers.", "Mean cos(Cv, BD v); partition: layers.",
                supported("Published for models of up to 100 billion parameters."), group="paper", at=own,
                estimate=among(by_seed, matrix=matrix, vectors=vectors, time=END),
                bound_from="√(1 − ½²), what random directions have at an error of a half",
            ) for vectors in VECTORS]  # fmt: skip
    return claims


def _random(own: Mapping[str, object]) -> list[Claim]:
    return [
        *(claim(
            f"random-error-{matrix}", page(DERIVED, 2), Equivalence("error_ratio", 1.0, 0.1, centre="geometric mean"),
            f"Of the {matrix} matrix the squared error at random directions is the off-block share ω.",
            "Ratio of the two, from products and from the map, over all times; partition: layers.",
            supported("E‖Av‖² = ‖A‖_F²."), group="self-check", at=own, estimate=among(geometric_by_seed, matrix=matrix),
            bound_from="several standard errors of the directions",
        ) for matrix in MATRICES),
        *(claim(
            f"random-alignment-{matrix}", page(DERIVED, 2),
            Equivalence("alignment_ratio", 1.0, 0.1, centre="geometric mean"),
            f"Of the {matrix} matrix the mean cosine at random directions is √(1 − ω).",
            "Ratio of the two over all times; partition: layers.",
            undecided("It concentrates where many eigenvalues count; a few large ones leave a spread, and with it a bias."),
            group="derived", at=own, estimate=among(geometric_by_seed, matrix=matrix),
        ) for matrix in MATRICES),
    ]  # fmt: skip


def _stepping(formed: Mapping[str, object], compared: Mapping[str, object]) -> list[Claim]:
    over = "over the networks and three times of training"
    return [
        claim("step-gain", page(DERIVED, 4), Inequality("step_gain", "greater", 0.5, centre="geometric mean"),
              "After training, the step with the blocks of layers lowers the loss by at least half of what the full step does.",
              "Ratio of the decreases of the network's own loss, Gauss–Newton matrix, η = 1, each at its best damping.",
              undecided("The error of the matrix is of order one; whether the step's is, is the question."),
              group="exploration", at=formed, estimate=among(geometric_by_seed, time=END)),
        claim("share-predicts-step", page(DERIVED, 4),
              Inequality(("matrix_share", "step_cosine"), "less", -0.5, centre="mean"),
              f"The larger the off-block share of layers is, the farther is their step from the full one, {over}.",
              "Rank correlation of ω with the steps' cosine, Gauss–Newton matrix, each step at its best damping.",
              undecided("In the undamped limit equal kernels have ω = 1 − 1/B and a cosine of 1."), group="derived",
              at=compared, estimate=correlation("matrix_share", "step_cosine", "problem", "time"),
              assumptions=too_few(("problem", "time"))),
        claim("share-predicts-anisotropy", page(DERIVED, 4),
              Inequality(("matrix_share", "anisotropy"), "greater", 0.5, centre="mean"),
              f"The larger the off-block share of layers is, the less isotropic is their response, {over}.",
              "Rank correlation of ω with ‖M − ᾱI‖/‖ᾱI‖ at the best damping of their step, Gauss–Newton matrix.",
              undecided("Undamped the response is B·I whatever ω is."), group="derived",
              at=compared, estimate=correlation("matrix_share", "anisotropy", "problem", "time"),
              assumptions=too_few(("problem", "time"))),
    ]  # fmt: skip


def _heterogeneous(first: str, other: str, compared: Mapping[str, object]) -> list[Claim]:
    published = "Difference of JS⁰, mean distance of linear densities with the published smoothing, exact eigenvalues"
    logarithmic = "Difference of mean distances of densities of log|λ| with a smoothing of 0.3 decades"
    paper = (
        supported("Published of transformers against convolutional networks.")
        if "cnn" in other
        else undecided("Published against convolutional networks only.")
    )
    variants: list[tuple[str, str, str, Expected, Group, Mapping[str, object]]] = [
        ("hessian", "Hessian's spectra of tensors", published, paper, "paper", _distance(HESSIAN, "linear")),
        ("ggn", "Gauss–Newton matrix' spectra of tensors", published,
         undecided("Published of the Hessian."), "exploration", _distance(GGN, "linear")),
        ("matrices", "Hessian's spectra of tensors that are matrices, without biases and normalisations,", published,
         undecided("Published runs have no biases; normalisations are in theirs."), "exploration", {"matrix": HESSIAN}),
        ("log", "Hessian's spectra of tensors, by densities of log|λ|,", logarithmic,
         undecided("The published smoothing tells scales apart, and little besides."), "exploration",
         _distance(HESSIAN, "log")),
        ("shape", "Hessian's spectra of tensors, each divided by its largest modulus,", logarithmic,
         undecided("What is left of the distance is shape."), "exploration", _distance(HESSIAN, "log", "top")),
    ]  # fmt: skip
    return [
        claim(f"heterogeneity-{name}-{other}", page(ADAM, 5 if measured is published else 6),
              Wins("distance_of_matrices" if name == "matrices" else "distance", "greater"),
              f"At initialisation the {words} are more unlike in {first} than in {other}.", f"{measured}.", expected, group=group,
              at={**compared, "problem": (first, other)},
              estimate=among(partial(difference_by_seed, column="problem", first=first, second=other), time=START, **where))
        for name, words, measured, expected, group, where in variants
    ]  # fmt: skip


def _distance(matrix: str, scale: str, normalised: str = "raw") -> dict[str, object]:
    """The rows of a distance."""
    smoothing = {"smoothing": spectra.WIDTH} if scale == "log" else {}
    return {"matrix": matrix, "scale": scale, "normalised": normalised, **smoothing}


def _scale(formed: Mapping[str, object], compared: Mapping[str, object]) -> list[Claim]:
    hessian = {"matrix": HESSIAN, "time": START, "scale": "log"}
    return [
        *(claim(
            f"scale-{by}", page(ADAM, 6), Inequality("distance", "less", 0.5, centre="geometric mean"),
            f"Dividing every tensor's spectrum by its {words} removes more than half of JS⁰.",
            "Distance after over before, Hessian at initialisation, densities of log|λ| with a smoothing of 0.3 decades.",
            undecided("Scale is what one learning rate a block removes; shape is what is left."), group="exploration",
            at=formed, estimate=among(quotient("normalised", by, "raw"), smoothing=spectra.WIDTH, **hessian),
        ) for by, words in (("trace", "trace norm"), ("top", "largest modulus"), ("tenth", "tenth largest modulus"))),
        claim("smoothing-order", page(ADAM, 6), Share("distance", "greater", 0.5),
              "The networks are in the same order of JS⁰ at smoothings of 0.1, 0.3 and 1 decade.",
              "Whether the three orders are one, Hessian at initialisation, densities of log|λ|.",
              undecided("JS⁰ depends on smoothing; its order may or may not."), group="exploration", at=compared,
              estimate=among(_same_order, normalised="raw", **hessian), assumptions=_two_problems),
        claim("queries-balanced", page(DERIVED, 6), Equivalence("distance_after", 1.0, 0.05, centre="geometric mean"),
              "Balancing queries and keys at initialisation leaves JS⁰ as it is, up to a twentieth.",
              "JS⁰ of log|λ| with ‖W_Q‖ = ‖W_K‖ in every head over that with the default; the function is the same.",
              supported("Both are initialised alike."), group="exploration", at=formed,
              estimate=among(by_seed, queries="balanced")),
        *(claim(
            f"queries-rescaled-{what}", page(DERIVED, 6), Inequality(f"{what}_after", "greater", 1.1, centre="geometric mean"),
            f"Queries by four and keys by a quarter, which leaves the function, change {words} by more than a tenth.",
            "The larger over the smaller of the two values, Hessian at initialisation.", expected, group="exploration",
            at=formed, estimate=among(_folded, queries="rescaled"),
        ) for what, words, expected in (
            ("share", "the off-block share of layers", undecided("Blocks of queries and keys are few of all.")),
            ("distance", "JS⁰ of log|λ|", undecided("They shift two spectra a block by 1.2 decades, of many.")),
        )),
    ]  # fmt: skip


def _folded(table: pd.DataFrame) -> pd.DataFrame:
    """A ratio or its inverse, whichever is larger."""
    found = geometric_by_seed(table)
    return found.assign(value=np.exp(np.abs(np.log(found["value"]))))


def _same_order(table: pd.DataFrame) -> pd.DataFrame:
    """1 at seeds at which the problems are in the same order at every smoothing, else 0."""
    found = {}
    for seed, group in table.groupby("seed"):
        wide = group.pivot_table("value", "smoothing", "problem")
        found[seed] = float(len({tuple(np.argsort(row)) for row in wide.to_numpy()}) == 1)
    return pd.DataFrame({"seed": list(found), "value": list(found.values())})


def _two_problems(table: pd.DataFrame) -> str | None:
    return None if len(set(table["problem"])) > 1 else "One network has no order; name others by --beside."


def _dense_blocks(formed: Mapping[str, object]) -> list[Claim]:
    words = {"head": "queries and keys by head", "neuron": "values, projections and perceptrons by neuron",
             "token": "embedding and output by token"}  # fmt: skip
    claims = []
    for kind, what in words.items():
        claims += [
            claim(f"dense-{kind}", page(MINI, 10), Inequality("within_permuted", "less", 1.0, centre="geometric mean"),
                  f"Cut {what}, matrices have less off-block share within them than cut into the same sizes at random.",
                  "Ratio of the two shares, the latter a mean over permutations; Hessian after training, geometric mean over "
                  "matrices.", supported("These are the dense sub-blocks, as published."), group="paper", at=formed,
                  estimate=among(geometric_by_seed, kind=kind), bound_from="no difference"),
            claim(f"outputs-{kind}", page(MINI, 10), Inequality("within_transposed", "less", 1.0, centre="geometric mean"),
                  f"Cut {what}, matrices have less off-block share within them than cut along their inputs.",
                  "Ratio of the two shares; Hessian after training, geometric mean over matrices.",
                  supported("Outputs, not inputs, are the published blocks."), group="paper", at=formed,
                  estimate=among(geometric_by_seed, kind=kind), bound_from="no difference"),
        ]  # fmt: skip
    return claims


def _sweeps(problem: str) -> list[Claim]:
    return [
        claim(f"share-{name}", page(FAILS, 1), Inequality("share", "greater", 0.0, centre="mean"),
              f"The off-block share of layers rises with {words} after training.",
              f"Slope of log ω against log {name}, Hessian.", undecided("Published as a matter of scale."), group="exploration",
              at={"problem": problem, name: lambda value: bool(value)},
              estimate=among(partial(slope_by_seed, against=name), matrix=HESSIAN, partition="layer", time=END),
              assumptions=needs_several(name, f"{name}s (--{name}s)"))
        for name, words in (("depth", "the depth (measured by --depths)"), ("width", "the width (measured by --widths)"))
    ]  # fmt: skip


CURVATURE: Experiment[Config] = Experiment(
    name="curvature",
    cells=cells,
    measure=measure,
    varies=("initialisation", "batches", "draws"),
    claims=_claims,
    seconds=5.0,
    memory=1.2e9,
)
