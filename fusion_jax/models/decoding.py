"""Text from language models, token by token: greedy, sampled, and by beam search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Generative, Model
from fusion_jax.models.layers import ArrayLike
from fusion_jax.nn.dtypes import wide


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: What logits are divided by.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together have this probability.

    Raises:
        InputError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise InputError(f"temperature must be above 0; got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1]; got {self.top_p}")


@dataclass(frozen=True)
class Beams:
    """How beam search proceeds.

    Args:
        count: Beams per text.
        length_penalty: A text's score is its log-probability divided by its length to this power.
        early_stopping: Whether to stop as soon as all beams of a text have ended; else, when
            no open beam can be better at the length it has.

    Raises:
        InputError: There is no beam.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self):
        if self.count < 1:
            raise InputError(f"beams must be at least 1; got {self.count}")


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
) -> Int[Array, "b n"]:
    """Continues prompts, or gives the target texts of an encoder-decoder.

    Compiled once for the shapes of the inputs and the options; the model's weights are arguments.
    Greedy search and beam search give the tokens of `transformers`' ``generate``.

    Args:
        model: A model with a language-model head.
        input_ids: (b, t) prompts or source texts.
        attention_mask: (b, t), 0 or False at padding, which stands on the left of prompts; None
            if there is none.
        max_new_tokens: How many tokens to generate at most.
        sampling: Draw tokens; None for the likeliest.
        beams: Search with beams; not with ``sampling``.
        eos: The token or tokens that end a text; None for those of the model's configuration, ()
            for none.
        pad: What follows them.
        key: Random key of sampling.

    Returns:
        (b, max_new_tokens) the new tokens, the end token included.

    Raises:
        InputError: The model has no language-model head or too few positions, prompts are padded
            on the right, or a key is missing.

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
    ends = model.config.eos_token_id if eos is None else eos  # () for none at all
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    static = {"room": max_new_tokens, "ends": ends, "pad": pad}
    if beams is not None:
        return _beam_search(model, ids, jnp.asarray(real), beams=beams, **static)
    return _one_by_one(model, ids, jnp.asarray(real), key, sampling=sampling, **static)


def _checked(
    model: Model,
    real: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling | None,
    beams: Beams | None,
    key: Any,
) -> Generative:
    if not isinstance(model, Generative) or not model.has_logits:
        raise InputError(
            "the model has no language-model head; load it with head='causal-lm', or "
            "head='seq2seq-lm' if it is an encoder-decoder"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not real.any(axis=1).all():
        raise InputError("a text has no token: its attention_mask is all 0")
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
    """Logits to draw from: scaled, and minus infinity for tokens that are left out.

    Args:
        logits: The model's.
        sampling: The options, applied in the order of its fields.

    Returns:
        Logits in float32 at least.

    Example:
        >>> filtered(jnp.array([[1.0, 3.0, 2.0]]), Sampling(temperature=0.5, top_k=2)).tolist()
        [[-inf, 6.0, 4.0]]
    """
    logits = wide(logits) / sampling.temperature
    nothing = -jnp.inf
    if 0 < sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, nothing, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        likeliest = jnp.take_along_axis(logits, order, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(likeliest, axis=-1), axis=-1)
        before = before - jax.nn.softmax(likeliest, axis=-1)
        likeliest = jnp.where(before < sampling.top_p, likeliest, nothing)
        back = jnp.argsort(order, axis=-1)
        logits = jnp.take_along_axis(likeliest, back, axis=-1)
    return logits


def _is_end(tokens: Int[Array, "*b"], ends: tuple[int, ...]) -> Bool[Array, "*b"]:
    result = jnp.zeros(tokens.shape, bool)
    for end in ends:
        result |= tokens == end
    return result


@partial(jax.jit, static_argnames=("room", "sampling", "ends", "pad"))
def _one_by_one(
    model: Generative,
    ids: Array,
    real: Array,
    key: Any,
    *,
    room: int,
    sampling: Sampling | None,
    ends: tuple[int, ...],
    pad: int,
) -> Array:
    b = ids.shape[0]
    logits, cache = model.begin(ids, real, room)

    def drawn(i: Any, logits: Array, ended: Array) -> tuple[Array, Array]:
        if sampling is None:
            new = jnp.argmax(logits, axis=-1)
        else:
            at = jax.random.fold_in(key, i)
            new = jax.random.categorical(at, filtered(logits, sampling))
        new = jnp.where(ended, pad, new.astype(jnp.int32))
        return new, ended | _is_end(new, ends)

    def step(state: tuple) -> tuple:
        i, tokens, ended, cache = state
        logits, cache = model.step(tokens[:, i - 1], cache)
        new, ended = drawn(i, logits, ended)
        return i + 1, tokens.at[:, i].set(new), ended, cache

    first, ended = drawn(0, logits, jnp.zeros(b, bool))
    tokens = jnp.full((b, room), pad, jnp.int32).at[:, 0].set(first)
    start = jnp.int32(1), tokens, ended, cache
    return lax.while_loop(lambda s: (s[0] < room) & ~s[2].all(), step, start)[1]


class _Search(NamedTuple):
    """The state of beam search for b texts with k beams each.

    Args:
        length: Tokens so far.
        open: (b, k, n) the tokens of open beams.
        open_scores: (b, k) their log-probabilities.
        done: (b, k, n) the best texts that ended.
        done_scores: (b, k) their scores, with the length penalty.
        ended: (b, k) which of these there are.
        hopeful: (b, 1) whether open beams can still be better.
        stuck: Whether no candidate of the last step goes on.
        logits: (b k, vocabulary) of the next token.
        cache: The model's.
    """

    length: Array
    open: Array
    open_scores: Array
    done: Array
    done_scores: Array
    ended: Array
    hopeful: Array
    stuck: Array
    logits: Array
    cache: Any


@partial(jax.jit, static_argnames=("room", "beams", "ends", "pad"))
def _beam_search(
    model: Generative,
    ids: Array,
    real: Array,
    *,
    room: int,
    beams: Beams,
    ends: tuple[int, ...],
    pad: int,
) -> Array:
    b, k = ids.shape[0], beams.count
    never = -1e9  # adds up without becoming NaN, and loses against any log-probability
    keep = max(2, 1 + len(ends)) * k  # so that k candidates go on even if all others end

    def pick(x: Array, index: Array) -> Array:
        return jax.vmap(lambda x, i: x[i])(x, index)

    def step(s: _Search) -> _Search:
        scores = jax.nn.log_softmax(wide(s.logits), axis=-1).reshape(b, k, -1)
        vocabulary = scores.shape[-1]
        scores = (scores + s.open_scores[..., None]).reshape(b, -1)
        scores, flat = lax.top_k(scores, keep)
        beam, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        texts = pick(s.open, beam).at[:, :, s.length].set(token)
        ends_now = _is_end(token, ends) | (s.length + 1 >= room)

        best, index = lax.top_k(jnp.where(ends_now, scores + never, scores), k)
        parents, tokens = pick(beam, index), pick(token, index)

        # Of the candidates only the first k may end; the others are there to go on.
        counted = ends_now & (jnp.arange(keep) < k)[None]
        length = (s.length + 1).astype(scores.dtype)
        final = scores / length**beams.length_penalty
        full = s.ended.all(-1, keepdims=True) & beams.early_stopping
        final = final + jnp.where(full, never, 0) + jnp.where(s.hopeful, 0, never)
        final = final + jnp.where(counted, 0, never)
        merged = jnp.concatenate([s.done_scores, final], axis=1)
        done_scores, kept = lax.top_k(merged, k)
        ended = pick(jnp.concatenate([s.ended, counted], axis=1), kept)

        worst = jnp.where(ended, done_scores.min(-1, keepdims=True), never)
        possible = best[:, :1] / length**beams.length_penalty
        rows = (parents + jnp.arange(b)[:, None] * k).reshape(-1)
        cache = jax.tree.map(lambda x: x[rows] if x.ndim else x, s.cache)
        logits, cache = model.step(tokens.reshape(-1), cache)
        return _Search(
            length=s.length + 1,
            open=pick(texts, index),
            open_scores=best,
            done=pick(jnp.concatenate([s.done, texts], axis=1), kept),
            done_scores=done_scores,
            ended=ended,
            hopeful=s.hopeful & (possible > worst).any(-1, keepdims=True),
            stuck=ends_now.all(),
            logits=logits,
            cache=cache,
        )

    def goes_on(s: _Search) -> Array:
        open_beam = ~(s.ended.all() & beams.early_stopping)
        return s.hopeful.any() & open_beam & ~s.stuck & (s.length < room)

    logits, cache = jax.tree.map(
        lambda x: jnp.repeat(x, k, axis=0) if x.ndim else x, model.begin(ids, real, room)
    )
    empty = jnp.full((b, k, room), pad, jnp.int32)
    start = _Search(
        length=jnp.int32(0),
        open=empty,
        # All beams are equal at first: only one of them counts.
        open_scores=jnp.where(jnp.arange(k) == 0, 0.0, never)[None].repeat(b, 0),
        done=empty,
        done_scores=jnp.full((b, k), never),
        ended=jnp.zeros((b, k), bool),
        hopeful=jnp.ones((b, 1), bool),
        stuck=jnp.array(False),
        logits=logits,
        cache=cache,
    )
    return lax.while_loop(goes_on, step, start).done[:, 0]
