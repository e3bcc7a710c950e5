"""The base of decoder-only language models: embeddings, layers, a final norm, and logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.models.base import DecoderOutput, Generative, Head, check_positions
from fusion_jax.models.layers import ArrayLike, Cache, CacheUpdate, split_key, token_mask, window
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.linear_forms import dtype_of


class CausalLm(Generative):
    """A decoder-only language model.

    A call ``layer(x, seen, cache, context, key)`` of each layer returns the new x, and the logits
    of its router or None.

    Args:
        config: The configuration.
        word: The token embeddings.
        layers: The layers.
        norm: The final normalization.
        lm_head: The output layer; None if the token embeddings are used.
        head: ``"causal-lm"`` for logits, or None.
        kv_heads: The number of key-value heads of each layer.
        head_dim: The number of features of each head.
        sliding_windows: For each layer the number of positions that a token attends to; None for
            all.
    """

    def __init__(
        self,
        config: Any,
        *,
        word: AnyEmbed,
        layers: list[nnx.Module],
        norm: nnx.Module,
        lm_head: nnx.Linear | None,
        head: Head | None,
        kv_heads: int,
        head_dim: int,
        sliding_windows: tuple[int | None, ...],
    ):
        self.config = config
        self.word = word
        self.layers = nnx.List(layers)
        self.norm = norm
        self.lm_head = lm_head if head else None
        self.has_logits = head is not None
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.sliding_windows = sliding_windows

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns the input of the first layer."""
        raise NotImplementedError

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
            Hidden states and logits, in the dtype of the parameters, and the new cache.
        """
        out = self._read(input_ids, attention_mask, position_ids, cache, key, output_hidden_states)
        if not self.has_logits:
            return out
        return out._replace(logits=self.logits(out.last_hidden_state))

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
        ids = jnp.asarray(input_ids)
        if attention_mask is None and position_ids is None and cache is None:
            check_positions(self, ids.shape[1])
        real = token_mask(ids, attention_mask)
        seen = {size: window(real, cache, size) for size in set(self.sliding_windows)}
        any_window = next(iter(seen.values()))
        positions = any_window.positions if position_ids is None else jnp.asarray(position_ids)
        *keys, embed_key = split_key(key, len(self.layers) + 1)
        update = CacheUpdate(cache)
        context = self.context(positions, None if cache is None else cache.real.shape[1])
        x = self.embed(ids, positions, embed_key)
        states, routers = [x], []
        for layer, size, layer_key in zip(self.layers, self.sliding_windows, keys, strict=True):
            x, router = layer(x, seen[size], update, context, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        states[-1] = self.norm(x)  # type: ignore[operator]
        return DecoderOutput(
            states[-1],
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=update.result(any_window),
        )

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads prompts, padded on the left; see `Generative.begin`."""
        b, t = input_ids.shape
        dtype = dtype_of(self.word)
        cache = Cache.empty(b, t + room, len(self.layers), self.kv_heads, self.head_dim, dtype)
        out = self._read(input_ids, attention_mask, None, cache, None)
        return self.logits(out.last_hidden_state[:, -1]), out.cache

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads one more token of each text; see `Generative.step`."""
        out = self._read(tokens[:, None], None, None, cache, None)
        return self.logits(out.last_hidden_state[:, 0]), out.cache
