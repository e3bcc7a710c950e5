"""Lottery tickets: iterative magnitude pruning with rewinding."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusion_jax.compression.mlps import compress
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.methods.mask_prune import MaskPrune
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.linear_forms import AnyLinear, Frozen, Masked
from fusion_jax.nn.masking import top_masks
from fusion_jax.nn.site import select_sites, sites
from fusion_jax.nn.surgery import ModuleT
from fusion_jax.progress import show_progress
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.methods.stages import Stages
from ntk.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Ticket(Generic[ModuleT]):
    """The result of `lottery`.

    Args:
        model: The model with its first weights, masked: train it as usual.
        rounds: The rounds done.
        finished: False if training was told to stop; the same call with a folder resumes it.
    """

    model: ModuleT = field(repr=False)
    rounds: int
    finished: bool


def lottery(
    model: ModuleT,
    train: Callable[[ModuleT, Path | None], Fit[ModuleT] | ModuleT],
    *,
    keep: float = 0.25,
    rounds: int = 3,
    layers: Selection = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Ticket[ModuleT]:
    """Finds a lottery ticket: trains, prunes the smallest weights of the MLPs, rewinds, repeats.

    Every round keeps the same share of the remaining weights, with one threshold for all MLPs. The
    remaining weights have the values from before training.

    Args:
        model: The model; not changed.
        train: Trains a model, for example for an epoch: (model, run folder or None) -> `Fit`, or
            the model. A `Fit` that is not finished ends the call without pruning.
        keep: The share of the MLPs' weights that remains after all rounds.
        rounds: The number of rounds.
        layers: Which MLPs, see `fusion_jax.compress`.
        folder: Where the progress is kept, so that the same call resumes it; None keeps nothing.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The model with its first weights, masked, and the rounds done.

    Raises:
        InputError: ``keep`` or ``rounds`` is out of range, ``layers`` matches nothing, or the
            folder was started with other settings or another model.

    References:
        Frankle and Carbin (2019), The Lottery Ticket Hypothesis; the baseline LTH of MLP Fusion
        (ICML 2023, arXiv 2307.08941).

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
        >>> ticket = lottery(mlp, lambda model, folder: model, keep=0.25, rounds=2).model
        >>> round(float(ticket.up.mask[...].mean() + ticket.down.mask[...].mean()) / 2, 2)
        0.25
    """
    check_at_least(1, rounds=rounds)
    MaskPrune(keep=keep)
    ticket, _ = compress(
        model, MaskPrune(keep=1.0), layers=layers, key=jax.random.key(0), progress=False
    )
    chosen = [site.path for site in select_sites(sites(model), layers)]
    provenance = getattr(model, "provenance", None)
    if isinstance(provenance, Provenance):
        # Replaces the entry of `compress`, which kept all weights.
        done_so_far = {"lottery": {"keep": keep, "rounds": rounds}, "sites": chosen}
        ticket.provenance = provenance.after(done_so_far)  # type: ignore[attr-defined]
    settings = {"keep": keep, "rounds": rounds, "sites": chosen}
    with Stages(folder, "ticket", model, settings) as stages:
        record, finished = stages.read_record(), True
        done = 0 if record is None else record["done"]
        if done:
            ticket = stages.load_model(done, model)
        with show_progress("Pruning", rounds, progress) as advance:
            if done:
                advance("resumed", done)
            while done < rounds:
                trained, finished = stages.train(train, ticket, done)
                if not finished:
                    break
                found = _layers_of(trained, chosen)
                places = [place for place in found if isinstance(place, Masked)]
                if not places or len(places) < len(found):
                    raise InputError("train must return the trained model; the masks are gone")
                scores = [np.abs(np.asarray(place.matrix(), np.float32)) for place in places]
                # Weights that are already masked are 0, so that they rank last.
                masks = top_masks(scores, keep ** ((done + 1) / rounds))
                ticket = nnx.clone(ticket)
                for place, mask in zip(_layers_of(ticket, chosen), masks, strict=True):
                    assert isinstance(place, Masked)
                    place.mask = Frozen(jnp.asarray(mask))
                done += 1
                stages.write({"done": done}, model=ticket, done=done)
                stages.remove_run(done - 1)
                left = sum(int(mask.sum()) for mask in masks)
                advance(f"round {done} of {rounds}, {left:,} weights left")
    return Ticket(model=ticket, rounds=done, finished=finished)


def _layers_of(model: nnx.Module, chosen: list[str]) -> list[AnyLinear]:
    """Returns the linear layers of the chosen sites, in order."""
    found = [site.mlp for site in sites(model) if site.path in set(chosen)]
    return [layer for mlp in found for _, layer in sorted(mlp.linears().items())]
