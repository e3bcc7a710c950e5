"""The decoder that most language models are: Llama's, and flags for what differs.

A family's file says how the fields of its ``config.json`` set the flags, and where its tensors are;
`fusion_jax.models.decoder_families.decoder_family` makes its `Family` from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.models.base import Head
from fusion_jax.models.cache import Cache, CacheUpdate, KeysValues, Window
from fusion_jax.models.causal import (
    CausalLm,
)
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.delta import DeltaNet, with_states
from fusion_jax.models.latent_attention import LatentAttention
from fusion_jax.models.layers import (
    Dropout,
    HeadNorms,
    LayerNorm,
    OutputBias,
    RmsNorm,
    WideRmsNorm,
    alibi_bias,
    attention,
    soft_capped,
    split_key,
    unit_rms,
)
from fusion_jax.models.moe import Moe
from fusion_jax.models.rope import Rope
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.mlp import GatedMlp, Mlp

Context = Mapping[Rope | None, Float[Array, "b t *half"]]
"""The angles of each rotary embedding; under None the factors of queries without one."""


class Attention(nnx.Module):
    """Attention, with rotary positions if there are any; query heads can share keys and values."""

    def __init__(self, config: DecoderConfig, rope: Rope | None, make: LayerFactory):
        d, f = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.rope, self.features = rope, f
        self.scale, self.cap = config.blocks.score_scale, config.blocks.score_cap
        self.clip, self.epsilon = config.blocks.clip_qkv, config.rms_norm_eps
        self.unit_norms = config.blocks.unit_norms
        self.sinks = make.array(heads) if config.blocks.sinks else None
        self.gated = config.blocks.gated_attention
        queries = heads * f * (2 if self.gated else 1)
        self.query = make.linear(d, queries, use_bias=config.qkv_bias)
        self.reuses, self.keeps = config.blocks.reuses, config.blocks.keeps
        own, self.value_normed = self.reuses is None, config.blocks.value_normed
        apart = own and not config.blocks.keys_as_values
        key = partial(make.linear, d, kv_heads * f, use_bias=config.qkv_bias)
        self.key: Any = key() if own else None
        self.value: Any = key() if apart else None
        self.out = make.linear(heads * f, d, use_bias=config.out_bias)
        self.all_normed = config.blocks.query_key_norm == "all"
        self.normed_last = config.blocks.normed_last
        self.query_norm = make.head_norm(heads, f)
        self.key_norm: Any = make.head_norm(kv_heads, f) if own else None
        self.dropout = Dropout(config.attention_dropout)

    def _heads(self, y: Float[Array, "b t _"]) -> Float[Array, "b t h f"]:
        """Returns queries, keys or values by head."""
        y = y if self.clip is None else jnp.clip(y, -self.clip, self.clip)
        return y.reshape(*y.shape[:2], -1, self.features)

    def _placed(
        self, y: Float[Array, "b t h f"], norm: Callable[[Array], Array] | None, context: Context
    ) -> Float[Array, "b t h f"]:
        """Returns queries or keys, normalized by head and rotated."""
        norm = None if self.all_normed else norm
        y = norm(y) if norm is not None and not self.normed_last else y
        if self.rope is not None:
            y = self.rope.rotated(y, context[self.rope])
            y = unit_rms(y, self.epsilon) if self.unit_norms else y
        return norm(y) if norm is not None and self.normed_last else y

    def _keys_values(
        self, x: Float[Array, "b t d"], cache: CacheUpdate, context: Context
    ) -> KeysValues:
        """Returns the keys and values of all tokens, those of the cache first."""
        if self.reuses is not None:
            return cache.reused(self.reuses)
        k = self.key(x)
        k = self._heads(self.key_norm(k) if self.all_normed else k)
        v = k if self.value is None else self._heads(self.value(x))
        v = unit_rms(v, self.epsilon) if self.value_normed else v
        return cache.extended(self._placed(k, self.key_norm, context), v, self.keeps)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        cache: CacheUpdate,
        context: Context,
        key: Key[Array, ""] | None,
        bias: Float[Array, "b h 1 s"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones; the bias is added to the scores."""
        q, gate = self.query(x), None
        q = self.query_norm(q) if self.all_normed else q
        if self.gated:
            q, gate = jnp.split(q.reshape(*q.shape[:2], -1, 2 * self.features), 2, axis=-1)
            q = q.reshape(*x.shape[:2], -1)
        q = self._placed(self._heads(q), self.query_norm, context)
        if self.rope is None and None in context:
            q = (wide(q) * context[None][..., None, None]).astype(x.dtype)
        k, v = self._keys_values(x, cache, context)
        sinks = None if self.sinks is None else self.sinks[...]
        more = {"scale": self.scale, "cap": self.cap, "bias": bias, "sinks": sinks}
        y = attention(q, k, v, visible, self.dropout, key, **more)
        y = y if gate is None else y * jax.nn.sigmoid(gate)
        return self.out(y.reshape(*x.shape[:2], -1))


