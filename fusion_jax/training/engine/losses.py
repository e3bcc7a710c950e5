"""What is minimised.

A loss is a function of (model, batch, key): the batch a dict of arrays, the key that of dropout or
None. It returns a sum and what to divide it by, so that accumulated parts and devices add up to the
mean over one whole batch. Arrays that a loss needs besides, such as a teacher, are bound with
``jax.tree_util.Partial``, and so are arguments of the compiled step and not constants in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.errors import InputError
from fusion_jax.models.moe import Moe, load_balancing_loss, router_z_loss
from fusion_jax.nn.dtypes import wide
from fusion_jax.training.engine.config import TrainConfig

Batch = Mapping[str, Any]
"""Arrays by name: what the model takes, ``labels``, and ``weights``, 0 for rows that fill up."""


class Total(NamedTuple):
    """A loss before the mean is taken.

    Args:
        total: The sum over what counts.
        count: How much counts.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]


Coefficient = float | Float[Array, ""]

Loss = Callable[[Any, Batch, Key[Array, ""] | None], Total]


def run(model: Any, batch: Batch, key: Key[Array, ""] | None = None, **options: Any) -> Any:
    """Runs a model on a batch: on what is not labels and weights.

    The decoder of an encoder-decoder reads the labels one position later, after the configuration's
    ``decoder_start_token_id``.
    """
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "weights")}
    if _has_encoder(model) and "labels" in batch:
        # As Hugging Face does, 0 behind a target's end.
        tokens = jnp.maximum(jnp.asarray(batch["labels"]), 0)
        start = jnp.full_like(tokens[:, :1], model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = jnp.concatenate([start, tokens[:, :-1]], axis=1)
    return model(**inputs, key=key, **options)


def classification(model: Any, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Cross-entropy of the logits, with labels from 0 on."""
    logits = wide(run(model, batch, key).logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return _weighted(losses, batch)


def regression(model: Any, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Squared error of the one logit."""
    logits = wide(run(model, batch, key).logits)
    return _weighted(jnp.square(logits[:, 0] - batch["labels"]), batch)


def next_token(
    model: Any,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    balance: Coefficient = 0.0,
    router_z: Coefficient = 0.0,
) -> Total:
    """Cross-entropy of each token after those before it, where it is real and counts.

    ``labels``, if there are any, are the tokens themselves, with -100 where they do not count. For
    a model with experts, see `router_losses`.
    """
    out = run(model, batch, key)
    logits = wide(out.logits)[:, :-1]
    tokens = jnp.asarray(batch.get("labels", batch["input_ids"]))[:, 1:]
    counts = jnp.asarray(batch["attention_mask"])[:, 1:].astype(bool) & (tokens != -100)
    result = _tokens(logits, jnp.maximum(tokens, 0), counts, batch)
    return _with(result, router_losses(model, out, batch, balance=balance, router_z=router_z))


def sequence_to_sequence(
    model: Any,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    balance: Coefficient = 0.0,
    router_z: Coefficient = 0.0,
) -> Total:
    """Cross-entropy of target texts after source texts, for encoder-decoders.

    ``labels`` (b, s) are the targets, with -100 behind their ends. For a model with experts, see
    `router_losses`.
    """
    labels = jnp.asarray(batch["labels"])
    counts, tokens = labels != -100, jnp.maximum(labels, 0)
    out = run(model, batch, key)
    result = _tokens(wide(out.logits), tokens, counts, batch)
    return _with(result, router_losses(model, out, batch, balance=balance, router_z=router_z))


def router_losses(
    model: Any, out: Any, batch: Batch, *, balance: Coefficient, router_z: Coefficient
) -> Float[Array, ""]:
    """The auxiliary losses of a model's routers, weighted; 0 for a model without experts.

    Training a mixture of experts without them lets its routers collapse. `with_routers` binds the
    coefficients of a `TrainConfig` to a loss. Shares are no sums over positions: of a batch in
    accumulated parts, each part has its own.

    Args:
        model: The model.
        out: What it returned.
        batch: The batch, whose padding does not count.
        balance: The coefficient of `load_balancing_loss`: transformers has 0.001 for Mixtral and
            Switch, the paper of Switch 0.01. Shares are taken as each architecture's authors do:
            over the whole batch in a decoder, in each sequence in an encoder-decoder, whose two
            stacks are added up.
        router_z: The coefficient of `router_z_loss`: transformers has 0.001 for Switch, 0 for
            others.

    Returns:
        The weighted sum.

    References:
        Switch Transformers (arXiv 2101.03961), equations 4 to 6; ST-MoE (arXiv 2202.08906),
        equation 5.
    """
    rows = jnp.asarray(batch["weights"])[:, None] > 0
    stacks = [(out.router_logits, batch.get("attention_mask"))]
    encoder = getattr(out, "encoder", None)
    if encoder is not None:
        stacks = [(encoder.router_logits, batch.get("attention_mask"))]
        stacks += [(out.router_logits, _decoder_mask(batch))]
    top_k = getattr(model.config, "num_experts_per_tok", 1)
    total = jnp.float32(0)
    for logits, mask in stacks:
        if logits:
            real = jnp.ones(logits[0].shape[:2], bool) if mask is None else jnp.asarray(mask)
            real = real.astype(bool) & rows
            shares = load_balancing_loss(logits, top_k, real, per_sequence=encoder is not None)
            total += balance * shares.astype(total.dtype)
            total += router_z * router_z_loss(logits, real).astype(total.dtype)
    return total


def with_routers(loss: Loss, model: Any, config: TrainConfig) -> Loss:
    """A loss with the auxiliary losses of routers that a configuration asks for.

    Args:
        loss: `next_token` or `sequence_to_sequence`; any other where none are asked for.
        model: The model to train.
        config: Its ``router_balance`` and ``router_z`` are the coefficients.

    Returns:
        The loss.

    Raises:
        InputError: Some are asked for, and the loss or the model has no routers.
    """
    asked = [n for n in ("router_balance", "router_z") if getattr(config, n) is not None]
    if not asked:
        return loss
    experts = any(isinstance(module, Moe) for _, module in nnx.iter_modules(model))
    if loss not in (next_token, sequence_to_sequence) or not experts:
        raise InputError(f"{asked[0]} is for training language models with experts; leave it out")
    return jax.tree_util.Partial(
        loss, balance=config.router_balance or 0.0, router_z=config.router_z or 0.0
    )


def _with(result: Total, auxiliary: Array) -> Total:
    return result._replace(total=result.total + auxiliary.astype(result.total.dtype) * result.count)


def _decoder_mask(batch: Batch) -> Any:
    if "labels" in batch:
        return jnp.asarray(batch["labels"]) != -100
    return batch.get("decoder_attention_mask")


def hidden_states(teacher: Any, model: Any, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Mean squared error between the hidden states of two models, summed over layers.

    The means are over tokens and features; padding does not count. Of an encoder-decoder, the
    tokens of sources count with the encoder's layers, those of targets with the decoder's.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 4.4.
    """
    outs = [run(m, batch, k, output_hidden_states=True) for m, k in ((teacher, None), (model, key))]
    seen = jnp.asarray(batch["attention_mask"]).astype(bool)
    stacks = [(outs, seen)]
    if _has_encoder(model):
        mask = _decoder_mask(batch)
        read = jnp.ones((1, 1), bool) if mask is None else jnp.asarray(mask).astype(bool)
        stacks = [([out.encoder for out in outs], seen), (outs, read)]
    weights = jnp.asarray(batch["weights"])[:, None]
    result = Total(jnp.zeros((), weights.dtype), jnp.zeros((), weights.dtype))
    for pair, counts in stacks:
        real = jnp.where(counts, weights, 0.0)
        real = jnp.broadcast_to(real, pair[0].hidden_states[0].shape[:2])
        total = result.total
        for ours, theirs in zip(*(out.hidden_states[1:] for out in pair), strict=True):
            total += (jnp.square(wide(ours) - wide(theirs)).mean(-1) * real).sum()
        result = Total(total, result.count + real.sum())
    return result


def _has_encoder(model: Any) -> bool:
    return not getattr(model, "reads_prompts", True)


def distilled(
    teacher: Any,
    loss: Loss,
    weight: float = 0.5,
    temperature: float = 2.0,
    *,
    reverse: bool = False,
) -> jax.tree_util.Partial:
    """A loss of logits, and how far the logits are from a teacher's.

    ``(1 - weight) loss + weight T^2 KL(p_teacher || p_student)`` at temperature T. The model runs
    once, and so ``loss`` sees only what it returns: penalties on its parameters go around this.

    Args:
        teacher: A model with the same classes; it runs without dropout and does not change.
        loss: The loss besides, such as `classification`.
        weight: The share of the teacher, in [0, 1].
        temperature: T, by which logits are divided.
        reverse: KL(p_student || p_teacher) instead: a student then loses nothing by leaving out
            what the teacher says.

    Returns:
        The loss. As `fusion_jax.finetune` takes it: ``loss=partial(losses.distilled, teacher)``.

    Raises:
        InputError: A number is out of range.

    References:
        Hinton et al. (2015), Distilling the Knowledge in a Neural Network. The defaults are those
        of the code of Jiang et al. (ACL 2023); its text has the reverse divergence.

    Example:
        >>> teach = partial(losses.distilled, teacher)  # doctest: +SKIP
        >>> fit = finetune(student, data, key=key, loss=teach)  # doctest: +SKIP
    """
    if not 0 <= weight <= 1:
        raise InputError(f"the weight of a teacher must be in [0, 1]; got {weight}")
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    bound = loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)
    numbers = jnp.array([weight, temperature], jnp.float32)
    made = partial(_distilled, reverse=reverse)
    return jax.tree_util.Partial(made, teacher, bound, numbers)


def _distilled(
    teacher: Any, loss: Loss, numbers: Array, model: Any, batch: Batch, key: Any, *, reverse: bool
) -> Total:
    out = run(model, batch, key)
    own = loss(lambda **_: out, batch, key)
    ours, theirs = wide(out.logits), wide(run(teacher, batch).logits)
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] < 2:
        raise InputError(
            "a teacher needs the same two or more classes as the model; logits are "
            f"{theirs.shape} and {ours.shape}"
        )
    weight, temperature = numbers.astype(ours.dtype)
    p, q = (jax.nn.log_softmax(x / temperature) for x in (theirs, ours))
    if reverse:
        p, q = q, p
    far = (jnp.exp(p) * (p - q)).sum(-1)
    taught = _weighted(jnp.square(temperature) * far, batch)
    return Total((1 - weight) * own.total + weight * taught.total, own.count)


def _tokens(logits: Array, tokens: Array, counts: Array, batch: Batch) -> Total:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    weights = jnp.where(counts, jnp.asarray(batch["weights"])[:, None], 0)
    return Total((each * weights).sum(), weights.sum())


def _weighted(losses: Float[Array, " b"], batch: Batch) -> Total:
    weights = batch["weights"]
    return Total((losses * weights).sum(), weights.sum())
