"""The decoder that most language models are: rotary positions, and flags for what differs.

A family's file says how the fields of its ``config.json`` set the flags, and where its tensors are;
`decoder_family` makes its `Family` from that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.models.base import Family, Fields, Head, tied_head
from fusion_jax.models.causal import (
    ALL_HEADS,
    CausalLm,
    decoder_architectures,
    with_head,
)
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.delta import DeltaNet, with_states
from fusion_jax.models.latent_attention import LatentAttention
from fusion_jax.models.layers import (
    Cache,
    CacheUpdate,
    Dropout,
    LayerNorm,
    RmsNorm,
    WideRmsNorm,
    Window,
    attention,
    soft_capped,
    split_key,
    unit_rms,
)
from fusion_jax.models.moe import Moe
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.mlp import GatedMlp, Mlp

Context = Mapping[Rope | None, Float[Array, "b t *half"]]
"""The angles of each rotary embedding; under None the factors of queries without one."""


class Attention(nnx.Module):
    """Attention with rotary positions; groups of query heads share keys and values."""

    def __init__(self, config: DecoderConfig, rope: Rope | None, make: _LayerFactory):
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
        self.key = make.linear(d, kv_heads * f, use_bias=config.qkv_bias)
        self.value = make.linear(d, kv_heads * f, use_bias=config.qkv_bias)
        self.out = make.linear(heads * f, d, use_bias=config.out_bias)
        normed = config.blocks.query_key_norm
        self.all_normed = normed == "all"
        self.query_norm = make.norm(heads * f if self.all_normed else f) if normed else None
        self.key_norm = make.norm(kv_heads * f if self.all_normed else f) if normed else None
        self.dropout = Dropout(config.attention_dropout)

    def _heads(
        self, linear: Callable[[Array], Array], norm: Callable[[Array], Array] | None, x: Array
    ) -> Float[Array, "b t h f"]:
        y = linear(x)
        y = norm(y) if norm is not None and self.all_normed else y
        y = y if self.clip is None else jnp.clip(y, -self.clip, self.clip)
        y = y.reshape(*x.shape[:2], -1, self.features)
        return norm(y) if norm is not None and not self.all_normed else y

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        cache: CacheUpdate,
        context: Context,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        q, gate = self._heads(self.query, None if self.gated else self.query_norm, x), None
        if self.gated:
            q, gate = jnp.split(q.reshape(*q.shape[:2], -1, 2 * self.features), 2, axis=-1)
            q = q if self.query_norm is None else self.query_norm(q)
        k = self._heads(self.key, self.key_norm, x)
        v = self._heads(self.value, None, x)
        if self.rope is not None:
            q, k = (self.rope.rotated(a, context[self.rope]) for a in (q, k))
            q, k = (unit_rms(a, self.epsilon) if self.unit_norms else a for a in (q, k))
        elif None in context:
            q = (wide(q) * context[None][..., None, None]).astype(x.dtype)
        k, v = cache.extended(k, v)
        given = {"sinks": None if self.sinks is None else self.sinks[...]}
        scale, cap = self.scale, self.cap
        y = attention(q, k, v, visible, self.dropout, key, scale=scale, cap=cap, **given)
        y = y if gate is None else y * jax.nn.sigmoid(gate)
        return self.out(y.reshape(*x.shape[:2], -1))


class _LayerFactory:
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
        }
        self.dtype, self.rngs = param_dtype, rngs
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.norm = partial(norms[config.blocks.norm], epsilon=config.rms_norm_eps, **common)
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


class Layer(nnx.Module):
    """One layer: attention and MLP, each with its norms and inside a residual connection."""

    def __init__(self, config: DecoderConfig, index: int, make: _LayerFactory):
        d, blocks = config.hidden_size, config.blocks
        before, after = blocks.norms != "after", blocks.norms != "before"
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
        self.mlp_norm = make.norm(d) if before else None
        self.mlp = make.moe() if config.sparse[index] else make.dense()
        self.mlp_post_norm = make.norm(d) if after else None
        self.residual_scale = blocks.residual_scale
        self.dropout = Dropout(blocks.residual_dropout) if blocks.residual_dropout else None

    def _added(
        self,
        x: Float[Array, "b t d"],
        y: Float[Array, "b t d"],
        norm: Callable[[Array], Array] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the residual connection of ``x`` with the output of a block."""
        y = y if self.dropout is None else self.dropout(y, key)
        y = y if norm is None else norm(y)
        return x + (y if self.residual_scale == 1 else y * self.residual_scale)

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
        drops = (None, None) if self.dropout is None else split_key(keys[1], 2)
        y = x if self.attention_norm is None else self.attention_norm(x)
        if isinstance(self.attention, DeltaNet):
            y = self.attention(y, seen.real[:, seen.slots], cache)
        else:
            y = self.attention(y, seen.visible, cache, context, keys[0])
        x = self._added(x, y, self.attention_post_norm, drops[0])
        y, router = x if self.mlp_norm is None else self.mlp_norm(x), None
        if isinstance(self.mlp, Moe):
            y, router = self.mlp(y, keys[1], seen.real[:, seen.slots])
        else:
            y = self.mlp(y)
        return self._added(x, y, self.mlp_post_norm, drops[1]), router


