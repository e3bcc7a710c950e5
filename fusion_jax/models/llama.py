"""Llama and similar models: Mistral, Qwen2, Qwen3; with experts Mixtral, Qwen2-MoE, Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Family, Head, config_from_fields, tied_head
from fusion_jax.models.causal import CausalLm, HeadConfig, decoder_architectures, with_head
from fusion_jax.models.layers import CacheUpdate, Dropout, RmsNorm, Window, attention, split_key
from fusion_jax.models.moe import Moe
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.nn.mlp import GatedMlp
from fusion_jax.nn.submlps import activation

# Defaults of the fields that a config.json may omit, where they differ from those of Llama.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 4096,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}


_EXPERTS = {"num_experts", "num_experts_per_tok"}
_QWEN_EXPERTS = _EXPERTS | {
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob"
}  # fmt: skip
# The fields that only some types have; transformers ignores them in the configs of other types.
_FIELDS: dict[str, set[str]] = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": set(),
    "qwen2": set(),
    "qwen3": {"attention_bias"},
    "mixtral": _EXPERTS | {"num_local_experts", "router_jitter_noise"},
    "qwen2_moe": _QWEN_EXPERTS | {"qkv_bias", "shared_expert_intermediate_size"},
    "qwen3_moe": _QWEN_EXPERTS | {"attention_bias", "num_local_experts"},
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(HeadConfig):
    """The fields of a Llama-like ``config.json`` that the model uses, with Llama's defaults.

    `from_json` derives some fields: ``sliding_windows`` is the number of positions that a token
    attends to in each layer (None for all), ``sparse`` says which layers have experts, and
    ``qkv_bias`` and ``out_bias`` say which projections of attention have biases. A size of 0 means
    that there is no shared expert.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_jitter_noise: float = 0.0
    eos_token_id: int | tuple[int, ...] | None = None
    rope: Rope = field(default_factory=Rope)
    sliding_windows: tuple[int | None, ...] = ()
    sparse: tuple[bool, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        model_type = config["model_type"]
        foreign = set().union(*_FIELDS.values()) - _FIELDS[model_type]
        config = {name: value for name, value in config.items() if name not in foreign}
        config = {**_DEFAULTS[model_type], **config}
        result = config_from_fields(cls, config, rope=Rope.from_json(config))
        activation(result.hidden_act)
        heads = result.num_attention_heads
        bias = bool(config.get("attention_bias"))
        changes: dict[str, Any] = {
            "num_key_value_heads": result.num_key_value_heads or heads,
            "head_dim": result.head_dim or result.hidden_size // heads,
            "sliding_windows": _sliding_windows(config, result.num_hidden_layers),
            "qkv_bias": bias or model_type == "qwen2",
            "out_bias": bias,
            "num_experts": config.get("num_local_experts") or result.num_experts,
            "moe_intermediate_size": result.moe_intermediate_size or result.intermediate_size,
        }
        if model_type == "qwen2_moe":
            changes |= {"qkv_bias": bool(config.get("qkv_bias", True)), "out_bias": False}
        changes["sparse"] = _sparse(config, result.num_hidden_layers, changes["num_experts"])
        result = replace(result, **changes)
        if result.head_dim < 1 or result.head_dim % 2:
            raise InputError(f"head_dim must be even and above 0; got {result.head_dim}")
        if heads % result.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {result.num_key_value_heads}"
            )
        return result


def _sparse(config: Mapping[str, Any], layers: int, experts: int) -> tuple[bool, ...]:
    """Returns which layers have experts: in Qwen every n-th layer, except for listed ones."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    check_at_least(1, decoder_sparse_step=step)
    return tuple(experts > 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))


def _sliding_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Returns the window of each layer: Qwen has a switch, and windows in some layers only."""
    model_type, size = config["model_type"], config.get("sliding_window")
    if model_type == "llama" or not size:
        return (None,) * layers
    if model_type.startswith("qwen") and not config.get("use_sliding_window"):
        return (None,) * layers
    if not isinstance(size, int):
        raise InputError(f"sliding_window must be an integer; got {str(size)[:100]!r}")
    first = config.get("max_window_layers", 28)
    sliding = {
        "qwen2": [i >= first for i in range(layers)],
        "qwen3": [i >= first for i in range(layers)],
        "qwen2_moe": [i < first and i % 2 == 0 for i in range(layers)],
    }.get(model_type, [True] * layers)
    types = config.get("layer_types")
    # transformers ignores the types in models with experts, except for Qwen2's.
    if types and model_type not in ("mixtral", "qwen3_moe"):
        if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
            raise InputError(
                "layer_types must be sliding_attention or full_attention for each of the "
                f"{layers} layers"
            )
        sliding = [layer_type == "sliding_attention" for layer_type in types]
    return tuple(size if has_window else None for has_window in sliding)