class LayerFactory:
    """Makes the layers of a model, all with its initializer, dtype, epsilon and random keys."""

    def __init__(self, config: DecoderConfig, param_dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        shared = config.shared_expert_intermediate_size
        common = {"param_dtype": param_dtype, "rngs": rngs}
        norms: dict[str, Callable[..., nnx.Module]] = {
            "rms": RmsNorm,
            "rms-wide": WideRmsNorm,
            "rms-offset": partial(WideRmsNorm, offset=1.0),
            "layer": LayerNorm,
            "layer-offset": partial(LayerNorm, offset=1.0),
            "layer-scaled": partial(LayerNorm, use_bias=False),
            "layer-bare": partial(LayerNorm, use_bias=False, use_scale=False),
        }
        self.dtype, self.rngs = param_dtype, rngs
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.norm = partial(norms[config.blocks.norm], epsilon=config.rms_norm_eps, **common)
        self._heads_norm = partial(HeadNorms, epsilon=config.rms_norm_eps, **common)
        self._query_key_norm = config.blocks.query_key_norm
        self.embed = partial(nnx.Embed, embedding_init=init, **common)
        self.mlp = partial(
            GatedMlp if config.blocks.gated else Mlp,
            config.hidden_size,
            act=config.blocks.act or config.hidden_act,
            use_bias=config.mlp_bias,
            kernel_init=init,
            param_dtype=param_dtype,
        )
        self.moe = partial(
            Moe,
            partial(self.mlp, width=config.moe_intermediate_size),
            config.hidden_size,
            config.num_experts,
            top_k=config.num_experts_per_tok,
            normalized=config.norm_topk_prob,
            jitter=config.router_jitter_noise,
            rule=config.router,
            shared=partial(self.mlp, width=shared) if shared else None,
            kernel_init=init,
            **common,
        )
        self.array = lambda *shape: nnx.Param(init(rngs.params(), shape, param_dtype))
        self.dense = partial(self.mlp, width=config.intermediate_size, rngs=rngs)
        self._logits = config.tie_word_embeddings, config.blocks.logit_bias
        self._bias = partial(OutputBias, param_dtype=param_dtype)

    def lm_head(self, d: int, vocab: int) -> nnx.Linear | OutputBias | None:
        """Returns what the head of a language model has beside the embeddings, if anything."""
        tied, bias = self._logits
        if tied:
            return self._bias(vocab) if bias else None
        return self.linear(d, vocab, use_bias=bias)

    def head_norm(self, heads: int, features: int) -> Any:
        """Returns the norm of queries or keys; None if there is none."""
        if self._query_key_norm == "apart":
            return self._heads_norm(heads, features)
        size = heads * features if self._query_key_norm == "all" else features
        return self.norm(size) if self._query_key_norm else None


class Layer(nnx.Module):
    """One layer: attention and MLP, each with its norms and inside a residual connection."""

    def __init__(self, config: DecoderConfig, index: int, make: LayerFactory):
        d, blocks = config.hidden_size, config.blocks
        before = blocks.norms in ("before", "both", "shared")
        after = blocks.norms in ("after", "both", "outside")
        self.attention_norm = make.norm(d) if before else None
        rope = config.ropes[index]
        self.attention: Attention | LatentAttention | DeltaNet
        if config.delta_layers[index]:
            self.attention = DeltaNet(config, make)
        elif config.latent is None:
            self.attention = Attention(config, rope, make)
        else:
            assert rope is not None
            self.attention = LatentAttention(config, rope, make)
        self.attention_post_norm = make.norm(d) if after else None
        self.mlp_norm = make.norm(d) if before and blocks.norms != "shared" else None
        self.mlp = make.moe() if config.sparse[index] else make.dense()
        self.mlp_post_norm = make.norm(d) if after else None
        self.residual_scale, self.outside = blocks.residual_scale, blocks.norms == "outside"
        self.parallel, self.shared = blocks.parallel, blocks.norms == "shared"
        self.residual_normed, self.joint_dropout = blocks.residual_normed, blocks.joint_dropout
        self.alibi, self.heads = blocks.alibi, config.num_attention_heads
        self.bias_scale = config.head_dim**-0.5
        rate = blocks.residual_dropout
        first = rate if blocks.attention_out_dropout is None else blocks.attention_out_dropout
        self.dropout = Dropout(rate) if rate else None
        self.attention_dropout = Dropout(first) if first else None

    def _added(
        self,
        x: Float[Array, "b t d"],
        y: Float[Array, "b t d"],
        norm: Callable[[Array], Array] | None,
        dropout: Dropout | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the residual connection of ``x`` with the output of a block."""
        y = y if dropout is None else dropout(y, key)
        y = y if norm is None or self.outside else norm(y)
        y = x + (y if self.residual_scale == 1 else y * self.residual_scale)
        return norm(y) if norm is not None and self.outside else y

    def feed(
        self,
        normed: Float[Array, "b t d"],
        x: Float[Array, "b t d"],
        key: Key[Array, ""] | None,
        real: Bool[Array, "b t"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the output of the MLP or of the experts, and the router's logits.

        Args:
            normed: (b, t, d) the input of the MLP.
            x: (b, t, d) what the output is added to.
            key: Random key of the router's jitter.
            real: (b, t), where tokens are not padding.
        """
        if isinstance(self.mlp, Moe):
            return self.mlp(normed, key, real)
        return self.mlp(normed), None

    def _bias(self, seen: Window) -> Float[Array, "b h 1 s"] | None:
        """Returns the bias of the scores by position, if there is one."""
        if self.alibi is None:
            return None
        rounded = self.alibi == "rounded"
        bias = alibi_bias(seen.real, self.heads, rounded=rounded)
        return bias * self.bias_scale if rounded else bias

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        context: Context,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the input of the next layer, and the logits of the router, if there is one."""
        keys = split_key(key, 2)
        dropped = self.dropout is not None or self.attention_dropout is not None
        drops = split_key(keys[1], 2) if dropped else (None, None)
        drops = (drops[0], drops[0]) if self.joint_dropout else drops
        normed = x if self.attention_norm is None else self.attention_norm(x)
        if isinstance(self.attention, DeltaNet):
            y = self.attention(normed, seen.real[:, seen.slots], cache)
        elif isinstance(self.attention, LatentAttention):
            y = self.attention(normed, seen.visible, cache, context, keys[0])
        else:
            y = self.attention(normed, seen.visible, cache, context, keys[0], self._bias(seen))
        start = normed if self.residual_normed else x
        after = self._added(start, y, self.attention_post_norm, self.attention_dropout, drops[0])
        if not self.shared:
            normed = x if self.parallel else after
            normed = normed if self.mlp_norm is None else self.mlp_norm(normed)
        after = normed if self.residual_normed else after
        y, router = self.feed(normed, after, keys[1], seen.real[:, seen.slots])
        return self._added(after, y, self.mlp_post_norm, self.dropout, drops[1]), router


class Decoder(CausalLm):
    """A decoder-only model, such as Llama, Gemma or Pythia.

    Example:
        >>> config = DecoderConfig.read({"vocab_size": 50, "hidden_size": 8,
        ...     "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1})
        >>> model = Decoder(config, head="causal-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]])).logits.shape
        (1, 3, 50)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        head: Head | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        make, blocks = LayerFactory(config, param_dtype, rngs), config.blocks
        d, vocab = config.hidden_size, config.vocab_size
        size = blocks.embedding_size or d
        super().__init__(
            config,
            word=make.embed(vocab, size),
            layers=[self.layer(config, i, make) for i in range(config.num_hidden_layers)],
            norm=make.norm(d) if blocks.final_norm else None,
            lm_head=make.lm_head(size, vocab) if head == "causal-lm" else None,
            head=head,
            kv_heads=config.num_key_value_heads if config.latent is None else 1,
            value_dim=None if config.latent is None else config.latent.rank,
            head_dim=config.head_dim,
            sliding_windows=config.sliding_windows,
            rngs=rngs,
        )
        rate, rows = blocks.embedding_dropout, blocks.positions + blocks.first_position
        self.embedding_dropout = Dropout(rate) if rate else None
        self.embedding_norm = make.norm(d) if blocks.embedding_norm else None
        self.max_length = blocks.positions or None
        self.position = make.embed(rows, d) if blocks.positions else None
        self.project_in = make.linear(size, d, use_bias=False) if size != d else None
        self.project_out = make.linear(d, size, use_bias=False) if size != d else None

    def layer(self, config: Any, index: int, make: LayerFactory) -> Layer:
        """Returns a layer by its number."""
        return Layer(config, index, make)

    def empty_cache(self, b: int, slots: int) -> Cache:
        """Returns a cache without tokens for b texts of at most as many tokens as slots."""
        return with_states(super().empty_cache(b, slots), self.layers)

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns the embeddings of tokens, and of positions if they are learned."""
        x, blocks = self.word(ids), self.config.blocks
        if blocks.embedding_rounded:
            x = x * jnp.asarray(blocks.embedding_scale, x.dtype)
        elif blocks.embedding_scale != 1:
            x = (wide(x) * blocks.embedding_scale).astype(x.dtype)
        x = x if self.project_in is None else self.project_in(x)
        if self.position is not None:
            x = x + self.position(positions + blocks.first_position)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return x if self.embedding_dropout is None else self.embedding_dropout(x, key)

    def finish(self, x: Float[Array, "b t d"]) -> Float[Array, "b t size"]:
        """Returns the last hidden state, with as many features as the token embeddings."""
        x = super().finish(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of hidden states."""
        bias, blocks = self.lm_head, self.config.blocks
        y = bias(self.word.attend(x)) if isinstance(bias, OutputBias) else super().logits(x)
        y = y if blocks.logit_divisor == 1 else y / blocks.logit_divisor
        return soft_capped(y, blocks.logit_cap)

    def context(self, positions: Int[Array, "b t"], slots: int | None) -> Context:
        """Returns the angles of the rotary embeddings, and the factors of other queries."""
        ropes = [rope for rope in dict.fromkeys(self.config.ropes) if rope is not None]
        found: dict[Rope | None, Array] = {
            rope: rope.angles(positions, self.config.head_dim, slots) for rope in ropes
        }
        if self.config.blocks.temperature is not None:
            floor, slope = self.config.blocks.temperature
            grown = jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / floor))
            found[None] = 1 + slope * grown
        return found