class Decoder(CausalLm):
    """A decoder-only model with rotary positions, such as Llama, Gemma or OLMo.

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
        make = _LayerFactory(config, param_dtype, rngs)
        d, vocab = config.hidden_size, config.vocab_size
        untied = head == "causal-lm" and not config.tie_word_embeddings
        super().__init__(
            config,
            word=make.embed(vocab, d),
            layers=[Layer(config, i, make) for i in range(config.num_hidden_layers)],
            norm=make.norm(d),
            lm_head=make.linear(d, vocab, use_bias=False) if untied else None,
            head=head,
            kv_heads=config.num_key_value_heads if config.latent is None else 1,
            value_dim=None if config.latent is None else config.latent.rank,
            head_dim=config.head_dim,
            sliding_windows=config.sliding_windows,
            rngs=rngs,
        )

    def empty_cache(self, b: int, slots: int) -> Cache:
        """Returns a cache without tokens for b texts of at most as many tokens as slots."""
        return with_states(super().empty_cache(b, slots), self.layers)

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns token embeddings."""
        x, blocks = self.word(ids), self.config.blocks
        if blocks.embedding_scale == 1:
            return x
        if blocks.embedding_rounded:
            return x * jnp.asarray(blocks.embedding_scale, x.dtype)
        return (wide(x) * blocks.embedding_scale).astype(x.dtype)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of hidden states."""
        y, blocks = super().logits(x), self.config.blocks
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


_LAYER = "layers.{l}"
_BASE = (KeyRule("word", "embed_tokens", EMBED), KeyRule("norm", "norm", NORM))
_HEAD = (KeyRule("lm_head", "lm_head", LINEAR, in_base=False),)
_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_NORMS["both"] = {
    **_NORMS["after"],
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
}
_ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
}
_QUERY_KEY_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


def linear_rules(ours: str, theirs: str, names: Mapping[str, str]) -> tuple[KeyRule, ...]:
    """Returns the rules of linear layers inside one module of every layer, by our names."""
    return tuple(
        KeyRule(f"{_LAYER}.{ours}.{a}", f"{_LAYER}.{theirs}.{b}", LINEAR) for a, b in names.items()
    )


def joined_rules(ours: str, theirs: str, parts: Collection[str], name: str) -> tuple[KeyRule, ...]:
    """Returns the rules of linear layers that are one in a checkpoint, one after the other."""
    paths = tuple(f"{_LAYER}.{ours}.{part}" for part in parts)
    return tuple(KeyRule(p, f"{_LAYER}.{theirs}.{name}", LINEAR, joined=paths) for p in paths)


MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# Frequencies, a buffer in old checkpoints, and a head that is tied or was not asked for.
_IGNORED = (
    r"((model|transformer)\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"lm_head\.weight",
)


def decoder_rules(
    config: DecoderConfig, head: Head | None, mlps: tuple[KeyRule, ...] = ()
) -> KeyRules:
    """Returns the key rules of a decoder, whose tensors have the names that Llama's have.

    Args:
        config: The configuration.
        head: The head.
        mlps: The rules of the MLPs, where their names are not Llama's.
    """
    norms = _NORMS[config.blocks.norms]
    rules = [
        *_BASE,
        *(KeyRule(f"{_LAYER}.{a}", f"{_LAYER}.{b}", NORM) for a, b in norms.items()),
        *(
            KeyRule(f"{_LAYER}.attention.{a}", f"{_LAYER}.self_attn.{b}", NORM)
            for a, b in _QUERY_KEY_NORMS.items()
        ),
    ]
    if config.blocks.joined:
        rules += joined_rules("attention", "self_attn", ("query", "key", "value"), "qkv_proj")
        rules += joined_rules("mlp", "mlp", ("gate", "up"), "gate_up_proj")
    rules += linear_rules("attention", "self_attn", _ATTENTION)
    rules += mlps or linear_rules("mlp", "mlp", MLP_NAMES)
    twins = tied_head(config, "lm_head.weight", "word.embedding")
    prefixed = head is not None
    return KeyRules(
        (*rules, *_HEAD), "model.", write_prefix=prefixed, ignored=_IGNORED, twins=twins
    )


def decoder_family(
    name: str,
    config: Callable[[Fields], DecoderConfig],
    *,
    heads: Collection[Head] = ALL_HEADS,
    rules: Callable[[DecoderConfig, Head | None], KeyRules] = decoder_rules,
    answers: str | None = None,
    width_fields: Mapping[str, str] | None = None,
    experts_field: str = "num_experts",
    **other: str,
) -> Family:
    """Returns the family of a decoder.

    Args:
        name: What the names of its classes in `transformers` begin with.
        config: Reads the fields of a ``config.json``.
        heads: The heads that the family has in `transformers`.
        rules: The key rules without those of heads, if they are not Llama's.
        answers: See `with_head`.
        width_fields: See `Family`.
        experts_field: See `Family`.
        **other: See `decoder_architectures`.
    """

    def all_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
        return with_head(rules(config, head), head, answers=answers)

    return Family(
        config=config,
        model=Decoder,
        rules=all_rules,
        architectures=decoder_architectures(name, heads, **other),
        width_field="intermediate_size",
        width_fields=width_fields or {},
        experts_field=experts_field,
    )
