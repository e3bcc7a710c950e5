"""The base of decoder-only models: embeddings, layers, a final norm, and the heads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.models.base import DecoderOutput, Generative, Head, check_positions
from fusion_jax.models.cache import Cache, CacheUpdate, Reach, Window, window
from fusion_jax.models.layers import ArrayLike, Dropout, OutputBias, split_key, token_mask
from fusion_jax.models.rules import LINEAR, KeyRule, KeyRules
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.linear_forms import dtype_of

_CLASSES: dict[Head, str] = {
    "causal-lm": "ForCausalLM",
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
ALL_HEADS = tuple(_CLASSES)
"""The heads that a decoder can have."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The fields of a ``config.json`` for the heads of a decoder, with transformers' defaults."""

    num_labels: int = 2
    pad_token_id: int | None = None
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None

    @property
    def head_dropout(self) -> float:
        """The dropout of a token-classification head."""
        rates = (self.classifier_dropout, self.hidden_dropout, 0.1)
        return next(rate for rate in rates if rate is not None)


def decoder_architectures(
    name: str, heads: Collection[Head] = ALL_HEADS, **other: str
) -> dict[Head | None, str]:
    """Returns the classes in `transformers` of a family of decoders, by head; see `Family`.

    Args:
        name: What the names of the classes begin with.
        heads: The heads that the family has in `transformers`.
        other: The end of the name of a class that is not as usual, by head with underscores;
            ``base`` for the class without a head.
    """
    result: dict[Head | None, str] = {None: name + other.get("base", "Model")}
    for head in heads:
        result[head] = name + other.get(head.replace("-", "_"), _CLASSES[head])
    return result


def with_head(
    rules: KeyRules, head: Head | None, *, tokens: str = "score", answers: str | None = None
) -> KeyRules:
    """Adds a head to the key rules of a decoder.

    Args:
        rules: The rules of the base model and of the language-model head.
        head: The head.
        tokens: The name of the layer of a token-classification head.
        answers: What precedes the names of the base model in a checkpoint with a question-answering
            head; None for the same as with other heads.

    Returns:
        The rules.
    """
    layers = {
        "classification": "score",
        "token-classification": tokens,
        "question-answering": "qa_outputs",
    }
    if head in layers:
        own = KeyRule("head", layers[head], LINEAR, in_base=False)
        rules = replace(rules, rules=(*rules.rules, own))
    if answers is None:
        return rules
    if head == "question-answering":
        return replace(rules, prefix=answers, other_prefixes=(rules.prefix,))
    return replace(rules, other_prefixes=(answers,))


