"""Generates text with language models: greedy, by sampling, and by beam search."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Generative, Model
from fusion_jax.models.layers import ArrayLike
from fusion_jax.models.tokens import check_finite, check_tokens
from fusion_jax.nn.dtypes import wide


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn at random.

    Args:
        temperature: Logits are divided by this.
        top_k: Draw from this number of the likeliest tokens; 0 for all.
        top_p: Draw from the likeliest tokens that together have this probability.

    Raises:
        InputError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise InputError(f"temperature must be above 0; got {self.temperature}")
        check_at_least(0, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1]; got {self.top_p}")


@dataclass(frozen=True)
class Beams:
    """The options of beam search.

    Args:
        count: The number of beams for each text.
        length_penalty: The score of a text is its log-probability divided by its length to this
            power.
        early_stopping: When the search for a text stops: True, as soon as there are ``count``
            finished texts; False, when no unfinished text, at its present length, has a better
            score than the worst of them.

    Raises:
        InputError: ``count`` is below 1.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self):
        check_at_least(1, beams=self.count)


@on_auto_axes
def generate(
    model: Model,
    input_ids: Int[ArrayLike, "b t"],
    attention_mask: Shaped[ArrayLike, "b t"] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    beams: Beams | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int = 0,
    key: Key[Array, ""] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Int[Array, "b n"]:
    """Generates text: continues prompts, or writes the target texts of an encoder-decoder.

    It compiles once for each shape of the inputs and each set of options. Greedy search and beam
    search return the same tokens as ``generate`` of `transformers`.

    Args:
        model: A model with a language-model head.
        input_ids: (b, t) token ids of the prompts or source texts.
        attention_mask: (b, t), 0 or False at padding; prompts are padded on the left. None without
            padding.
        max_new_tokens: The largest number of tokens to generate.
        sampling: Draw tokens at random; None for the likeliest token.
        beams: Use beam search; not together with ``sampling``.
        eos: The id or ids of tokens that end a text. None for those of the model's
            ``generation_config.json`` or ``config.json``, () for texts that do not end. No other
            setting of these files is applied.
        pad: The token id that follows the end of a text.
        key: Random key of sampling.
        inputs: What else a model reads, by name: Whisper's ``input_features``, of which the prompts
            say how to write them down.

    Returns:
        (b, max_new_tokens) the new tokens, int32, including the end token.

    Raises:
        InputError: The model has no language-model head or too few positions, a token has no
            embedding, prompts are padded on the right, or sampling has no key.
        FloatingPointError: The logits are NaN or infinite.

    Example:
        >>> from flax import nnx
        >>> from fusion_jax.models.gpt2 import Gpt2, Gpt2Config
        >>> config = Gpt2Config(vocab_size=50, n_positions=16, n_embd=8, n_head=2, n_layer=1)
        >>> model = Gpt2(config, head="causal-lm", rngs=nnx.Rngs(0))
        >>> generate(model, jnp.array([[3, 7, 9]]), max_new_tokens=4).shape
        (1, 4)
    """
    ids = jnp.asarray(input_ids)
    real = np.ones(ids.shape, bool)
    if attention_mask is not None:
        real = np.asarray(attention_mask).astype(bool)
    model = _checked(model, real, max_new_tokens, sampling, beams, key)
    ends = model.config.eos_token_id if eos is None else eos
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    known = list(inspect.signature(type(model).begin).parameters)[4:]
    for name in set(inputs or {}) - set(known):
        raise InputError(f"{model.config.model_type} has no input {name!r} to generate text from")
    static = {"room": max_new_tokens, "ends": ends, "pad": pad, "inputs": dict(inputs or {})}
    check_tokens(model, [np.where(real, ids, 0)])
    if beams is not None:
        texts, finite = _beam_search(model, ids, jnp.asarray(real), beams=beams, **static)
    else:
        texts, finite = _greedy_or_sampled(
            model, ids, jnp.asarray(real), key, sampling=sampling, **static
        )
    check_finite(0.0 if finite else np.nan, "the logits")
    return texts


def _checked(
    model: Model,
    real: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling | None,
    beams: Beams | None,
    key: Key[Array, ""] | None,
) -> Generative:
    """Returns the model, if it can generate texts for these inputs and options."""
    if not isinstance(model, Generative) or not model.has_logits:
        raise InputError(
            "the model has no language-model head; load it with head='causal-lm', or "
            "head='seq2seq-lm' if it is an encoder-decoder"
        )
    check_at_least(1, max_new_tokens=max_new_tokens)
    if not real.any(axis=1).all():
        raise InputError("a text has no tokens: its attention_mask is 0 everywhere")
    if model.reads_prompts:
        if not real[:, -1].all():
            raise InputError("prompts are padded on the right; pad them on the left")
        limit, needed = model.max_length, int(real.sum(axis=1).max()) + max_new_tokens
        if limit is not None and needed > limit:
            raise InputError(f"the model has {limit} positions; these texts need {needed}")
    if sampling is not None:
        if beams is not None:
            raise InputError("give sampling or beams, not both")
        if key is None:
            raise InputError("sampling needs key=, such as jax.random.key(0)")
    return model


def filtered(logits: Float[Array, "b vocab"], sampling: Sampling) -> Float[Array, "b vocab"]:
    """Returns the logits to draw from: scaled, and minus infinity for excluded tokens.

    Args:
        logits: (b, vocabulary) the logits of the model.
        sampling: The options, applied in the order of its fields.

    Returns:
        (b, vocabulary) in float32 or wider.

    Example:
        >>> filtered(jnp.array([[1.0, 3.0, 2.0]]), Sampling(temperature=0.5, top_k=2)).tolist()
        [[-inf, 6.0, 4.0]]
    """
    logits = wide(logits) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        likeliest = jnp.take_along_axis(logits, order, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(likeliest, axis=-1), axis=-1)
        before = before - jax.nn.softmax(likeliest, axis=-1)
        likeliest = jnp.where(before < sampling.top_p, likeliest, -jnp.inf)
        back = jnp.argsort(order, axis=-1)
        logits = jnp.take_along_axis(likeliest, back, axis=-1)
    return logits


def _is_end(tokens: Int[Array, "*b"], ends: tuple[int, ...]) -> Bool[Array, "*b"]:
    return jnp.isin(tokens, jnp.array(ends, jnp.int32))


@partial(jax.jit, static_argnames=("room", "sampling", "ends", "pad"))
def _greedy_or_sampled(
    model: Generative,
    ids: Array,
    real: Array,
    key: Key[Array, ""] | None,
    *,
    inputs: Mapping[str, Array],
    room: int,
    sampling: Sampling | None,
    ends: tuple[int, ...],
    pad: int,
) -> tuple[Array, Array]:
    b = ids.shape[0]
    logits, cache = model.begin(ids, real, room, **inputs)

    def next_tokens(i: int | Array, logits: Array, ended: Array) -> tuple[Array, Array]:
        if sampling is None:
            new = jnp.argmax(logits, axis=-1)
        else:
            assert key is not None
            step_key = jax.random.fold_in(key, i)
            new = jax.random.categorical(step_key, filtered(logits, sampling))
        new = jnp.where(ended, pad, new.astype(jnp.int32))
        return new, ended | _is_end(new, ends)

    def step(state: tuple) -> tuple:
        i, tokens, ended, finite, cache = state
        logits, cache = model.step(tokens[:, i - 1], cache)
        finite &= (_finite(logits) | ended).all()
        new, ended = next_tokens(i, logits, ended)
        return i + 1, tokens.at[:, i].set(new), ended, finite, cache

    first, ended = next_tokens(0, logits, jnp.zeros(b, bool))
    tokens = jnp.full((b, room), pad, jnp.int32).at[:, 0].set(first)
    start = jnp.int32(1), tokens, ended, _finite(logits).all(), cache
    _, tokens, _, finite, _ = lax.while_loop(lambda s: (s[0] < room) & ~s[2].all(), step, start)
    return tokens, finite


def _finite(logits: Float[Array, "b vocab"]) -> Bool[Array, " b"]:
    """Returns which rows have a finite largest logit and no NaN; minus infinity is allowed."""
    return jnp.isfinite(logits.max(axis=-1))


class _Search(NamedTuple):
    """The state of beam search for b texts with k beams each and up to n tokens.

    Args:
        length: The number of tokens so far.
        running: (b, k, n) the tokens of unfinished texts.
        running_scores: (b, k) their log-probabilities.
        finished: (b, k, n) the best finished texts.
        finished_scores: (b, k) their scores, with the length penalty.
        is_finished: (b, k) which of the k places hold a finished text.
        can_improve: (b, 1) whether a running text can still become one of the best.
        all_ended: Whether all candidates of the last step ended.
        finite: Whether all logits so far were finite.
        logits: (b k, vocabulary) the logits of the next token.
        cache: The cache of the model.
    """

    length: Array
    running: Array
    running_scores: Array
    finished: Array
    finished_scores: Array
    is_finished: Array
    can_improve: Array
    all_ended: Array
    finite: Array
    logits: Array
    cache: Any


@partial(jax.jit, static_argnames=("room", "beams", "ends", "pad"))
def _beam_search(
    model: Generative,
    ids: Array,
    real: Array,
    *,
    inputs: Mapping[str, Array],
    room: int,
    beams: Beams,
    ends: tuple[int, ...],
    pad: int,
) -> tuple[Array, Array]:
    b, k = ids.shape[0], beams.count
    never = -1e9  # sums of it are finite, and it is below every log-probability
    keep = max(2, 1 + len(ends)) * k  # so that at least k candidates do not end

    def pick(x: Array, index: Array) -> Array:
        return jax.vmap(lambda x, i: x[i])(x, index)

    def step(s: _Search) -> _Search:
        scores = jax.nn.log_softmax(wide(s.logits), axis=-1).reshape(b, k, -1)
        vocabulary = scores.shape[-1]
        scores = (scores + s.running_scores[..., None]).reshape(b, -1)
        scores, flat = lax.top_k(scores, keep)
        beam, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        texts = pick(s.running, beam).at[:, :, s.length].set(token)
        ends_now = _is_end(token, ends) | (s.length + 1 >= room)

        best, index = lax.top_k(jnp.where(ends_now, scores + never, scores), k)
        parents, tokens = pick(beam, index), pick(token, index)

        # Only the first k candidates may finish; the others replace those that end.
        counted = ends_now & (jnp.arange(keep) < k)[None]
        length = (s.length + 1).astype(scores.dtype)
        final = scores / length**beams.length_penalty
        full = s.is_finished.all(-1, keepdims=True) & beams.early_stopping
        final = final + jnp.where(full, never, 0) + jnp.where(s.can_improve, 0, never)
        final = final + jnp.where(counted, 0, never)
        merged = jnp.concatenate([s.finished_scores, final], axis=1)
        finished_scores, kept = lax.top_k(merged, k)
        is_finished = pick(jnp.concatenate([s.is_finished, counted], axis=1), kept)

        worst = jnp.where(is_finished, finished_scores.min(-1, keepdims=True), never)
        possible = best[:, :1] / length**beams.length_penalty
        rows = (parents + jnp.arange(b)[:, None] * k).reshape(-1)
        cache = jax.tree.map(lambda x: x[rows] if x.ndim else x, s.cache)
        logits, cache = model.step(tokens.reshape(-1), cache)
        return _Search(
            length=s.length + 1,
            running=pick(texts, index),
            running_scores=best,
            finished=pick(jnp.concatenate([s.finished, texts], axis=1), kept),
            finished_scores=finished_scores,
            is_finished=is_finished,
            can_improve=s.can_improve & (possible > worst).any(-1, keepdims=True),
            all_ended=ends_now.all(),
            finite=s.finite & _finite(s.logits).all(),
            logits=logits,
            cache=cache,
        )

    def is_running(s: _Search) -> Array:
        stopped_early = s.is_finished.all() & beams.early_stopping
        return s.can_improve.any() & ~stopped_early & ~s.all_ended & (s.length < room)

    logits, cache = jax.tree.map(
        lambda x: jnp.repeat(x, k, axis=0) if x.ndim else x, model.begin(ids, real, room, **inputs)
    )
    empty = jnp.full((b, k, room), pad, jnp.int32)
    start = _Search(
        length=jnp.int32(0),
        running=empty,
        # All beams are equal at the start: only one of them counts.
        running_scores=jnp.where(jnp.arange(k) == 0, 0.0, never)[None].repeat(b, 0),
        finished=empty,
        finished_scores=jnp.full((b, k), never),
        is_finished=jnp.zeros((b, k), bool),
        can_improve=jnp.ones((b, 1), bool),
        all_ended=jnp.array(False),
        finite=jnp.array(True),
        logits=logits,
        cache=cache,
    )
    end = lax.while_loop(is_running, step, start)
    return end.finished[:, 0], end.finite
