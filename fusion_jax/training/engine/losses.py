"""Losses for training.

A loss is a function of (model, batch, key), where the batch is a dict of arrays and the key is the
random key of dropout, or None. It returns a sum and its divisor, so that accumulated parts and
devices add up to the mean over one whole batch. Bind further arrays, such as a teacher, with
``jax.tree_util.Partial``: they are then arguments of the compiled step instead of constants in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Model
from fusion_jax.models.moe import Moe, load_balancing_loss, router_z_loss
from fusion_jax.models.provenance import class_order
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.surgery import ModuleT
from fusion_jax.training.engine.config import TrainConfig

Forward = Callable[..., PyTree]
"""A model, or what stands for one: it takes inputs by name, and returns its output."""

Batch = Mapping[str, Array | np.ndarray]
"""Arrays by name: the model's inputs, ``labels``, and ``weights`` (b,), 0 for padded rows."""


class Total(NamedTuple):
    """The sum of a loss, and its divisor.

    Args:
        total: The weighted sum over examples or tokens.
        count: The sum of their weights.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]


Coefficient = float | Float[Array, ""]

Loss = Callable[[ModuleT, Batch, Key[Array, ""] | None], Total]
"""A function of (model, batch, dropout key or None)."""


def bound(loss: Loss) -> jax.tree_util.Partial:
    """Returns a loss as a pytree, whose bound arrays are arguments of compiled functions."""
    return loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)


def run(model: Forward, batch: Batch, key: Key[Array, ""] | None = None, **options: bool) -> PyTree:
    """Runs a model on the inputs in a batch, without labels and weights.

    The decoder of an encoder-decoder that writes text reads the labels shifted by one position.
    """
    inputs = {name: x for name, x in batch.items() if name not in ("labels", "weights")}
    if reads_targets(model) and "labels" in batch:
        decoder: Any = model
        inputs["decoder_input_ids"] = decoder.shift_right(batch["labels"])
    return model(**inputs, key=key, **options)


def classification(model: Forward, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Returns the cross-entropy of the logits (b, classes), for integer labels (b,)."""
    logits = wide(run(model, batch, key).logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return _weighted(losses, batch)


def regression(model: Forward, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Returns the squared error of the single logit (b, 1), for labels (b,)."""
    logits = wide(run(model, batch, key).logits)
    return _weighted(jnp.square(logits[:, 0] - batch["labels"]), batch)


def token_classification(model: Forward, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Returns the cross-entropy of the logits (b, t, classes), for integer labels (b, t).

    Labels are -100 where a token does not count.
    """
    labels = jnp.asarray(batch["labels"])
    logits = wide(run(model, batch, key).logits)
    return _of_tokens(logits, jnp.maximum(labels, 0), labels != -100, batch)


def question_answering(model: Forward, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Returns the cross-entropy of where answers start and end, the mean of both.

    ``labels`` (b, 2) are the positions of the first and the last token. Padding is no place for an
    answer, so that the loss does not depend on the padded length; in transformers it does.
    """
    logits = wide(run(model, batch, key).logits).swapaxes(1, 2)
    real = jnp.asarray(batch["attention_mask"]).astype(bool)[:, None]
    logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch["labels"]))
    return _weighted(losses.mean(axis=1), batch)


def next_token(
    model: Model,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    balance: Coefficient = 0.0,
    router_z: Coefficient = 0.0,
) -> Total:
    """Returns the cross-entropy of each token given the tokens before it.

    Padding does not count. ``labels`` (b, t), if the batch has them, are the tokens again, with
    -100 where a token does not count. For a model with experts, see `router_losses`.
    """
    out = run(model, batch, key)
    logits = wide(out.logits)[:, :-1]
    tokens = jnp.asarray(batch.get("labels", batch["input_ids"]))[:, 1:]
    counts = jnp.asarray(batch["attention_mask"])[:, 1:].astype(bool) & (tokens != -100)
    result = _of_tokens(logits, jnp.maximum(tokens, 0), counts, batch)
    return _plus(result, router_losses(model, out, batch, balance=balance, router_z=router_z))


def sequence_to_sequence(
    model: Model,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    balance: Coefficient = 0.0,
    router_z: Coefficient = 0.0,
) -> Total:
    """Returns the cross-entropy of target texts given source texts, for encoder-decoders.

    ``labels`` (b, s) are the targets, with -100 after their ends. For a model with experts, see
    `router_losses`.
    """
    labels = jnp.asarray(batch["labels"])
    counts, tokens = labels != -100, jnp.maximum(labels, 0)
    out = run(model, batch, key)
    result = _of_tokens(wide(out.logits), tokens, counts, batch)
    return _plus(result, router_losses(model, out, batch, balance=balance, router_z=router_z))


def router_losses(
    model: Model, out: DecoderOutput, batch: Batch, *, balance: Coefficient, router_z: Coefficient
) -> Float[Array, ""]:
    """Returns the weighted auxiliary losses of a model's routers; 0 for a model without experts.

    A mixture of experts needs them in training, because its routers can collapse otherwise.
    `with_routers` binds the coefficients of a `TrainConfig` to a loss. The shares of experts are
    not sums over positions: with accumulated parts, each part of a batch has its own shares.

    Args:
        model: The model.
        out: The model's output.
        batch: The batch; its padding does not count.
        balance: The coefficient of `load_balancing_loss`: 0.001 in transformers for Mixtral and
            Switch, 0.01 in the paper of Switch. As each architecture's authors do, shares are
            computed over the whole batch in a decoder, and in each sequence in an encoder-decoder,
            where the losses of both stacks are added.
        router_z: The coefficient of `router_z_loss`: 0.001 in transformers for Switch, 0 for other
            models.

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
        stacks += [(out.router_logits, decoder_mask(model, batch))]
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


def with_routers(loss: Loss, model: nnx.Module, config: TrainConfig) -> Loss:
    """Returns a loss with the auxiliary losses of routers that a configuration asks for.

    Args:
        loss: `next_token` or `sequence_to_sequence`; any loss if the configuration asks for none.
        model: The model to train.
        config: Its ``router_balance`` and ``router_z`` are the coefficients.

    Returns:
        The loss.

    Raises:
        InputError: The configuration asks for a loss of routers that the loss or model lacks.
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


def _plus(result: Total, auxiliary: Array) -> Total:
    return result._replace(total=result.total + auxiliary.astype(result.total.dtype) * result.count)


def decoder_mask(model: Model, batch: Batch) -> Array | np.ndarray | None:
    """Returns where the decoder of an encoder-decoder reads a token; None for everywhere."""
    if not reads_targets(model):  # but the text that the encoder reads
        return batch.get("attention_mask")
    if "labels" in batch:
        return jnp.asarray(batch["labels"]) != -100
    return batch.get("decoder_attention_mask")


def real_positions(batch: Batch, states: Float[Array, "b t d"]) -> Bool[Array, "b t"]:
    """Returns where hidden states are not of padding; without a mask everywhere, as in images."""
    mask = batch.get("attention_mask")
    if mask is None:
        return jnp.ones(states.shape[:2], bool)
    return jnp.asarray(mask).astype(bool)


def hidden_states(teacher: Model, model: Model, batch: Batch, key: Key[Array, ""] | None) -> Total:
    """Returns the mean squared error between the hidden states of two models, summed over layers.

    The means are over tokens and features; padding does not count. In an encoder-decoder, the
    encoder's layers are compared at source tokens and the decoder's layers at target tokens.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 4.4.
    """
    outs = [run(m, batch, k, output_hidden_states=True) for m, k in ((teacher, None), (model, key))]
    encoders = [getattr(out, "encoder", None) or out for out in outs]
    seen = real_positions(batch, encoders[0].last_hidden_state)
    stacks = [(outs, seen)]
    if encoders[0] is not outs[0]:
        mask = decoder_mask(model, batch)
        read = jnp.ones((1, 1), bool) if mask is None else jnp.asarray(mask).astype(bool)
        stacks = [(encoders, seen), (outs, read)]
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


def reads_targets(model: object) -> TypeGuard[Model]:
    """Returns whether a model is an encoder-decoder whose decoder reads the target texts."""
    return not getattr(model, "reads_prompts", True)


def distilled(
    teacher: Model,
    loss: Loss,
    weight: float = 0.5,
    temperature: float = 2.0,
    *,
    reverse: bool = False,
) -> jax.tree_util.Partial:
    """Returns a loss that adds the divergence of the logits from a teacher's logits.

    ``(1 - weight) loss + weight T^2 KL(p_teacher || p_student)`` at temperature T. The model runs
    once, and ``loss`` sees only the model's output: add penalties on parameters around this loss.

    Args:
        teacher: A model with the same classes; it runs without dropout and does not change.
        loss: The other loss, such as `classification`.
        weight: The share of the teacher, in [0, 1].
        temperature: The temperature T, by which logits are divided.
        reverse: Whether to use KL(p_student || p_teacher), which does not penalize a student for
            ignoring classes to which the teacher gives some probability.

    Returns:
        The loss. For `fusion_jax.finetune`, use
        ``recipe=Recipe(loss=partial(losses.distilled, teacher))``.

    Raises:
        InputError: A number is out of range.

    References:
        Hinton et al. (2015), Distilling the Knowledge in a Neural Network. The defaults are those
        of the code of Jiang et al. (ACL 2023); their text has the reverse divergence.

    Example:
        >>> recipe = Recipe(loss=partial(losses.distilled, teacher))  # doctest: +SKIP
        >>> fit = finetune(student, data, key=key, recipe=recipe)  # doctest: +SKIP
    """
    if not 0 <= weight <= 1:
        raise InputError(f"the weight of a teacher must be in [0, 1]; got {weight}")
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    numbers = jnp.array([weight, temperature], jnp.float32)
    made = partial(_distilled, reverse=reverse)
    return jax.tree_util.Partial(made, teacher, bound(loss), numbers)


def _distilled(
    teacher: Model,
    loss: Loss,
    numbers: Array,
    model: Model,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    reverse: bool,
) -> Total:
    out = run(model, batch, key)
    own = loss(lambda **_: out, batch, key)
    ours, theirs = wide(out.logits), wide(run(teacher, batch).logits)
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] < 2:
        raise InputError(
            "a teacher needs the same two or more classes as the model; logits are "
            f"{theirs.shape} and {ours.shape}"
        )
    theirs = theirs[:, _teacher_columns(model, teacher)]
    weight, temperature = numbers.astype(ours.dtype)
    p, q = (jax.nn.log_softmax(x / temperature) for x in (theirs, ours))
    if reverse:
        p, q = q, p
    divergence = (jnp.exp(p) * (p - q)).sum(-1)
    taught = _weighted(jnp.square(temperature) * divergence, batch)
    return Total((1 - weight) * own.total + weight * taught.total, own.count)


def _teacher_columns(model: Model, teacher: Model) -> slice | np.ndarray:
    """Returns the teacher's logits of the model's classes, by name where both have names."""
    ours, theirs = (
        getattr(getattr(m, "provenance", None), "labels", None) for m in (model, teacher)
    )
    if ours is None or theirs is None:
        return slice(None)
    order = class_order(ours, theirs)
    if order is None:
        raise InputError(
            f"the teacher's classes ({', '.join(theirs)}) are not the model's ({', '.join(ours)})"
        )
    return np.array(order)


def _of_tokens(logits: Array, tokens: Array, counts: Array, batch: Batch) -> Total:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    weights = jnp.where(counts, jnp.asarray(batch["weights"])[:, None], 0)
    return Total((each * weights).sum(), weights.sum())


def _weighted(losses: Float[Array, " b"], batch: Batch) -> Total:
    weights = batch["weights"]
    return Total((losses * weights).sum(), weights.sum())
