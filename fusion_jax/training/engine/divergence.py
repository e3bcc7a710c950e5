"""The loss of healing: how far a model's outputs are from those of its teacher."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fusion_jax.models.base import Model
from fusion_jax.nn.dtypes import wide
from fusion_jax.training.engine.losses import (
    Batch,
    Loss,
    Total,
    decoder_mask,
    reads_targets,
    real_positions,
    run,
)

Compared = Literal["tokens", "targets", "class", "answer", "number", "states"]
"""Which outputs are compared: the logits at every token, at every token of the target texts, of the
classes of a text, of the places where an answer starts and ends, a number, or the final hidden
states."""
TEACHER = "teacher "
"""How the names of the arrays of `Top` begin in a batch."""
LEAST = -100.0
"""Log-probabilities are not below this; in float32 the probability is 0 then."""


class Top(NamedTuple):
    """The most probable classes of distributions; k is at most the number of classes.

    Args:
        indices: (b, n, k) the classes, int32.
        log_probs: (b, n, k) the logarithms of their probabilities, in any floating-point dtype.
        others: (b, n) the logarithm of the probability of all other classes together.
    """

    indices: Int[Array | np.ndarray, "b n k"]
    log_probs: Float[Array | np.ndarray, "b n k"]
    others: Float[Array | np.ndarray, "b n"]


def top_classes(logits: Float[Array, "b n classes"], k: int) -> Top:
    """Returns the k most probable classes (all, if there are fewer), and the rest of the mass."""
    logits = wide(logits)
    total = jax.nn.logsumexp(logits, axis=-1)
    values, indices = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    others = _log_mass_of_others(logits, indices) - total
    log_probs = values - total[..., None]
    return Top(indices, jnp.maximum(log_probs, LEAST), jnp.maximum(others, LEAST))


def top_divergence(top: Top, logits: Float[Array, "b n classes"]) -> Float[Array, "b n"]:
    """Returns the divergence of distributions from those of a teacher, in nats.

    KL(teacher || model) over the teacher's most probable classes and one class more, "all others".
    Joining classes never makes a divergence larger, so that this is a lower bound of the divergence
    over all classes, and equal to it if no class is among the others.

    Args:
        top: The teacher's most probable classes.
        logits: The model's logits.

    Returns:
        (b, n) nats, in float32 or float64.
    """
    logits, indices = wide(logits), jnp.asarray(top.indices)
    total = jax.nn.logsumexp(logits, axis=-1)
    ours = jnp.take_along_axis(logits, indices, axis=-1) - total[..., None]
    theirs = jnp.asarray(top.log_probs).astype(ours.dtype)
    result = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
    if indices.shape[-1] < logits.shape[-1]:
        others = jnp.asarray(top.others).astype(ours.dtype)
        rest = _log_mass_of_others(logits, indices) - total
        result += jnp.exp(others) * (others - rest)
    return result


def _log_mass_of_others(logits: Array, indices: Array) -> Array:
    """Returns the logarithm of the sum of exp(logits) over all classes but some."""
    # Not 1 minus the mass of the others, which would lose all its digits where it is small.
    least = jnp.finfo(logits.dtype).min
    rest = jnp.put_along_axis(logits, indices, least, axis=-1, inplace=False)
    return jax.nn.logsumexp(rest, axis=-1)


def compared(
    kind: Compared, model: Model, batch: Batch, logits: Array
) -> tuple[Float[Array, "b n classes"], Bool[Array, "b n"]]:
    """Returns the logits of each distribution that counts, and where there is one.

    Args:
        kind: What is compared; not a number, nor states.
        model: The model.
        batch: The batch.
        logits: The output of the head.
    """
    if kind == "class":
        return logits[:, None], jnp.ones((len(logits), 1), bool)
    seen = jnp.asarray(batch["attention_mask"]).astype(bool)
    if kind == "answer":
        places = wide(logits).swapaxes(1, 2)
        places = jnp.where(seen[:, None], places, jnp.finfo(places.dtype).min)
        return places, jnp.ones(places.shape[:2], bool)
    if kind == "targets":
        return logits, _decoded(model, batch, logits)
    return logits, seen


def _decoded(model: Model, batch: Batch, states: Array) -> Array:
    """Returns where the decoder of an encoder-decoder reads a token."""
    mask = decoder_mask(model, batch)
    return jnp.ones(states.shape[:2], bool) if mask is None else jnp.asarray(mask).astype(bool)


def without_teacher(batch: Batch) -> tuple[dict[str, Array | np.ndarray], Top | None]:
    """Splits the stored logits of a teacher off a batch, see `with_teacher`."""
    top = [batch.get(TEACHER + name) for name in Top._fields]
    own = {name: x for name, x in batch.items() if not name.startswith(TEACHER)}
    return own, None if top[0] is None else Top(*top)  # type: ignore[arg-type]


def with_teacher(batch: Batch, top: Top) -> dict[str, Array | np.ndarray]:
    """Returns a batch with the logits of a teacher, each array under a name of its own."""
    return {**batch, **{TEACHER + name: x for name, x in top._asdict().items()}}


def healing(
    teacher: Model | None,
    labeled: Loss | None,
    model: Model,
    batch: Batch,
    key: Key[Array, ""] | None,
    *,
    kind: Compared,
    top_k: int,
    states: float,
    labels: float,
) -> Total:
    """Returns the distance of a model's outputs from a teacher's, and what is added to it.

    Args:
        teacher: The teacher; None if its logits are in the batch.
        labeled: The loss of true labels; None adds none.
        model: The model.
        batch: The batch.
        key: Random key of dropout, or None.
        kind: What is compared.
        top_k: The number of classes that are compared one by one, see `top_divergence`.
        states: The weight of the relative squared errors of hidden states, see `state_errors`.
        labels: The weight of the loss of true labels.

    Returns:
        The sum, and the number of distributions. Means over texts and means over tokens are added
        as means: with accumulated parts, each part has its own.
    """
    batch, top = without_teacher(batch)
    forward = partial(run, output_hidden_states=True) if states else run
    out = forward(model, batch, key)
    theirs: PyTree = None if teacher is None else forward(teacher, batch)
    weights = jnp.asarray(batch["weights"])[:, None]
    if kind == "states":
        seen = real_positions(batch, out.last_hidden_state)
        errors = _relative(out.last_hidden_state, theirs.last_hidden_state)
        result = _summed(errors, jnp.where(seen, weights, 0))
    elif kind == "number":
        errors = jnp.square(wide(out.logits) - wide(theirs.logits))
        result = _summed(errors, weights)
    else:
        if theirs is not None:
            top = top_classes(compared(kind, model, batch, theirs.logits)[0], top_k)
        assert top is not None
        logits, counts = compared(kind, model, batch, out.logits)
        result = _summed(top_divergence(top, logits), jnp.where(counts, weights, 0))
    total = result.total
    if states:
        total += states * result.count * state_errors(theirs, out, model, batch).astype(total.dtype)
    if labeled is not None:
        own = labeled(_Ran(model, out), batch, key)
        mean = own.total / jnp.maximum(own.count, jnp.finfo(own.count.dtype).tiny)
        total += labels * result.count * mean.astype(total.dtype)
    return Total(total, result.count)


class _Ran(Model, pytree=False):
    """Stands for a model that has run: gives its output, and has its attributes."""

    def __init__(self, model: Model, out: PyTree):
        self._model, self._out = model, out

    def __call__(self, *_: object, **__: object) -> PyTree:
        """Returns the output."""
        return self._out

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the model."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)


def state_errors(theirs: PyTree, ours: PyTree, model: Model, batch: Batch) -> Float[Array, ""]:
    """Returns the squared error of hidden states relative to the teacher's squares.

    The mean over layers and tokens; padding does not count. In an encoder-decoder, the mean over
    the encoder's layers at source tokens plus that over the decoder's at target tokens.

    Args:
        theirs: The output of the teacher, with hidden states.
        ours: The output of the model.
        model: The model.
        batch: The batch.
    """
    first = getattr(theirs, "encoder", None) or theirs
    seen = real_positions(batch, first.hidden_states[0])
    stacks = [(theirs, ours, seen)]
    if first is not theirs:
        read = _decoded(model, batch, ours.hidden_states[0])
        stacks = [(first, ours.encoder, seen), (theirs, ours, read)]
    means = []
    for theirs, ours, counts in stacks:
        real = jnp.where(counts, jnp.asarray(batch["weights"])[:, None], 0)
        pairs = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
        errors = sum((_relative(a, b) * real).sum() for a, b in pairs) / len(pairs)
        # A part of an accumulated batch may hold nothing but padding.
        means.append(errors / jnp.maximum(real.sum(), jnp.finfo(real.dtype).tiny))
    return jnp.stack(means).sum()


def _relative(ours: Array, theirs: Array) -> Array:
    """Returns the squared error of each state relative to the teacher's squared norm."""
    ours, theirs = wide(ours), wide(theirs)
    size = jnp.square(theirs).sum(-1)
    return jnp.square(ours - theirs).sum(-1) / jnp.maximum(size, jnp.finfo(size.dtype).tiny)


