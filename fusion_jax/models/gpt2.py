"""GPT-2, with its heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.models.base import Family, Fields, Head, config_from_fields, tied_head, with_aliases
from fusion_jax.models.cache import CacheUpdate, Window
from fusion_jax.models.causal import CausalLm, HeadConfig, decoder_architectures, with_head
from fusion_jax.models.layers import Dropout, LayerNorm, attention, split_key
from fusion_jax.models.rules import CONV1D, EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import activation

_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


@dataclass(frozen=True, kw_only=True)
class Gpt2Config(HeadConfig):
    """The fields of a GPT-2 ``config.json`` that the model uses, with GPT-2's defaults."""

    model_type: str = "gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    eos_token_id: int | tuple[int, ...] | None = 50256

    @classmethod
    def from_json(cls, config: Fields) -> Gpt2Config:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        if config.get("add_cross_attention"):
            raise InputError("add_cross_attention is not implemented")
        result = config_from_fields(cls, with_aliases(config, _ALIASES))
        activation(result.activation_function)
        if result.n_embd % result.n_head:
            raise InputError(f"n_embd {result.n_embd} is not a multiple of n_head {result.n_head}")
        return result

    @property
    def width(self) -> int:
        """The width of the MLPs."""
        return self.n_inner or 4 * self.n_embd


class Layer(nnx.Module):
    """One layer: attention and MLP, each behind a norm and inside a residual connection."""

    def __init__(self, config: Gpt2Config, index: int, param_dtype: Any, rngs: nnx.Rngs):
        d = config.n_embd
        init = nnx.initializers.normal(config.initializer_range)
        # GPT-2's initial output projections are smaller the more layers add to the residual.
        residual = nnx.initializers.normal(config.initializer_range / (2 * config.n_layer) ** 0.5)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        norm = partial(LayerNorm, d, epsilon=config.layer_norm_epsilon, **common)
        self.heads = config.n_head
        self.scale = (d // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= index + 1
        self.attention_norm = norm()
        self.qkv = nnx.Linear(d, 3 * d, kernel_init=init, **common)
        self.out = nnx.Linear(d, d, kernel_init=residual, **common)
        self.mlp_norm = norm()
        self.mlp = Mlp(d, config.width, act=config.activation_function, kernel_init=init, **common)
        self.attention_dropout = Dropout(config.attn_pdrop)
        self.dropout = Dropout(config.resid_pdrop)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        context: None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], None]:
        """Returns the input of the next layer, and None in place of a router's logits."""
        keys = split_key(key, 3)
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = (a.reshape(*x.shape[:2], self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        y = attention(
            q,
            *cache.extended(k, v),
            seen.visible,
            self.attention_dropout,
            keys[0],
            scale=self.scale,
        )
        y = self.out(y.reshape(x.shape))
        x = x + self.dropout(y, keys[1])
        y = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y, keys[2]), None


class Gpt2(CausalLm):
    """A GPT-2 decoder.

    Example:
        >>> config = Gpt2Config(vocab_size=50, n_positions=16, n_embd=8, n_head=2, n_layer=1)
        >>> model = Gpt2(config, head="causal-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]])).logits.shape
        (1, 3, 50)
    """

    def __init__(
        self,
        config: Gpt2Config,
        *,
        head: Head | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=config.n_embd, embedding_init=init, **common)
        linear = partial(nnx.Linear, use_bias=False, kernel_init=init, **common)
        super().__init__(
            config,
            word=embed(config.vocab_size),
            layers=[Layer(config, i, param_dtype, rngs) for i in range(config.n_layer)],
            norm=LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, **common),
            lm_head=linear(config.n_embd, config.vocab_size)
            if head == "causal-lm" and not config.tie_word_embeddings
            else None,
            head=head,
            kv_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
            sliding_windows=(None,) * config.n_layer,
            rngs=rngs,
        )
        self.max_length = config.n_positions
        self.position = embed(config.n_positions)
        self.dropout = Dropout(config.embd_pdrop)

    def embed(
        self, ids: Int[Array, "b t"], positions: Int[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Returns token embeddings plus position embeddings."""
        return self.dropout(self.word(ids) + self.position(positions), key)


_RULES = (
    KeyRule("word", "wte", EMBED),
    KeyRule("position", "wpe", EMBED),
    KeyRule("layers.{l}.attention_norm", "h.{l}.ln_1", NORM),
    KeyRule("layers.{l}.qkv", "h.{l}.attn.c_attn", CONV1D),
    KeyRule("layers.{l}.out", "h.{l}.attn.c_proj", CONV1D),
    KeyRule("layers.{l}.mlp_norm", "h.{l}.ln_2", NORM),
    KeyRule("layers.{l}.mlp.up", "h.{l}.mlp.c_fc", CONV1D),
    KeyRule("layers.{l}.mlp.down", "h.{l}.mlp.c_proj", CONV1D),
    KeyRule("norm", "ln_f", NORM),
    KeyRule("lm_head", "lm_head", LINEAR, in_base=False),
)
# The causal mask, a buffer in old checkpoints, and the tied copy of the embeddings.
_IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight")


def _rules(config: Gpt2Config, head: Head | None) -> KeyRules:
    twins = tied_head(config, "lm_head.weight", "word.embedding")
    rules = KeyRules(
        _RULES, "transformer.", write_prefix=head is not None, ignored=_IGNORED, twins=twins
    )
    return with_head(rules, head, tokens="classifier")


FAMILIES = {
    "gpt2": Family(
        config=Gpt2Config.from_json,
        model=Gpt2,
        rules=_rules,
        architectures=decoder_architectures("GPT2", causal_lm="LMHeadModel"),
        width_field="n_inner",
    )
}
