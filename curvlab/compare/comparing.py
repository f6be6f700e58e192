"""Which approximate Fisher behaves like the exact one on this model, and at which learning rate and damping?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from curvlab.compare.batches import randomness_kept, samples_of_batch, two_batches
from curvlab.compare.candidates import Candidate, Setting
from curvlab.compare.deadline import Deadline
from curvlab.compare.landscape import Landscape
from curvlab.compare.memory import Needs, allowed_memory, needs_of
from curvlab.compare.result import Comparison, record_of
from curvlab.fisher import Structure, make, of_theory
from curvlab.fisher.damping import Damping, absolute
from curvlab.rows.batches import Data
from curvlab.rows.loss import Kind, RowPer
from curvlab.rows.passes import Pass
from curvlab.rows.samples import NodeChoice
from curvlab.rows.sweep import PickOutput
from curvlab.tools.progress import progress as showing
from curvlab.tools.progress import say
from curvlab.tools.text import size

SMALL = 1 << 21
"""Entries `R·P` of the rows up to which costly structures are compared unasked."""

Structures = str | Structure | Sequence[str | Structure] | Mapping[str, Structure] | None
"""Keys of `curvlab.fisher.STRUCTURES`, structures, or structures by a name of one's own."""


def compare(
    model: nn.Module,
    loss: nn.Module,
    data: Data,
    structures: Structures = None,
    damping: Damping | Sequence[Damping] = ("rel:1e-3", "rel:1e-1"),
    *,
    kind: Kind = "exact",
    draws: int = 1,
    generator: torch.Generator | None = None,
    rows: RowPer | None = None,
    nodes: NodeChoice = None,
    output: PickOutput = None,
    steps: int = 4,
    seconds: float | int | None = 45,
    memory: int | str | None = None,
    progress: bool = False,
) -> Comparison:
    """Judge structures in function space on one batch, and by real steps from the present weights.

    **In the linearised model** a step `θ ← θ − η (F + ρI)⁻¹∇L` moves the outputs by the response. It is looked at in the metric
    of the loss, `M = S (F + ρI)⁻¹ Sᵀ` with S the exact rows, which for `HalfSquaredError` is `J (F + ρI)⁻¹ Jᵀ/N`. The undamped
    full matrix gives the projector P on the output directions that the loss weighs (all of them for squared errors, all but a
    common shift of the logits for a softmax), if the Jacobian has full row rank. What this says of learning rates holds for the
    first step of the linearised model only.

    **Real steps** say what holds for the model itself. Each candidate, a structure at a damping, takes one step at learning rates
    2·`eta_linear`, a half of it, a quarter, …; then several in a row, with the structure fitted anew before each, at `eta_batch`
    and halves of it, until the loss never rises above where it began and ends below; then ten in a row with the structure left as
    it is, without momentum and with 0.9. The candidates whose single steps did best come first. The model's weights, buffers,
    gradients and mode, random states and the order of the data stay as they are.

    Args:
        model: any module whose samples do not interact; it is left as it was found.
        loss: a module of `curvlab.rows.loss.LOSSES` or of one's own, see `curvlab.sqrt_fisher`.
        data: an iterable of batches such as a DataLoader, the first of which is measured and stepped on, while the loss of the
            second is only looked at; or one pair (inputs, targets), whose last half is held out as the second batch. A batch that
            cannot be halved, such as a graph, has no second one. An iterator loses what is taken of it.
        structures: a key of `curvlab.fisher.STRUCTURES`, a structure, several, or structures by names of your own. If None, all
            keys but those `of_optimiser`; and in large networks, where the rows have more than 2²¹ entries, only those that are not
            `costly`.
        damping: value or values of ρ, absolute or relative to each structure's λ_max ("rel:1e-3"), taken of each fit anew; 0 is
            the pseudo-inverse.
        kind: rows from which the structures are built; the response is always that of the exact rows.
        draws: random rows of a loss term, for "mc" and for signs.
        generator: source of the draws, required for them.
        rows: what a row stands for, where a sample has several loss terms: "term", "sample", "signs" or "batch", see
            `curvlab.sqrt_fisher`.
        nodes: of a graph, those that carry rows: a mask, indices, or a function of the inputs.
        output: which tensor of a structured output: a key, an attribute, an index or a function.
        steps: real steps in a row; 0 for the linearised model only, on all samples of a pair.
        seconds: after which nothing further is begun; what has been is finished. Structures that average, such as K-FAC, come
            first, and two fifths of the time are for steps in a row. No limit if None.
        memory: bytes that may be used, such as "2GiB"; those that are free if None. A structure that needs more is left out,
            with the reason in the table.
        progress: whether to show it on stderr, after a line that says how much there is to do.

    Returns:
        A `Comparison`: `print` shows it, `.table` has one row a candidate, `.steps` every real step, `.plot()` draws it, and
        `.best()` is the row whose step lowers the loss of the second batch most. Columns of `.table`:

        - `structure`, `damping` (as given), `rho` (absolute), `rho_rel` (ρ/λ_max of the structure);
        - `eta`: the learning rate up to `eta_repeated` whose single step lowers the loss of the second batch most, and `fall`, by
          how much;
        - `eta_repeated`: the largest tried rate that holds for several steps in a row, as said above; 0 if none does;
        - `eta_batch`, `eta_second`: the largest tried rate such that one step lowers the loss of the batch, and of the second
          one, at it and at all smaller ones; 0 if there is none;
        - `eta_linear`: 2/λ_max(M), below which the first step is stable in the linearised model;
        - `ratio`: real decrease of the batch's loss at `eta` over that of the quadratic model, `η g·d − ½ η² dᵀGd`, G the exact
          generalised Gauss-Newton matrix and d the step;
        - `momentum`: factor by which momentum 0.9 changes the largest rate that holds for ten steps with the structure left as it
          is: below 1 it has to be lowered;
        - `alpha`: tr M / tr P, the scale of the response; an isotropic one interpolates in one step at η = 1/α;
        - `anisotropy`: ‖M − αP‖_F / ‖αP‖_F, 0 for an isotropic response;
        - `cosine`: of the step with that of the full exact matrix at the same `damping`;
        - `lambda_max`: largest eigenvalue of M;
        - `rank`: eigenvalues of the structure above P·ε·λ_max in modulus, where its matrices are small enough to tell soon;
        - `seconds`: of building the structure and of one step, given the rows; `mib`: of what it holds from step to step in
          training; `peak_mib`: most of tensors at once while it is built and takes a step, beside the rows;
        - `note`: what was not measured, and why. Numbers that were not measured are NaN.

    Raises:
        ValueError: for an unknown structure, with the nearest suggested, and where the Fisher matrix or a structure is
            zero; others as `curvlab.sqrt_fisher`.
        MemoryError: where the rows and matrices of R × R do not fit; the message says how large they are.

    Cost: one exact sweep, one of `kind`, for every structure the response of R = V·N rows, memory R²; for every candidate at most
    15 forward passes a batch, then `steps − 1` sweeps and fits and at most 20 gradients for a learning rate that holds, mostly one
    for one that does not.
    """
    chosen, dampings = _chosen(structures), _dampings(damping)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is a whole number of real steps in a row, 0 for none, got {steps!r}.")
    deadline = Deadline(seconds)
    how = Pass(kind, draws, generator, nodes, output, keep_jacobian=False, rows=rows)
    exact = how if kind == "ggn" else replace(how, kind="exact", draws=1, generator=None, rows=None)
    with randomness_kept(data):
        batches = two_batches(data, loss, splits=nodes is None, wants_second=steps > 0)
        landscape = Landscape(model, loss, how)
        P = sum(w.numel() for w in landscape.here.values())
        allowed = allowed_memory(memory, next(iter(landscape.here.values())).device)
        total = samples_of_batch(batches.first, loss) if nodes is None else None
        needs = None if total is None else needs_of(landscape, batches.first, exact, total)
        if needs is not None:
            needs.check(allowed)
        if progress:
            say(Console(stderr=True), _estimate(len(chosen), len(dampings), P, needs, deadline))
        costs = {"rows": 1.0, **{name: float(len(dampings)) for name in chosen}}
        with showing(Console(stderr=True), costs, not progress, unit="pieces") as advance:
            left = allowed if allowed is None or needs is None else allowed - needs.total
            setting = Setting.begin(landscape, batches, exact, dampings, steps, deadline, left)
            advance("rows", "formed", False)
            small = structures is not None or setting.exact.R * setting.exact.P <= SMALL
            measured: dict[str, list[Candidate]] = {}
            for name, structure in sorted(chosen.items(), key=lambda item: not item[1].averages):
                left_out = "" if small or not structure.costly else "costly at this size, and not named in structures="
                measured[name] = found = setting.measure(name, structure, left_out)
                advance(name, "; ".join(found[0].notes) or "response measured", bool(found[0].notes))
            candidates = [candidate for name in chosen for candidate in measured[name]]
        if steps:
            _step(setting, candidates, progress)
    return Comparison([record_of(c) for c in candidates], _steps_of(candidates), _about(setting), steps)


