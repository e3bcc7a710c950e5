"""Iterative magnitude pruning with rewinding: lottery tickets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusion_jax.compression.mlps import compress
from fusion_jax.errors import InputError
from fusion_jax.methods.mask_prune import MaskPrune
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.linear_forms import Frozen, Masked
from fusion_jax.nn.masking import top_masks
from fusion_jax.nn.site import select_sites, sites
from fusion_jax.progress import show_progress
from fusion_jax.training.methods.stages import Rounds, outcome
from ntk.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What rounds of pruning and rewinding gave.

    Args:
        model: The model with its first weights, masked: train it as usual.
        rounds: The rounds done.
        finished: False if training was told to stop; the same call with a folder goes on.
    """

    model: Any
    rounds: int
    finished: bool


def lottery(
    model: Any,
    train: Callable[[Any, Path | None], Any],
    *,
    keep: float = 0.25,
    rounds: int = 3,
    layers: Selection = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Ticket:
    """Trains, prunes the smallest weights of the MLPs, rewinds the others, and so on.

    Every round keeps the same share of what was left, by one limit over all MLPs. The weights that
    are left are those that training started from.

    Args:
        model: The model; not changed.
        train: Trains a model for a while, such as an epoch; takes the model and a folder for its
            run, or None, and gives its `Fit`, or the model. A `Fit` that is not finished ends the
            call without pruning by it.
        keep: The share of the MLPs' weights that is left after all rounds.
        rounds: How many.
        layers: Which MLPs, see `fusion_jax.compress`.
        folder: Where rounds are kept, so that the same call goes on; None keeps nothing.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The model with its first weights, masked, and how far it got.

    Raises:
        InputError: ``keep`` or ``rounds`` is out of range, ``layers`` matches nothing, or the
            folder was begun with other settings or another model.

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
    if rounds < 1:
        raise InputError(f"rounds must be at least 1; got {rounds}")
    MaskPrune(keep=keep)
    ticket: Any
    ticket, _ = compress(
        model, MaskPrune(keep=1.0), layers=layers, key=jax.random.key(0), progress=False
    )
    chosen = [site.path for site in select_sites(sites(model), layers)]
    provenance = getattr(model, "provenance", None)
    if isinstance(provenance, Provenance):
        # In place of what `compress` wrote, which kept all.
        ticket.provenance = provenance.after(
            {"lottery": {"keep": keep, "rounds": rounds}, "sites": chosen}
        )
    kept = Rounds(folder, "ticket", model, {"keep": keep, "rounds": rounds, "sites": chosen})
    read, finished = kept.notes(), True
    done = 0 if read is None else read["done"]
    if done:
        ticket = kept.model(done, model)
    with show_progress("Pruning", rounds, progress) as advance:
        if done:
            advance("resumed", done)
        while done < rounds:
            trained, finished = outcome(train(ticket, kept.run(done)))
            if not finished:
                break
            places = _masked(trained, chosen)
            if not places or not all(isinstance(place, Masked) for place in places):
                raise InputError("train must give the model that it got, trained; masks are gone")
            scores = [np.abs(np.asarray(place.matrix(), np.float32)) for place in places]
            # Weights already masked are 0 and come last.
            masks = top_masks(scores, keep ** ((done + 1) / rounds))
            ticket = nnx.clone(ticket)
            for place, mask in zip(_masked(ticket, chosen), masks, strict=True):
                place.mask = Frozen(jnp.asarray(mask))
            done += 1
            kept.note({"done": done}, model=ticket, count=done)
            kept.trained(done - 1)
            left = sum(int(mask.sum()) for mask in masks)
            advance(f"round {done} of {rounds}, {left:,} weights left")
    return Ticket(model=ticket, rounds=done, finished=finished)


def _masked(model: nnx.Module, chosen: list[str]) -> list[Any]:
    """The masked layers of sites, in order."""
    found = [site.mlp for site in sites(model) if site.path in set(chosen)]
    return [layer for mlp in found for _, layer in sorted(mlp.linears().items())]