def _summed(values: Array, weights: Array) -> Total:
    return Total((values * weights).sum(), weights.sum())


def kind_of(model: Model, logits_shape: tuple[int, ...] | None) -> Compared:
    """Returns what is compared of a model whose logits have a shape; None for no logits."""
    if logits_shape is None:
        return "states"
    if getattr(getattr(model, "provenance", None), "head", None) == "question-answering":
        return "answer"
    if len(logits_shape) == 2:
        return "number" if logits_shape[1] == 1 else "class"
    return "targets" if reads_targets(model) else "tokens"


class Output(NamedTuple):
    """The outputs of a model that can be compared with another model's.

    Args:
        kind: What is compared.
        classes: The number of classes, or the size of the vocabulary; None without logits, and
            where the classes are places.
        states: The shapes of the hidden states; None if they were not asked for.
    """

    kind: Compared
    classes: int | None
    states: tuple[tuple[int, ...], ...] | None = None


def output_of(model: Model, batch: Batch, *, states: bool = False) -> Output:
    """Returns which outputs a model has for a batch, without computing them."""
    forward = partial(run, output_hidden_states=True) if states else run
    out = jax.eval_shape(forward, model, dict(batch))
    shape = None if out.logits is None else out.logits.shape
    kind = kind_of(model, shape)
    stacks = [out] + ([out.encoder] if getattr(out, "encoder", None) is not None else [])
    shapes = tuple(x.shape for each in stacks for x in each.hidden_states or ())
    shapes = (*shapes, out.last_hidden_state.shape)
    classes = None if shape is None or kind == "answer" else shape[-1]
    return Output(kind, classes, shapes if states or kind == "states" else None)