def _head_layer(config: Any, head: Head | None, word: nnx.Embed, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns the layer of a head other than a language model's."""
    return nnx.Linear(
        word.features,
        2 if head == "question-answering" else config.num_labels,
        use_bias=head != "classification",
        kernel_init=nnx.initializers.normal(config.initializer_range),
        param_dtype=dtype_of(word),
        rngs=rngs,
    )


class Start(NamedTuple):
    """The inputs that all layers of a decoder share in one call.

    Args:
        ids: (b, t) the tokens.
        positions: (b, t) their positions.
        seen: What they attend to, by the size of the layer's window.
        context: The argument ``context`` of the layers.
    """

    ids: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    seen: dict[Reach, Window]
    context: Any


class CausalLm(Generative):
    """A decoder-only model.

    A call ``layer(x, seen, cache, context, key)`` of each layer returns the new x, and the logits
    of its router or None.

    Args:
        config: The configuration, a `HeadConfig`.
        word: The token embeddings.
        layers: The layers.
        norm: The final normalization, or None.
        lm_head: The output layer; None if the token embeddings are used.
        head: The head, or None.
        kv_heads: The number of key-value heads of each layer.
        head_dim: The number of features of each head.
        value_dim: The number of features of its values; None for the same.
        sliding_windows: What a token attends to in each layer.
        rngs: Random keys of the head.
    """

    layers_apart: bool = True
    """Whether a layer needs only the output of the one before, and `start` needs no weights."""

    def __init__(
        self,
        config: Any,
        *,
        word: nnx.Embed,
        layers: list[nnx.Module],
        norm: nnx.Module | None,
        lm_head: nnx.Linear | OutputBias | None,
        head: Head | None,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        sliding_windows: tuple[Reach, ...],
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.word: AnyEmbed = word
        self.layers = nnx.List(layers)
        self.norm = norm
        self.has_logits = head == "causal-lm"
        self.lm_head = lm_head if self.has_logits else None
        self.per_text = head == "classification"
        own_head = head is not None and not self.has_logits
        self.head = _head_layer(config, head, word, rngs) if own_head else None
        self.head_dropout = Dropout(config.head_dropout if head == "token-classification" else 0.0)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.sliding_windows = sliding_windows

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns the input of the first layer."""
        raise NotImplementedError

    def finish(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the last hidden state, from the output of the last layer."""
        return x if self.norm is None else self.norm(x)  # type: ignore[operator]

    def context(self, positions: Int[Array, "b t"], slots: int | None) -> Any:
        """Returns the argument ``context`` of all layers.

        Args:
            positions: (b, t) the position of each token in its text.
            slots: The number of slots of the cache, the most tokens that a text will have; None
                without a cache.
        """

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        position_ids: Int[ArrayLike, "b t"] | None = None,
        *,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> DecoderOutput:
        """Reads a batch of texts; each token attends to itself and to the tokens before it.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 0 or False at padding, on either side; None without padding.
            position_ids: (b, t); None to count tokens, without padding.
            cache: The cache of earlier calls, to continue their texts.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            Hidden states and the logits of the head, in the dtype of the parameters, and the new
            cache.
        """
        key, head_key = split_key(key, 2) if self.head is not None else (key, None)
        out = self._read(input_ids, attention_mask, position_ids, cache, key, output_hidden_states)
        x = out.last_hidden_state
        if self.head is not None:
            if self.per_text:
                x = x[jnp.arange(len(x)), self._last(input_ids, attention_mask)]
            return out._replace(logits=self.head(self.head_dropout(x, head_key)))
        return out._replace(logits=self.logits(x)) if self.has_logits else out

    def _last(
        self, input_ids: Int[ArrayLike, "b t"], attention_mask: Shaped[ArrayLike, "b t"] | None
    ) -> Int[Array, " b"]:
        """Returns the position of the last token of each text that is not padding.

        As in transformers, a token with the id of padding is padding. In transformers the mask does
        not count; there, several texts without ``pad_token_id`` are an error.
        """
        ids = jnp.asarray(input_ids)
        real = token_mask(ids, attention_mask)
        if self.config.pad_token_id is not None:
            real &= ids != self.config.pad_token_id
        return jnp.where(real, jnp.arange(ids.shape[1])[None], 0).argmax(axis=1)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of hidden states."""
        return self.word.attend(x) if self.lm_head is None else self.lm_head(x)

    def _read(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None,
        position_ids: Int[ArrayLike, "b t"] | None,
        cache: Cache | None,
        key: Key[Array, ""] | None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        start = self.start(input_ids, attention_mask, position_ids, cache)
        *keys, embed_key = split_key(key, len(self.layers) + 1)
        update = CacheUpdate(cache)
        x = self.embed(start.ids, start.positions, embed_key)
        states, routers = [x], []
        for layer, size, layer_key in zip(self.layers, self.sliding_windows, keys, strict=True):
            x, router = layer(x, start.seen[size], update, start.context, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        states[-1] = self.finish(x)
        return DecoderOutput(
            states[-1],
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=update.result(next(iter(start.seen.values()))),
        )

    def start(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None,
        position_ids: Int[ArrayLike, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Start:
        """Returns what a call gives to `embed` and to all layers."""
        ids = jnp.asarray(input_ids)
        if attention_mask is None and position_ids is None and cache is None:
            check_positions(self, ids.shape[1])
        real = token_mask(ids, attention_mask)
        seen = {size: window(real, cache, size) for size in set(self.sliding_windows)}
        positions = next(iter(seen.values())).positions
        positions = positions if position_ids is None else jnp.asarray(position_ids)
        slots = None if cache is None else cache.real.shape[1]
        return Start(ids, positions, seen, self.context(positions, slots))

    def empty_cache(self, b: int, slots: int) -> Cache:
        """Returns a cache without tokens for b texts of at most as many tokens as slots."""
        layers, dtype = len(self.layers), dtype_of(self.word)
        return Cache.empty(b, slots, layers, self.kv_heads, self.head_dim, dtype, v=self.value_dim)

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads prompts, padded on the left; see `Generative.begin`."""
        b, t = input_ids.shape
        out = self._read(input_ids, attention_mask, None, self.empty_cache(b, t + room), None)
        return self.logits(out.last_hidden_state[:, -1]), out.cache

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads one more token of each text; see `Generative.step`."""
        out = self._read(tokens[:, None], None, None, cache, None)
        return self.logits(out.last_hidden_state[:, 0]), out.cache
