"""The panels of the isotropy analysis' figures, each one relation between stored measurements and their prediction."""

import contextlib

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analyses.ntk_isotropy.points import LEFT
from analyses.ntk_isotropy.setting import SIGMAS
from curvlab.study import style
from curvlab.study.panels import (
    DASHED,
    NEUTRAL,
    NotStored,
    at_base,
    by_structure,
    groups,
    inverse_root,
    level,
    note,
    predicted,
    take,
    width_axis,
)

LOWEST = 1e-17
"""Where a logarithmic axis shows zero: below any round-off."""
FLOOR = 1e-3
"""Where the logarithm of |1 − αη| is cut at αη = 1."""
RING = 7.5
"""Size of empty markers that surround others, in printer's points."""
LABEL = 0.45
"""Least distance between labels of depths, in decades."""


def scale_against_depth(axes: Axes, measurements: pd.DataFrame) -> None:
    """α = tr M/R against depth at the smallest width: measured, derived (lines), published for K-FAC (dashed)."""
    axes.set_yscale("log")
    table = take(measurements, "response", "alpha_predicted", kind="exact")
    table = at_base(table[table["width"] == table["width"].min()], "activation", "outputs")
    depths = take(measurements, "response", "layer_alpha").groupby("cell")["layer"].max()
    cells = tuple(table["cell"])

    def against_depth(quantity: str, **where: str) -> pd.DataFrame:
        found = take(measurements, "response", quantity, cell=cells, **where)
        return found.assign(depth=found["cell"].map(depths))

    theory = against_depth("alpha_predicted")
    by_structure(axes, against_depth("alpha"), "depth", theory=theory, separation=1.0)
    with contextlib.suppress(NotStored):
        published = against_depth("alpha_published", structure="kfac")
        predicted(axes, published, "depth", "kfac")
        axes.get_lines()[-1].set_linestyle(DASHED)
        middle = published.sort_values("depth").iloc[len(published) // 2]
        note(axes, middle["depth"], middle["value"], "published: $NL$", ha="right", xytext=(-2, 4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="depth $L$ (layers)", ylabel=r"scale $\alpha = \mathrm{tr}\,M/R$")


def anisotropy_against_width(axes: Axes, measurements: pd.DataFrame) -> None:
    """‖M − ᾱI‖_F/‖ᾱI‖_F against width; band: what round-off does to the layer-wise family; dashed: what width 4096 leaves."""
    axes.set_yscale("log")
    table = at_base(take(measurements, "response", "anisotropy", kind="exact"))
    with contextlib.suppress(NotStored):
        descent = at_base(take(measurements, "gradient-descent", "anisotropy"))
        table = pd.concat([table, descent.assign(structure="gradient-descent")])
    widths = width_axis(axes, table)
    table = table.assign(value=table["value"].clip(lower=LOWEST))
    by_structure(axes, table, "width")
    level(axes, LEFT)
    with contextlib.suppress(NotStored):
        bound = at_base(take(measurements, "response", "distance", structure=tuple(SIGMAS)))["tolerance"].max()
        bottom = table["value"].min() / 10
        axes.axhspan(bottom, bound, color="#ededed", zorder=0)
        axes.set_ylim(bottom=bottom)
        note(axes, widths[0], bound, "round-off × condition number", va="top", xytext=(-12, -3))
    axes.set(ylabel=r"anisotropy  $\|M-\bar\alpha I\|_F\,/\,\|\bar\alpha I\|_F$")


def unit_wise_scale(axes: Axes, measurements: pd.DataFrame) -> None:
    """Unit-wise tr M/R over the published γ(L−1)M against width, for one output and for several."""
    table = take(measurements, "response", "alpha_over_published", structure="unit-wise", kind="exact")
    table = at_base(table, "activation")
    widths = width_axis(axes, table)
    for count, group in groups(table, "outputs"):
        outputs = max(1, int(count))
        style.theory(axes, [0.8 * widths[0], 1.25 * widths[-1]], [1 / outputs] * 2, "unit-wise")
        style.measured(axes, group, "width", "unit-wise", label="", hollow=outputs > 1)
        between = float(np.sqrt(widths[0] * widths[min(1, len(widths) - 1)]))
        note(axes, between, 1 / outputs, f"$1/C$ at $C={outputs}$", ha="center", va="top", xytext=(0, -4))
    axes.set(ylabel=r"$\mathrm{tr}\,M/R$ over $\gamma(L-1)M$")
    axes.set_ylim(bottom=0)


def unit_wise_spread(axes: Axes, measurements: pd.DataFrame) -> None:
    """Relative standard deviation of the unit-wise diag M over samples against width."""
    axes.set_yscale("log")
    table = at_base(take(measurements, "response", "spread", structure="unit-wise", kind="exact"))
    width_axis(axes, table)
    style.measured(axes, table, "width", "unit-wise", label="")
    inverse_root(axes, table)
    axes.set(ylabel="std / mean of diag $M$")


def residual_against_rate(axes: Axes, measurements: pd.DataFrame) -> None:
    """Training residual after one step against αη, at the width at which αη was swept."""
    axes.set_yscale("log")
    width = _rate_width(measurements)
    table = at_base(take(measurements, "steps", "residual", run="network", step=1, width=width))
    rates = np.linspace(0, 1.08 * table["scale"].max(), 600)
    theory = np.maximum(np.abs(1 - rates), FLOOR)
    axes.plot(rates, theory, color=NEUTRAL, label="theory for all", zorder=2)
    level(axes, 1.0)
    by_structure(axes, table, "scale", separation=2.2)
    axes.set_ylim(bottom=min(0.03, float(table["value"].min()) / 1.5))
    title = f"$M={width}$" if width else ""
    axes.set(xlabel=r"step size $\alpha\eta$", ylabel=r"residual  $\|f_1-y\|\,/\,\|f_0-y\|$", title=title)


def against_width(
    axes: Axes,
    measurements: pd.DataFrame,
    experiment: str,
    quantity: str,
    ylabel: str,
    *,
    theory: str = "",
    **at: object,
) -> None:
    """A quantity of every structure, or of gradient descent, against width, with predictions (lines) or the slope −1/2."""
    axes.set_yscale("log")
    table = at_base(take(measurements, experiment, quantity, **at))
    if experiment == "gradient-descent":
        table = table.assign(structure=experiment)
    width_axis(axes, table)
    by_structure(axes, table, "width", theory=at_base(take(measurements, experiment, theory, **at)) if theory else None)
    if not theory:
        inverse_root(axes, table)
    axes.set(ylabel=ylabel)


def loss_against_step(axes: Axes, measurements: pd.DataFrame, *, loss: str, scale: float) -> None:
    """Training or test loss against steps at a given αη: networks as points, theory as lines.

    The training loss is relative to that at initialisation. The width is the one at which αη was swept.
    """
    axes.set_yscale("log")
    quantity = "residual" if loss == "training" else f"{loss}_loss"
    table, theory = (
        at_base(take(measurements, "steps", name, run="network", width=_rate_width(measurements), scale=scale))
        for name in (quantity, f"{quantity}_predicted")
    )
    lowest = float(table["value"].min())
    if loss == "training":
        table, theory = _loss_from_residual(table), _loss_from_residual(theory)
        lowest **= 2
        common = theory.groupby("step")["value"].mean()
        axes.plot(common.index, common, color=NEUTRAL, label="theory for all", zorder=2)
    by_structure(axes, table, "step", theory=theory if loss == "test" else None, separation=2.2)
    axes.set_ylim(bottom=lowest / 3)
    axes.set_xticks(sorted(table["step"].unique()))
    ylabel = r"training loss  $\mathcal{L}_t/\mathcal{L}_0$" if loss == "training" else "test loss"
    axes.set(xlabel="step $t$", ylabel=ylabel, title=rf"$\alpha\eta={scale:g}$")


def _rate_width(measurements: pd.DataFrame) -> int:
    """The width at which αη was swept."""
    table = take(measurements, "steps", "residual")
    return max((rows["scale"].nunique(), int(width)) for width, rows in groups(table, "width"))[1]


def _loss_from_residual(table: pd.DataFrame) -> pd.DataFrame:
    """Losses relative to that at initialisation, which is step 0, from relative residuals."""
    start = table.drop_duplicates(["structure", "seed"]).assign(step=0.0, value=1.0)
    return pd.concat([start, table.assign(value=table["value"].clip(lower=1e-9) ** 2)])


def damped_loss(axes: Axes, measurements: pd.DataFrame) -> None:
    """Loss ratio of one exact step at η = 1 against damping, for the network and its linearisation."""
    axes.set(xscale="log", yscale="log")
    runs = {run: take(measurements, "damping", "loss_ratio", run=run) for run in ("network", "linearised")}
    predicted(axes, runs["linearised"], "rho_relative", "full", y="predicted", label="theory")
    rings = style.measured(axes, runs["linearised"], "rho_relative", "full", label="linearised", hollow=True)
    rings.lines[0].set_markersize(RING)
    style.measured(axes, runs["network"], "rho_relative", "full", label="network")
    axes.set(xlabel=r"damping $\rho/\lambda_{\max}(\Theta)$", ylabel=r"loss ratio  $\mathcal{L}_1/\mathcal{L}_0$")


def damped_tridiagonal_scale(axes: Axes, measurements: pd.DataFrame) -> None:
    """Scale of the damped block-tridiagonal response over its limit against ρ; hollow: depths the paper excludes."""
    _damped_tridiagonal(axes, measurements, "damped_alpha_ratio")
    level(axes, 1.0)
    axes.set(ylabel=r"scale  $\mathrm{tr}\,M(\rho)/(\alpha R)$")


def damped_tridiagonal_anisotropy(axes: Axes, measurements: pd.DataFrame) -> None:
    """Distance of the damped block-tridiagonal response from αI against ρ; hollow: depths the paper excludes."""
    axes.set_yscale("log")
    table = _damped_tridiagonal(axes, measurements, "damped_anisotropy")
    least = float(table["rho_relative"].min())
    means = {depth: rows["value"].mean() for depth, rows in groups(table[table["rho_relative"] == least], "depth")}
    depths = sorted(means, key=lambda depth: means[depth])
    ends = np.log10([means[depth] for depth in depths])
    steps = LABEL * np.arange(len(ends))
    places = np.maximum.accumulate(ends - steps) + steps
    places += np.mean(ends - places)
    for depth, place in zip(depths, places, strict=True):
        note(axes, least, 10**place, f"{depth:g}", ha="right", va="center", xytext=(-6, 0))
    axes.margins(x=0.15)
    axes.set_ylim(bottom=10 ** (places[0] - LABEL))
    axes.set(ylabel=r"$\|M(\rho)-\alpha I\|_F\,/\,\|\alpha I\|_F$", title="numbers: depth $L$")


def _damped_tridiagonal(axes: Axes, measurements: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Draw a quantity against ρ at every depth, and return its measurements."""
    table = take(measurements, "tridiagonal", quantity)
    axes.set_xscale("log")
    for depth, group in groups(table, "depth"):
        excluded = depth % 3 == 2
        label = "depth excluded by the paper" if excluded else "depth covered"
        points = style.measured(axes, group, "rho_relative", "block-tridiagonal", label=label, hollow=excluded)
        axes.plot(*points.lines[0].get_data(), color=points.lines[0].get_color(), linewidth=0.5, zorder=1)
    axes.set(xlabel=r"damping $\rho/\lambda_{\max}(\Theta)$")
    return table


def moved_layers(axes: Axes, measurements: pd.DataFrame) -> None:
    """Norm of the undamped block-tridiagonal step in every layer, relative to the layer that moves most."""
    table = take(measurements, "tridiagonal", "moved")
    with contextlib.suppress(NotStored):
        table = pd.concat([table, take(measurements, "tridiagonal", "moved_though_still")])
    table = table.assign(value=np.log10(table["value"].clip(lower=LOWEST)))
    grid = table.pivot_table(index="depth", columns="layer", values="value")
    axes.imshow(grid, cmap="Oranges", vmin=-16, vmax=0, aspect="auto")
    for (row, column), value in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(value):
            text = f"{10**value:.2g}" if value > -3 else f"$10^{{{value:.0f}}}$"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if value > -3 else "black")
    axes.set_xticks(range(grid.shape[1]), [f"{layer:g}" for layer in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [f"{depth:g}" for depth in grid.index])
    axes.grid(visible=False)
    axes.set(xlabel="layer $l$", ylabel="depth $L$ (layers)", title="norm of the step in layer $l$")


def kfac_layers(axes: Axes, measurements: pd.DataFrame) -> None:
    """Scale of every layer's K-FAC response: derived N, …, N, 1 (line), published N throughout (dashed).

    At the greatest depth with one output and the smallest width, and with several outputs (hollow) and a width above NC.
    """
    axes.set_yscale("log")
    table = at_base(take(measurements, "response", "layer_alpha", structure="kfac", kind="exact"), "activation")
    one = at_base(table[table["width"] == table["width"].min()], "outputs")
    one = one[one["depth"] == one["depth"].max()]
    layers = sorted(one["layer"].unique())
    if len(layers) < 2:
        raise NotStored("A layer besides the last")
    samples = round(float(one.loc[one["layer"] < layers[-1], "value"].median()))
    derived = style.theory(axes, layers, [*(samples for _ in layers[1:]), 1.0], "kfac", label="derived")
    derived.set_drawstyle("steps-mid")
    style.measured(axes, one, "layer", "kfac")
    for outputs, several in groups(table[table["outputs"] > one["outputs"].max()], "outputs"):
        label = f"K-FAC, $C={outputs:g}$, $L={several['layer'].max():g}$"
        style.measured(axes, several, "layer", "kfac", shift=4.0, label=label, hollow=True)
    level(axes, samples)
    note(axes, layers[-1], samples, "published: $N$", ha="right", xytext=(4, 3))
    axes.set_xticks(layers)
    axes.set(xlabel="layer $l$", ylabel=r"scale $\alpha_l$ of the layer", ylim=(0.5, 3 * samples))


def leverages(axes: Axes, measurements: pd.DataFrame) -> None:
    """First-layer K-FAC response of every sample against N × leverage; the cross: after a Forster transform."""
    table = take(measurements, "inputs", "leverage_response")
    ends = [0.0, 1.08 * float(table["predicted"].max())]
    style.theory(axes, ends, ends, "kfac")
    for inputs, group in table.groupby("inputs", sort=False):
        group = group.assign(predicted=group.groupby("sample")["predicted"].transform("mean"))
        if inputs == "raw":
            style.measured(axes, group, "predicted", "kfac")
            continue
        mean = group.groupby("seed", as_index=False)[["predicted", "value"]].mean()
        mean["predicted"] = mean["predicted"].mean()
        label = "K-FAC, Forster transform, all samples"
        points = style.measured(axes, mean, "predicted", "kfac", label=label, hollow=True)
        points.lines[0].set(markersize=9, zorder=4, markeredgecolor=NEUTRAL)
    axes.set(xlabel="$N$ × leverage of the sample", ylabel="response of layer 1", xlim=ends, ylim=ends)


def kfac_inputs(axes: Axes, measurements: pd.DataFrame) -> None:
    """Anisotropy of the whole K-FAC response: wide, and where a factor is short of rank."""
    axes.set_yscale("log")
    table = take(measurements, "inputs", "total_anisotropy")
    with contextlib.suppress(NotStored):
        wide = at_base(take(measurements, "response", "anisotropy", structure="kfac", kind="exact"))
        wide = wide[wide["width"].isin(table["width"])]
        table = pd.concat([table, wide.assign(inputs="wide")])
    names = {"wide": "wide", "forster": "low rank,\nForster", "raw": "low\nrank", "narrow": "narrow\nlayers"}
    positions = {name: index for index, name in enumerate(names)}
    table = table.assign(position=table["inputs"].map(positions), value=table["value"].clip(lower=LOWEST))
    style.measured(axes, table, "position", "kfac")
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set(ylabel="anisotropy of $M$", xlim=(-0.5, len(names) - 0.5))


def _cross_entropy(measurements: pd.DataFrame, quantity: str, rank: int) -> tuple[int, pd.DataFrame]:
    """The rank-th number of classes and its rows, at the smallest width."""
    table = take(measurements, "cross-entropy", quantity)
    table = table[table["width"] == table["width"].min()]
    classes = sorted(table["outputs"].unique())
    if rank >= len(classes):
        raise NotStored("Cross-entropy with more classes")
    return int(classes[rank]), table[table["outputs"] == classes[rank]]


def cross_entropy_loss(axes: Axes, measurements: pd.DataFrame, *, rank: int) -> None:
    """Cross-entropy against steps of exact natural gradient, and Newton's method per sample (lines)."""
    axes.set_yscale("log")
    classes, table = _cross_entropy(measurements, "loss", rank)
    _, theory = _cross_entropy(measurements, "loss_predicted", rank)
    _variants(axes, table)
    for eta, line in groups(theory[theory["fisher"] == "exact"], "eta"):
        predicted(axes, line, "step", "full", label="theory: Newton per sample")
        last = line[line["step"] == line["step"].max()]
        note(axes, last["step"].iloc[0], last["value"].mean(), f"η = {eta:g}", va="center", xytext=(7, 0))
    axes.set(xlabel="step $t$", ylabel="training cross-entropy (nats)", title=f"{classes} classes")


def cross_entropy_ratio(axes: Axes, measurements: pd.DataFrame, *, rank: int) -> None:
    """Ratio of the cross-entropy per step, and its limit e^{−η} (dashed)."""
    _, table = _cross_entropy(measurements, "loss_ratio", rank)
    steps = [float(table["step"].min()) - 0.3, float(table["step"].max()) + 0.3]
    _variants(axes, table)
    for eta in sorted(table["eta"].unique()):
        level(axes, float(np.exp(-eta)))
        note(axes, steps[1], float(np.exp(-eta)), f"$e^{{-{eta:g}}}$", va="center", xytext=(4, 0))
    axes.set(xlabel="step $t$", ylabel="loss ratio of the step", xlim=steps, ylim=(0, 1))


def _variants(axes: Axes, table: pd.DataFrame) -> None:
    """Exact steps as filled points, damped ones as rings around them, those without H as empty points."""
    for fisher, label, size in (
        ("damped", "with $H$, published damping", RING),
        ("exact", "with $H$", 4.0),
        ("unweighted", "without $H$", 4.0),
    ):
        for _, group in groups(table[table["fisher"] == fisher], "eta"):
            points = style.measured(axes, group, "step", "full", label=label, hollow=fisher != "exact")
            points.lines[0].set_markersize(size)


def modes(axes: Axes, measurements: pd.DataFrame) -> None:
    """Contraction of the leading modes over ten gradient-descent steps at η = 1/λ_max, at the largest width."""
    table = take(measurements, "gradient-descent", "mode_ratio", run="network")
    table = at_base(table[table["width"] == table["width"].max()])
    predicted(axes, table, "mode", "gradient-descent", y="predicted", label="theory $(1-\\eta\\lambda_i)^{10}$")
    style.measured(axes, table, "mode", "gradient-descent")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="mode $i$ of $\\Theta$", ylabel="contraction in 10 steps")


def edge_of_stability(axes: Axes, measurements: pd.DataFrame) -> None:
    """Training residual against steps near interpolation, at αη on both sides of 2 (lines: |1 − αη|^t)."""
    axes.set_yscale("log")
    table = take(measurements, "stability", "residual")
    start = table[table["step"] == 0].groupby("cell")["value"].mean()
    table = table.assign(value=(table["value"] / table["cell"].map(start)).clip(lower=LOWEST))
    steps = np.unique(table["step"])
    for rate, rows in groups(table[table["rate"] > 1.5], "rate"):
        law = abs(1 - rate) ** steps
        axes.plot(steps, law, color=NEUTRAL, zorder=2)
        note(axes, steps[-1], law[-1], f"{rate:g}", va="center", xytext=(8, 0))
        by_structure(axes, rows, "step", hollow=rate < 2)
    title = r"$\alpha\eta$: filled above 2, empty below"
    axes.set(xlabel="step $t$", ylabel=r"residual  $\|f_t-y\|\,/\,\|f_0-y\|$")
    axes.set_title(title, fontsize=7)


def sharpness(axes: Axes, measurements: pd.DataFrame) -> None:
    """λ_max of the preconditioned Fisher and Hessian over α."""
    names = {"fisher_top_over_alpha": r"$F^{-1}F$", "hessian_top_over_alpha": r"$F^{-1}H$"}
    for position, quantity in enumerate(names):
        table = take(measurements, "stability", quantity)
        by_structure(axes, table.assign(position=position), "position", separation=6.4)
    level(axes, 1.0)
    axes.set_xticks(range(len(names)), list(names.values()))
    low, high = axes.get_ylim()
    axes.set(ylabel=r"$\lambda_{\max}/\alpha$", xlim=(-0.5, len(names) - 0.5), ylim=(min(low, 0.97), max(high, 1.03)))


def positivity(axes: Axes, measurements: pd.DataFrame) -> None:
    """Decades by which λ_min(Θ_l) exceeds round-off in every layer, for distinct and duplicated inputs and narrow layers."""
    table = pd.concat([take(measurements, "positivity", quantity) for quantity in ("decades", "decades_last")])
    table = table[(table["inputs"] != "distinct") | (table["width"] == table["width"].max())]
    layers = int(table["layer"].max())
    ticks: dict[float, str] = {}
    for inputs, name in (("distinct", "distinct"), ("duplicated", "one input twice"), ("narrow", "$M=N/2$")):
        group = table[table["inputs"] == inputs]
        if group.empty:
            continue
        start = len(ticks) * (1 + 1 / layers)
        positions = start + group["layer"]
        ticks |= {position: f"{position - start:g}" for position in sorted(positions.unique())}
        style.measured(axes, group.assign(position=positions), "position", "block-diagonal", label="")
        note(axes, start + (layers + 1) / 2, 14, name, ha="center")
    level(axes, 0.0)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="layer $l$", ylabel=r"decades of $\lambda_{\min}(\Theta_l)$" "\nover round-off")
    axes.set(yticks=[-4, 0, 4, 8, 12], ylim=(-5, 16))
