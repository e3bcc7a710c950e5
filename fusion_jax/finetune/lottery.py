"""Iterative magnitude pruning with rewinding: lottery tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusion_jax.compress import compress
from fusion_jax.errors import InputError
from fusion_jax.forms import Frozen, Masked
from fusion_jax.methods.mask_prune import MaskPrune
from fusion_jax.origin import Origin
from fusion_jax.sites import Layers, select, sites
from fusion_jax.topk import top_masks

ModelT = TypeVar("ModelT", bound=nnx.Module)


def lottery(
    model: ModelT,
    train: Callable[[Any], Any],
    *,
    keep: float = 0.25,
    rounds: int = 3,
    layers: Layers = None,
) -> ModelT:
    """Trains, prunes the smallest weights of the MLPs, rewinds the others, and so on.

    Every round keeps the same share of what was left, by one limit over all MLPs. The weights that
    are left are those that training started from.

    Args:
        model: The model; not changed.
        train: Trains a model for a while, such as an epoch, and gives the trained one.
        keep: The share of the MLPs' weights that is left after all rounds.
        rounds: How many.
        layers: Which MLPs, see `fusion_jax.compress`.

    Returns:
        The model with its first weights, masked: train it as usual.

    Raises:
        InputError: ``keep`` or ``rounds`` is out of range, or ``layers`` matches nothing.

    References:
        Frankle and Carbin (2019), The Lottery Ticket Hypothesis; the baseline LTH of MLP Fusion
        (ICML 2023, arXiv 2307.08941).

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
        >>> ticket = lottery(mlp, lambda model: model, keep=0.25, rounds=2)
        >>> round(float(ticket.up.mask[...].mean() + ticket.down.mask[...].mean()) / 2, 2)
        0.25
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1; got {rounds}")
    MaskPrune(keep=keep)
    ticket: Any
    ticket, _ = compress(model, MaskPrune(keep=1.0), layers=layers, key=jax.random.key(0))
    chosen = [site.path for site in select(sites(model), layers)]
    origin = getattr(model, "origin", None)
    if isinstance(origin, Origin):
        # In place of what `compress` wrote, which kept all.
        ticket.origin = origin.after({"lottery": {"keep": keep, "rounds": rounds}, "sites": chosen})
    for i in range(rounds):
        trained = train(ticket)
        places = _masked(ticket, chosen)
        scores = [np.abs(np.asarray(m.matrix(), np.float32)) for m in _masked(trained, chosen)]
        # Weights already masked are 0 and come last.
        for place, mask in zip(places, top_masks(scores, keep ** ((i + 1) / rounds)), strict=True):
            place.mask = Frozen(jnp.asarray(mask))
    return ticket


def _masked(model: nnx.Module, chosen: list[str]) -> list[Masked]:
    """The masked layers of sites, in order."""
    found = [site.mlp for site in sites(model) if site.path in set(chosen)]
    return [layer for mlp in found for _, layer in sorted(mlp.linears().items())]