class Attention(nnx.Module):
    """Attention with rotary positions; groups of query heads share keys and values."""

    def __init__(self, config: LlamaConfig, make: _LayerFactory):
        d, f = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.rope, self.features = config.rope, f
        self.query = make.linear(d, heads * f, use_bias=config.qkv_bias)
        self.key = make.linear(d, kv_heads * f, use_bias=config.qkv_bias)
        self.value = make.linear(d, kv_heads * f, use_bias=config.qkv_bias)
        self.out = make.linear(heads * f, d, use_bias=config.out_bias)
        normed = config.model_type.startswith("qwen3")
        self.query_norm = make.norm(f) if normed else None
        self.key_norm = make.norm(f) if normed else None
        self.dropout = Dropout(config.attention_dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        cache: CacheUpdate,
        angles: Float[Array, "b t half"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        b, t, _ = x.shape
        q, k, v = (
            linear(x).reshape(b, t, -1, self.features)
            for linear in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (self.rope.rotated(a, angles) for a in (q, k))
        y = attention(q, *cache.extended(k, v), visible, self.dropout, key)
        return self.out(y.reshape(b, t, -1))


class _LayerFactory:
    """Makes the layers of a model, all with its initializer, dtype, epsilon and random keys."""

    def __init__(self, config: LlamaConfig, param_dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        shared = config.shared_expert_intermediate_size
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.norm = partial(RmsNorm, epsilon=config.rms_norm_eps, **common)
        self.embed = partial(nnx.Embed, embedding_init=init, **common)
        self.mlp = partial(
            GatedMlp,
            config.hidden_size,
            act=config.hidden_act,
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
            shared=partial(self.mlp, width=shared) if shared else None,
            kernel_init=init,
            **common,
        )
        self.dense = partial(self.mlp, width=config.intermediate_size, rngs=rngs)
        self.rngs = rngs


class Layer(nnx.Module):
    """One layer: attention and MLP, each behind a norm and inside a residual connection."""

    def __init__(self, config: LlamaConfig, sparse: bool, make: _LayerFactory):
        self.attention_norm = make.norm(config.hidden_size)
        self.attention = Attention(config, make)
        self.mlp_norm = make.norm(config.hidden_size)
        self.mlp = make.moe() if sparse else make.dense()

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        context: Float[Array, "b t half"],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the input of the next layer, and the logits of the router, if there is one."""
        keys = split_key(key, 2)
        x = x + self.attention(self.attention_norm(x), seen.visible, cache, context, keys[0])
        y, router = self.mlp_norm(x), None
        if isinstance(self.mlp, Moe):
            y, router = self.mlp(y, keys[1], seen.real[:, seen.slots])
        else:
            y = self.mlp(y)
        return x + y, router


class Llama(CausalLm):
    """A Llama-like decoder.

    Example:
        >>> config = LlamaConfig.from_json({"model_type": "llama", "vocab_size": 50,
        ...     "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 24,
        ...     "num_hidden_layers": 1})
        >>> model = Llama(config, head="causal-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]])).logits.shape
        (1, 3, 50)
    """

    def __init__(
        self,
        config: LlamaConfig,
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
            layers=[Layer(config, sparse, make) for sparse in config.sparse],
            norm=make.norm(d),
            lm_head=make.linear(d, vocab, use_bias=False) if untied else None,
            head=head,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            sliding_windows=config.sliding_windows,
            rngs=rngs,
        )

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns token embeddings."""
        return self.word(ids)

    def context(self, positions: Int[Array, "b t"]) -> Float[Array, "b t half"]:
        """Returns the angles of the rotary embedding."""
        return self.config.rope.angles(positions, self.config.head_dim)


_ATTENTION = "layers.{l}.self_attn"
_RULES = (
    KeyRule("word", "embed_tokens", EMBED),
    KeyRule("layers.{l}.attention_norm", "layers.{l}.input_layernorm", NORM),
    KeyRule("layers.{l}.attention.query", f"{_ATTENTION}.q_proj", LINEAR),
    KeyRule("layers.{l}.attention.key", f"{_ATTENTION}.k_proj", LINEAR),
    KeyRule("layers.{l}.attention.value", f"{_ATTENTION}.v_proj", LINEAR),
    KeyRule("layers.{l}.attention.out", f"{_ATTENTION}.o_proj", LINEAR),
    KeyRule("layers.{l}.attention.query_norm", f"{_ATTENTION}.q_norm", NORM),
    KeyRule("layers.{l}.attention.key_norm", f"{_ATTENTION}.k_norm", NORM),
    KeyRule("layers.{l}.mlp_norm", "layers.{l}.post_attention_layernorm", NORM),
    KeyRule("norm", "norm", NORM),
    KeyRule("lm_head", "lm_head", LINEAR, in_base=False),
)


def _mlp_rules(ours: str, theirs: str, names: tuple[str, str, str]) -> tuple[KeyRule, ...]:
    pairs = zip(("gate", "up", "down"), names, strict=True)
    return tuple(
        KeyRule(f"layers.{{l}}.{ours}.{a}", f"layers.{{l}}.{theirs}.{b}", LINEAR) for a, b in pairs
    )


_NAMES = ("gate_proj", "up_proj", "down_proj")
_MLP = _mlp_rules("mlp", "mlp", _NAMES)
_QWEN = (
    KeyRule("layers.{l}.mlp.router", "layers.{l}.mlp.gate", LINEAR),
    *_mlp_rules("mlp.experts", "mlp.experts.{e}", _NAMES),
    *_MLP,
)
_MLPS = {
    "mixtral": (
        KeyRule("layers.{l}.mlp.router", "layers.{l}.block_sparse_moe.gate", LINEAR),
        *_mlp_rules("mlp.experts", "block_sparse_moe.experts.{e}", ("w1", "w3", "w2")),
    ),
    "qwen2_moe": (
        *_QWEN,
        *_mlp_rules("mlp.shared", "mlp.shared_expert", _NAMES),
        KeyRule("layers.{l}.mlp.shared_gate", "layers.{l}.mlp.shared_expert_gate", LINEAR),
    ),
    "qwen3_moe": _QWEN,
}
# Frequencies, a buffer in old checkpoints, and a head that is tied or was not asked for.
_IGNORED = (
    r"((model|transformer)\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"lm_head\.weight",
)


def _rules(config: LlamaConfig, head: Head | None) -> KeyRules:
    rules = (*_RULES, *_MLPS.get(config.model_type, _MLP))
    twins = tied_head(config, "lm_head.weight", "word.embedding")
    result = KeyRules(rules, "model.", write_prefix=head is not None, ignored=_IGNORED, twins=twins)
    answers = "transformer." if config.model_type in _OTHER_PREFIX else None
    return with_head(result, head, answers=answers)


# Their question-answering classes in transformers call the base model ``transformer``.
_OTHER_PREFIX = ("llama", "qwen2", "qwen3", "qwen3_moe")
_QWEN_WIDTHS = {"experts": "moe_intermediate_size", "shared": "shared_expert_intermediate_size"}


def _family(model_type: str, name: str) -> Family:
    return Family(
        config=LlamaConfig.from_json,
        model=Llama,
        rules=_rules,
        architectures=decoder_architectures(name),
        width_field="intermediate_size",
        width_fields=_QWEN_WIDTHS if model_type in ("qwen2_moe", "qwen3_moe") else {},
    )


FAMILIES = {
    "llama": _family("llama", "Llama"),
    "mistral": _family("mistral", "Mistral"),
    "mixtral": _family("mixtral", "Mixtral"),
    "qwen2": _family("qwen2", "Qwen2"),
    "qwen2_moe": _family("qwen2_moe", "Qwen2Moe"),
    "qwen3": _family("qwen3", "Qwen3"),
    "qwen3_moe": _family("qwen3_moe", "Qwen3Moe"),
}