def _step(setting: Setting, candidates: Sequence[Candidate], progress: bool) -> None:
    """Take steps in a row, the most promising candidates first."""
    promising = sorted((c for c in candidates if c.trial is not None), key=lambda c: c.promise, reverse=True)
    work = [(c, what) for what in ("in a row", "momentum") for c in promising]
    costs = {f"{c.name} at {c.damping}, {what}": float(1 if what == "momentum" else 3) for c, what in work}
    with showing(Console(stderr=True), costs, not progress, unit="pieces") as advance:
        for label, (candidate, what) in zip(costs, work, strict=True):
            outcome = setting.repeat(candidate) if what == "in a row" else setting.with_momentum(candidate)
            advance(label, outcome, False)


def _chosen(structures: Structures) -> dict[str, Structure]:
    """Return structures by name; they are copied wherever they are updated."""
    if isinstance(structures, Mapping):
        named = dict(structures)
    else:
        listed = [structures] if isinstance(structures, str | Structure) else structures
        named = {}
        for one in of_theory() if listed is None else listed:
            named[one.key if isinstance(one, Structure) else one] = make(one) if isinstance(one, str) else one
    for name, one in named.items():
        if not isinstance(one, Structure):
            raise ValueError(
                f"structures holds {name!r}: {one!r}, which is no structure. Give a key of curvlab.fisher.STRUCTURES, an object "
                "such as KFAC(), several of them, or a mapping of names to objects."
            )
    if not named:
        raise ValueError("structures is empty: there is nothing to compare.")
    return named


