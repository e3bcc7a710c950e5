"""Lightweight fine-tuning of matrix product operators, and dimension squeezing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusion_jax import mpo
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.mpo import Layout, Mpo
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Frozen, find_forms
from fusion_jax.nn.surgery import replaced
from fusion_jax.progress import show_progress
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.methods.stages import Stages

ModelT = TypeVar("ModelT", bound=nnx.Module)


def lightweight(model: ModelT) -> ModelT:
    """Returns the model with the largest core of every chain Frozen: only the other cores train.

    In a balanced chain it is the central core; at full bonds it has nine tenths of the numbers.

    Args:
        model: A model with `Mpo` layers; not changed.

    Returns:
        The model, which shares its arrays with the original.

    Raises:
        InputError: There is no chain, or a chain has one core only.

    References:
        MPOP (Liu et al., ACL 2021), section 4.1.

    Example:
        >>> import fusion_jax as fj
        >>> mlp = fj.Mlp(16, 64, act="relu", rngs=nnx.Rngs(0))
        >>> chains, _ = fj.compress(mlp, fj.MPO(bond=None, cores=3), key=jax.random.key(0))
        >>> type(lightweight(chains).up.cores[1]).__name__
        'Frozen'
    """
    new = nnx.clone(model)
    for path, form in chains(model).items():
        if len(form.cores) < 2:
            raise InputError(f"{path} is a chain of one core: nothing of it would train")
        cores = [core[...] for core in form.cores]
        new = replaced(new, path, _rebuilt(form, form.layout, (_largest(form.layout),), cores))
    return new


def _largest(layout: Layout) -> int:
    sizes = [math.prod(shape) for shape in layout.shapes]
    middle = len(sizes) // 2
    return max(range(len(sizes)), key=lambda k: (sizes[k], -abs(k - middle)))


def chains(model: nnx.Module) -> dict[str, Mpo]:
    """Returns the layers that are chains, by path; raises `InputError` if there are none."""
    found = {path: form for path, form in find_forms(model).items() if isinstance(form, Mpo)}
    if not found:
        raise InputError("the model has no matrix product operators; see fusion_jax.MPO")
    return found


def _rebuilt(form: Mpo, layout: Layout, frozen: tuple[int, ...], cores: Sequence[Array]) -> Mpo:
    """Returns the layer with other bonds, cores or Frozen cores."""
    new = nnx.clone(form)
    new.layout, new.frozen = layout, frozen
    dtype = form.dtype
    kinds = [Frozen if k in frozen else nnx.Param for k in range(len(cores))]
    new.cores = nnx.List(
        [kind(core.astype(dtype)) for kind, core in zip(kinds, cores, strict=True)]
    )
    return new


@dataclass(frozen=True)
class Cut:
    """One step of squeezing: a bond of a chain becomes smaller.

    Args:
        path: The path of the layer.
        bond: The number of the bond, counted from 0.
        size: The new size of the bond.
        estimate: The Frobenius norm of the error, from the singular values that are cut off.
    """

    path: str
    bond: int
    size: int
    estimate: float


@on_auto_axes
def cheapest_cut(model: nnx.Module, *, step: int = 1) -> Cut | None:
    """Returns the cut of a bond with the smallest estimated error.

    Args:
        model: A model with `Mpo` layers.
        step: The decrease of a bond; in a stack of experts, of all experts at once.

    Returns:
        The cut, or None if no bond is larger than the step.

    Raises:
        InputError: There is no chain.

    References:
        MPOP (Liu et al., ACL 2021), algorithm 2.
    """
    best: Cut | None = None
    for path, form in chains(model).items():
        spectra = _spectra([core[...] for core in form.cores], bool(form.stack))
        for bond, values in enumerate(map(np.asarray, spectra)):
            size = form.layout.bonds[bond] - step
            if size < 1:
                continue
            estimate = math.sqrt(float(np.square(values[..., size:]).sum()))
            if best is None or estimate < best.estimate:
                best = Cut(path, bond, size, estimate)
    return best


def _recompress(form: Mpo, bonds: tuple[int, ...]) -> tuple[mpo.TensorTrain, Array]:
    """Returns the cores with smaller bonds, and their `mpo.excess`."""
    cores = [wide(core[...]) for core in form.cores]

    def one(cores: list[Array]) -> tuple[mpo.TensorTrain, Array]:
        train = mpo.recompressed(cores, bonds)
        before = mpo.contract(cores, (form.in_features, form.out_features))
        return train, mpo.excess(before, train)

    return jax.lax.map(one, cores) if form.stack else one(cores)


@partial(jax.jit, static_argnames="stacked")
def _spectra(cores: list[Array], stacked: bool) -> list[Array]:
    return jax.lax.map(mpo.spectra_of, cores) if stacked else mpo.spectra_of(cores)


@on_auto_axes
def cut(model: ModelT, chosen: Cut) -> ModelT:
    """Returns the model with one smaller bond; the model itself is not changed.

    Raises:
        ArithmeticError: The error is above its bound by more than rounding.
    """
    form = chains(model)[chosen.path]
    bonds = list(form.layout.bonds)
    bonds[chosen.bond] = chosen.size
    train, excess = _recompress(form, tuple(bonds))
    mpo.check_bound(excess)
    sizes = tuple(core.shape[-1] for core in train.cores[:-1])
    new = _rebuilt(form, form.layout._replace(bonds=sizes), form.frozen, train.cores)
    return replaced(nnx.clone(model), chosen.path, new)


@dataclass(frozen=True, kw_only=True)
class Squeezed:
    """The result of `squeeze`.

    Args:
        model: The smallest model within the tolerance.
        loss: The loss of this model.
        first_loss: The loss before the first cut.
        cuts: The cuts that were kept, with the loss after each.
        stopped: Whether a cut exceeded the tolerance; if not, all rounds were done, or all bonds
            are 1.
        finished: False if training was told to stop; the same call with a folder resumes it.
    """

    model: Any = field(repr=False)
    loss: float
    first_loss: float
    cuts: list[tuple[Cut, float]]
    stopped: bool
    finished: bool = True


def squeeze(
    model: Any,
    train: Callable[[Any, Path | None], Fit | nnx.Module],
    measure: Callable[[Any], float],
    *,
    tolerance: float = 0.03,
    two_sided: bool = False,
    rounds: int = 100,
    step: int = 1,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Squeezed:
    """Squeezes a model: makes the cheapest bond smaller, fine-tunes, and repeats.

    Args:
        model: A model with `Mpo` layers, fine-tuned (`lightweight`).
        train: Fine-tunes a model after a cut: (model, run folder or None) -> `Fit`, or the model.
            A `Fit` that is not finished ends the call without keeping the cut; return a `Fit` so
            that a run can be stopped in the middle of a round.
        measure: Returns the loss of a model, such as `mean_loss` on some batches.
        tolerance: Stop when the loss exceeds the loss before the first cut by more than this; the
            last cut is then undone.
        two_sided: Whether to stop, too, when the loss is lower by more than the tolerance, as in
            the paper's box; training that still improves the model then ends the squeezing.
        rounds: The largest number of cuts; a resuming call may allow more.
        step: The decrease of a bond in a cut.
        folder: Where the progress is kept, so that the same call resumes it; None keeps nothing.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The squeezed model and its history.

    Raises:
        InputError: The model has no chain, a number is out of range, or the folder was started with
            other settings or another model.
        FloatingPointError: The loss before the first cut is NaN or infinite.

    References:
        MPOP (Liu et al., ACL 2021), algorithm 2, whose box, but not its text, stops when the gap
        exceeds the tolerance. The published code stops at a loss that is higher by 0.03.

    Example:
        >>> squeezed = squeeze(model, train, measure, folder="run")  # doctest: +SKIP
    """
    check_at_least(1, rounds=rounds, step=step)
    if not tolerance > 0:
        raise InputError(f"tolerance must be above 0; got {tolerance}")
    found = chains(model)
    settings: dict[str, object] = {"tolerance": tolerance, "two-sided": two_sided, "step": step}
    settings["chains"] = len(found)
    for path, form in found.items():
        settings[f"bonds of {path}"] = list(form.layout.bonds)
        settings[f"Frozen cores of {path}"] = list(form.frozen)
    with Stages(folder, "squeezed", model, settings) as stages:
        kept: list[tuple[Cut, float]] = []
        record = stages.read_record()
        if record is None:
            first, stopped = float(measure(model)), False
            if not math.isfinite(first):
                raise FloatingPointError(f"the loss before the first cut is {first}")
        else:
            first, stopped = record["first_loss"], record["stopped"]
            kept = [(Cut(**entry["cut"]), entry["loss"]) for entry in record["cuts"]]
            if len(kept) > rounds:
                raise InputError(
                    f"{folder} holds {len(kept)} cuts, more than rounds={rounds}; give at least as "
                    "many, or another folder"
                )
            if kept:
                model = stages.load_model(len(kept), model)
        best, loss, finished = model, kept[-1][1] if kept else first, True

        def write(new: nnx.Module | None = None) -> None:
            entries = [{"cut": vars(c), "loss": value} for c, value in kept]
            fields = {"first_loss": first, "cuts": entries, "stopped": stopped}
            stages.write(fields, model=new, done=len(kept))

        with show_progress("Squeezing", rounds, progress) as advance:
            write()
            if kept:
                advance("resumed", len(kept))
            while len(kept) < rounds and not stopped:
                chosen = cheapest_cut(best, step=step)
                if chosen is None:
                    break
                done = len(kept)
                tried, finished = stages.train(train, cut(best, chosen), done)
                if not finished:
                    break
                value = float(measure(tried))
                rise = value - first
                # Negated, so that NaN stops too.
                stopped = not (abs(rise) if two_sided else rise) <= tolerance
                if stopped:
                    write()
                else:
                    best, loss = tried, value
                    kept.append((chosen, value))
                    write(best)
                # After the record is written, so that stopping at any moment loses nothing.
                stages.remove_run(done)
                advance(f"{chosen.path} bond {chosen.bond} to {chosen.size}, loss {value:.4f}")
    return Squeezed(
        model=best, loss=loss, first_loss=first, cuts=kept, stopped=stopped, finished=finished
    )
