"""The panels of the block-structure figures, each one relation between stored measurements."""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analyses.block_structure.config import EMPIRICAL, GGN, HESSIAN, MATRICES
from analyses.block_structure.experiments.curvature import FAILING
from analyses.block_structure.experiments.finite_differences import PUBLISHED
from analyses.block_structure.points import END, MIDDLE, START, TIMES
from analyses.block_structure.quadratics import ALIKE, METHODS, MIXED, UNLIKE
from analyses.block_structure.spectra import NORMALISATIONS, WIDTH, WIDTHS
from curvlab.study import style
from curvlab.study.panels import DASHED, NEUTRAL, Rows, level, one_each, take

LOOKS = {
    HESSIAN: style.Look("#555555", ">", "Hessian"),
    GGN: style.Look("#0072B2", "s", "Gauss–Newton"),
    EMPIRICAL: style.Look("#D55E00", "o", "empirical Fisher"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
KINDS = {
    "head": ("#D55E00", "queries, keys"),
    "neuron": ("#0072B2", "other matrices"),
    "token": ("#009E73", "embedding, output"),
    "bias": ("#CC79A7", "biases"),
    "other": ("#999999", "normalisations"),
}
"""Colours of tensors by what Adam-mini cuts them by, and what they are."""


def _first(measurements: pd.DataFrame, quantity: str, **where: object) -> pd.DataFrame:
    """The observations of the network that claims are about."""
    return take(measurements, "curvature", quantity, first=True, **where)


def _compared(measurements: pd.DataFrame, quantity: str, **where: object) -> pd.DataFrame:
    """The observations of all networks as they are."""
    return take(measurements, "curvature", quantity, depth=0, width=0, **where)


def _problems(table: pd.DataFrame) -> dict[str, style.Look]:
    """Looks of networks, in the order in which they were measured."""
    names = list(dict.fromkeys(table["problem"]))
    return {name: style.Look(c, m, name) for name, c, m in zip(names, COLOURS, MARKERS, strict=False)}


def _by_problem(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the values of every network side by side at their places."""
    looks = _problems(table)
    for index, (problem, look) in enumerate(looks.items()):
        shift = 5 * (index - (len(looks) - 1) / 2)
        style.measured(axes, table[table["problem"] == problem], "place", look, shift=shift)


def block_map(axes: Axes, measurements: pd.DataFrame, *, matrix: str) -> None:
    """Share ‖C_bc‖²/‖C‖² of every pair of layers after training, mean over seeds, in powers of ten."""
    table = _first(measurements, "mass", matrix=matrix, time=END)
    grid = table.pivot_table("value", "row", "column").to_numpy()
    share = float(_first(measurements, "share", matrix=matrix, partition="layer", time=END)["value"].mean())
    image = axes.imshow(np.log10(grid.clip(min=1e-8)), cmap="viridis", vmin=-5, vmax=0)
    names = table.drop_duplicates("row").set_index("row")["layer"].sort_index()
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=4.5)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.set(title=rf"{LOOKS[matrix].label}, $\omega = {share:.2f}$", xlabel="layers")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
    bar.ax.tick_params(labelsize=5)


def short(layer: str) -> str:
    """A layer's name without what all modules of a kind share."""
    return ".".join(part for part in layer.split(".") if part != "branch")


def shares(measurements: pd.DataFrame) -> Rows:
    """One panel a network."""
    names = list(_problems(_compared(measurements, "share")))
    return one_each([partial(share_in_time, problem=name) for name in names])


def share_in_time(axes: Axes, measurements: pd.DataFrame, *, problem: str) -> None:
    """Off-block share ω at three times of training: filled of layers, hollow of units; dashed: an error of a half, ω = ¼."""
    table = _compared(measurements, "share", problem=problem)
    table = table.assign(place=table["time"].map({time: i for i, time in enumerate(TIMES)}))
    for index, matrix in enumerate(MATRICES):
        for partition, hollow in (("layer", False), ("unit", True)):
            rows = table[(table["matrix"] == matrix) & (table["partition"] == partition)]
            label = f"{LOOKS[matrix].label}, {partition}s"
            style.measured(
                axes, rows, "place", LOOKS[matrix], shift=8.0 * (index - 1) + 3.0 * hollow, label=label, hollow=hollow
            )
    level(axes, FAILING**2)
    axes.margins(x=0.25)
    axes.set_xticks(range(len(TIMES)), TIMES)
    axes.set_ylim(0, 1)
    axes.set(ylabel=r"off-block share $\omega$", title=problem)


def products(axes: Axes, measurements: pd.DataFrame) -> None:
    """Relative error of products after training if only layers' blocks are kept; dashed: a half."""
    table = _first(measurements, "product_error", time=END)
    order = {"random": 0, "gradient": 1, "top": 2}
    table = table.assign(place=table["vectors"].map(order))
    for index, matrix in enumerate(MATRICES):
        style.measured(axes, table[table["matrix"] == matrix], "place", LOOKS[matrix], shift=5.0 * (index - 1))
    level(axes, FAILING)
    axes.set_xticks(range(3), ["random", "gradient", "leading\neigenvectors"])
    axes.set_ylim(bottom=0)
    axes.set(ylabel=r"$\|(C-\mathrm{BD})v\|\,/\,\|Cv\|$")


def within(axes: Axes, measurements: pd.DataFrame) -> None:
    """Off-block share within matrices cut as Adam-mini does, over that of permuted cuts and of cuts along inputs; dashed: 1."""
    axes.set_yscale("log")
    for index, (what, look) in enumerate(
        {
            "permuted": style.Look("#0072B2", "s", "over permuted"),
            "transposed": style.Look("#D55E00", "o", "over inputs"),
        }.items()
    ):
        table = _first(measurements, f"within_{what}")
        table = table.assign(place=table["kind"].map({"head": 0, "neuron": 1, "token": 2}))
        style.measured(axes, table, "place", look, shift=6 * (index - 0.5))
    level(axes, 1.0)
    axes.set_xticks(range(3), ["heads", "neurons", "tokens"])
    axes.set(ylabel="ratio of shares within matrices")


def densities(measurements: pd.DataFrame) -> Rows:
    """One panel a network."""
    names = list(_problems(_compared(measurements, "density")))
    return one_each([partial(density, problem=name) for name in names])


def density(axes: Axes, measurements: pd.DataFrame, *, problem: str) -> None:
    """Densities of log₁₀|λ| of the Hessian's diagonal block of every tensor at initialisation; at the left: zero."""
    table = _compared(measurements, "density", problem=problem)
    table = table[table["seed"] == table["seed"].min()]
    for (kind, _), rows in table.groupby(["kind", "tensor"]):
        colour, label = KINDS[str(kind)]
        ordered = rows.sort_values("log10")
        axes.plot(ordered["log10"], ordered["value"], color=colour, label=label, linewidth=0.7, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-12, 1)
    axes.set(xlabel=r"$\log_{10}|\lambda|$", ylabel="density a decade", title=problem)


def distance_normalised(axes: Axes, measurements: pd.DataFrame) -> None:
    """JS⁰ of the Hessian's log densities of tensors as they are, and after division by trace, largest and tenth largest modulus."""
    table = _distances(measurements, smoothing=WIDTH)
    table = table.assign(place=table["normalised"].map({name: i for i, name in enumerate(NORMALISATIONS)}))
    _by_problem(axes, table)
    axes.set_xticks(range(len(NORMALISATIONS)), ["as it is", "by trace", "by top", "by tenth"])
    axes.set_ylim(0, 1)
    axes.set(ylabel="JS distance of tensors")


def distance_smoothed(axes: Axes, measurements: pd.DataFrame) -> None:
    """The same against the smoothing; at the left, detached, the linear densities with the published smoothing."""
    table = _distances(measurements, normalised="raw")
    published = _compared(measurements, "distance", matrix=HESSIAN, time=START, scale="linear")
    places = {width: i + 1 for i, width in enumerate(WIDTHS)}
    table = pd.concat([published.assign(place=0), table.assign(place=table["smoothing"].map(places))])
    _by_problem(axes, table)
    axes.set_xticks(range(len(WIDTHS) + 1), ["published", *(f"{width:g}" for width in WIDTHS)])
    axes.set_ylim(0, 1)
    axes.set(xlabel="smoothing (decades)", ylabel="JS distance of tensors")


def _distances(measurements: pd.DataFrame, **where: object) -> pd.DataFrame:
    return _compared(measurements, "distance", matrix=HESSIAN, time=START, scale="log", **where)


def step_against_share(axes: Axes, measurements: pd.DataFrame) -> None:
    """Cosine of the layers' step with the full one against the matrix error √ω: every network, seed and time (hollow: start)."""
    share, steps = (_compared(measurements, name) for name in ("matrix_share", "step_cosine"))
    looks = _problems(share)
    keys = ["problem", "seed", "time"]
    joined = share.merge(steps, on=keys, suffixes=("", "_step"))
    for (problem, time), rows in joined.groupby(["problem", "time"], sort=False):
        look = looks[str(problem)]
        face = "white" if time == START else look.color
        axes.plot(
            np.sqrt(rows["value"]), rows["value_step"], marker=look.marker, linestyle="none", color=look.color,
            markerfacecolor=face, markersize=3.5, label=look.label if time == END else "_", alpha=0.8 if time != MIDDLE else 0.4,
        )  # fmt: skip
    axes.set(xlabel=r"matrix error $\sqrt{\omega}$ of layers", ylabel="cosine of best steps")


def gain_of_steps(axes: Axes, measurements: pd.DataFrame) -> None:
    """Decrease of the loss by the layers' best step over that by the full one, at three times of training."""
    table = _compared(measurements, "step_gain")
    table = table.assign(place=table["time"].map({time: i for i, time in enumerate(TIMES)}))
    _by_problem(axes, table)
    level(axes, 1.0)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(TIMES)), TIMES)
    axes.set(ylabel="loss decrease / full step's")


def structures(axes: Axes, measurements: pd.DataFrame) -> None:
    """Cosine of every structure's best step with the full one against the error of its matrix, after training."""
    error, steps = (take(measurements, "structures", name) for name in ("matrix_error", "step_cosine"))
    for name in style.in_order(error["structure"].unique()):
        look = style.look(name)
        own = error["structure"] == name
        x, y = error.loc[own, "value"].mean(), steps.loc[steps["structure"] == name, "value"]
        table = pd.DataFrame({"error": x, "value": y.to_numpy(), "seed": steps.loc[y.index, "seed"].to_numpy()})
        style.measured(axes, table, "error", look)
    axes.set(xlabel=r"$\|\hat F-G\|_F\,/\,\|G\|_F$", ylabel="cosine of best steps")


def classes(axes: Axes, measurements: pd.DataFrame) -> None:
    """Off-block share against the number of classes at initialisation; line: 1/C of softmax regression."""
    table = take(measurements, "classes", "share")
    axes.set_yscale("log")
    counts = sorted(table["classes"].unique())
    style.log_ticks(axes, counts)
    axes.plot(counts, 1 / np.array(counts, dtype=float), color=NEUTRAL, label="$1/C$")
    for (blocks, label), colour, marker in zip(
        {"classes": "classes in the output", "hidden": "neurons in the hidden layer", "layers": "layers"}.items(),
        COLOURS, MARKERS, strict=False,
    ):  # fmt: skip
        style.measured(axes, table[table["blocks"] == blocks], "classes", style.Look(colour, marker, label))
    axes.set(xlabel="classes $C$", ylabel=r"off-block share $\omega$")


def quadratics(axes: Axes, measurements: pd.DataFrame) -> None:
    """Steps to a loss of 1e-6 of that at the start, on quadratics with unlike blocks, alike ones, and unlike ones mixed."""
    table = take(measurements, "quadratics", "steps")
    axes.set_yscale("log")
    table = table.assign(place=table["method"].map({name: i for i, name in enumerate(METHODS)}))
    labels = {UNLIKE: "unlike blocks", ALIKE: "alike blocks", MIXED: "unlike, mixed"}
    for index, ((spectra, label), colour, marker) in enumerate(zip(labels.items(), COLOURS, MARKERS, strict=False)):
        rows = table[table["spectra"] == spectra]
        style.measured(axes, rows, "place", style.Look(colour, marker, label), shift=4.0 * (index - 1))
    names = [
        name.replace("-fixed", "\nfixed").replace("adam-mini", "mini").replace("block-", "block\n") for name in METHODS
    ]
    axes.set_xticks(range(len(METHODS)), names, fontsize=6)
    axes.set(ylabel="steps")


def one_rate(axes: Axes, measurements: pd.DataFrame) -> None:
    """Test loss over AdamW's at AdamW's rate, by what has one second moment."""
    table = take(measurements, "one-rate", "test_loss")
    base = table[table["method"] == "adamw"].set_index("seed")["value"]
    table = table[table["method"] != "adamw"]
    table = table.assign(value=table["value"].to_numpy() / base.loc[table["seed"]].to_numpy())
    names = {"adam-mini": "Adam-mini", "tensor": "tensor", "random": "random\nblocks"}
    table = table.assign(place=table["method"].map({name: i for i, name in enumerate(names)}))
    style.measured(axes, table, "place", style.Look(COLOURS[0], "o", "test loss"), label="")
    level(axes, 1.0)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.margins(x=0.3)
    axes.set(ylabel="test loss over AdamW's")


def differences(axes: Axes, measurements: pd.DataFrame) -> None:
    """Relative error of a Hessian product by central differences against ε; dashed: the published best ε."""
    table = take(measurements, "differences", "difference_error")
    axes.set(xscale="log", yscale="log")
    for (name, epsilon), colour, marker in zip(PUBLISHED.items(), COLOURS, MARKERS, strict=False):
        rows = table[(table["arithmetic"] == name) & (table["value"] > 0)]
        if rows.empty:
            continue
        style.measured(axes, rows, "epsilon", style.Look(colour, marker, name))
        axes.axvline(epsilon, color=colour, linestyle=DASHED, linewidth=0.8, zorder=1)
    axes.set(xlabel=r"$\varepsilon$ over the length of $\theta$", ylabel="relative error")