def _dampings(damping: Damping | Sequence[Damping]) -> list[Damping]:
    """Return the dampings, read once so that a wrong one is refused before anything is computed."""
    found = [damping] if isinstance(damping, str | float | int) else list(damping)
    if not found:
        raise ValueError("damping is empty: give at least one value, such as 'rel:1e-3'.")
    for one in found:
        absolute(one, lambda: 1.0)
    return list(dict.fromkeys(found))


def _estimate(structures: int, dampings: int, P: int, needs: Needs | None, deadline: Deadline) -> str:
    """Say what is to be done."""
    memory = (
        ""
        if needs is None
        else f", R = {needs.R} rows that take about {size(needs.rows)}, {size(needs.square)} for a matrix of R × R"
    )
    return (
        f"Comparing {structures * dampings} candidates ({structures} structures × {dampings} dampings): P = {P}{memory}; "
        f"seconds: {deadline}."
    )


def _steps_of(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return one record for every single real step."""
    return [
        {
            "structure": c.name,
            "damping": c.damping,
            "learning_rate": step.rate,
            "fall": c.trial.start - step.batch,
            "second_fall": c.trial.second - step.second,
            "predicted_fall": step.predicted,
        }
        for c in candidates
        if c.trial is not None
        for step in c.trial.steps
    ]


def _about(setting: Setting) -> str:
    model, loss = (type(module).__name__ for module in (setting.landscape.model, setting.landscape.loss))
    exact = setting.exact
    return (
        f"{model} with {loss}: P = {exact.P}, R = {exact.R} rows of {exact.shape[1]} samples; "
        f"second batch: {setting.batches.origin}."
    )
