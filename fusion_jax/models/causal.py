"""What decoder-only language models share: embeddings, layers, a final norm, and logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.models.base import DecoderOutput, Generative, Head
from fusion_jax.models.layers import ArrayLike, Cache, Memory, window
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.linear_forms import dtype_of


class CausalLm(Generative):
    """A decoder-only language model.

    Each layer is called as ``layer(x, seen, memory, context, key)`` and gives the new x and the
    logits of its router or None.

    Args:
        config: Its configuration.
        word: The token embeddings.
        layers: The layers.
        norm: The final normalisation.
        lm_head: The output layer; None where it is the token embeddings.
        head: ``"causal-lm"`` for logits, or None.
        groups: Key-value heads of each layer.
        head_dim: Features of each head.
        reaches: How many positions back each layer sees; None for all.
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
        groups: int,
        head_dim: int,
        reaches: tuple[int | None, ...],
    ):
        self.config = config
        self.word = word
        self.layers = nnx.List(layers)
        self.norm = norm
        self.lm_head = lm_head if head else None
        self.has_logits = head is not None
        self.groups, self.head_dim, self.reaches = groups, head_dim, reaches

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """The input of the first layer."""
        raise NotImplementedError

    def context(self, positions: Int[Array, "b t"]) -> Any:
        """What all layers need to know of the positions."""

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
        """Reads a batch of token sequences; each position sees those before it.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 0 or False at padding, on either side; None if there is none.
            position_ids: (b, t); None to count the tokens, not the padding.
            cache: What earlier calls returned, to continue their sequences.
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
        """The logits of hidden states."""
        return self.word.attend(x) if self.lm_head is None else self.lm_head(x)

    def _read(
        self,
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        cache: Cache | None,
        key: Key[Array, ""] | None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        ids = jnp.asarray(input_ids)
        real = jnp.ones(ids.shape, bool)
        if attention_mask is not None:
            real = jnp.asarray(attention_mask).astype(bool)
        seen = {reach: window(real, cache, reach) for reach in set(self.reaches)}
        any_window = next(iter(seen.values()))
        positions = any_window.positions if position_ids is None else jnp.asarray(position_ids)
        n = len(self.layers)
        keys = (None,) * (n + 1) if key is None else tuple(jax.random.split(key, n + 1))
        memory = Memory(cache)
        context = self.context(positions)
        x = self.embed(ids, positions, keys[n])
        states, routers = [x], []
        for layer, reach, layer_key in zip(self.layers, self.reaches, keys[:n], strict=True):
            x, router = layer(x, seen[reach], memory, context, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        states[-1] = self.norm(x)  # type: ignore[operator]
        return DecoderOutput(
            states[-1],
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=memory.written(any_window),
        )

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads prompts, padded on the left; see `Generative.begin`."""
        b, t = input_ids.shape
        dtype = dtype_of(self.word)
        cache = Cache.empty(b, t + room, len(self.layers), self.groups, self.head_dim, dtype)
        out = self._read(input_ids, attention_mask, None, cache, None)
        return self.logits(out.last_hidden_state[:, -1]), out.cache

    def step(self, tokens: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b vocab"], Cache]:
        """Reads one more token of each text; see `Generative.step`."""
        out = self._read(tokens[:, None], None, None, cache, None)
        return self.logits(out.last_hidden_state[:, 0]), out.cache
