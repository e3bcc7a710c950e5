"""The layers of Gemma 4: embeddings of tokens for each layer, and experts beside an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.models.base import Head
from fusion_jax.models.cache import Cache, CacheUpdate, Window
from fusion_jax.models.causal import Start
from fusion_jax.models.decoder import Context, Decoder, Layer, LayerFactory
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.layers import ArrayLike, WideRmsNorm, unit_rms
from fusion_jax.models.moe import Moe
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Frozen, dtype_of
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """The fields of a ``config.json`` that decoders do not have elsewhere.

    Two are derived: ``sliding`` says which layers have windows, and ``heads`` are the features of
    a head and the number of key-value heads of each layer. Experts are beside the MLP of each
    layer, so that ``sparse`` is False.
    """

    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    attention_k_eq_v: bool = False
    enable_moe_block: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    sliding: tuple[bool, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()

    def source(self, index: int) -> int | None:
        """Returns the layer whose keys and values a layer reuses; None if it has its own."""
        first = self.num_hidden_layers - self.num_kv_shared_layers
        own = [i for i in range(first) if self.sliding[i] == self.sliding[index]]
        return own[-1] if index >= first else None

    def layer(self, index: int) -> DecoderConfig:
        """Returns the configuration of one layer."""
        source, (features, groups) = self.source(index), self.heads[index]
        kept = index in [self.source(i) for i in range(self.num_hidden_layers)]
        blocks = replace(
            self.blocks,
            keys_as_values=self.attention_k_eq_v and not self.sliding[index],
            reuses=source,
            keeps=index if kept else None,
        )
        return replace(
            self,
            head_dim=features,
            num_key_value_heads=groups,
            intermediate_size=self.intermediate_size * self.width_factor(index),
            blocks=blocks,
        )

    def width_factor(self, index: int) -> int:
        """Returns how many times wider than usual the MLP of a layer is."""
        return 2 if self.use_double_wide_mlp and self.source(index) is not None else 1


class LayerContext(NamedTuple):
    """What all layers share in one call.

    Args:
        angles: Those of the rotary embeddings.
        inputs: (b, t, l, p) what each layer reads of the tokens, if it reads anything.
    """

    angles: Context
    inputs: Float[Array, "b t l p"] | None


class ScaledMoe(Moe):
    """Experts with factors of their own, whose router has factors for its inputs.

    Args:
        *args: The arguments of `Moe`.
        norm: The norm before the experts; the router reads what it is before it is scaled.
        **options: The options of `Moe`.
    """

    def __init__(self, *args: Any, norm: WideRmsNorm, **options: Any):
        super().__init__(*args, **options)
        d, count = self.router.in_features, self.router.out_features
        self.norm = norm
        self.router_scale = nnx.Param(jnp.ones(d, options["param_dtype"]))
        self.expert_scale = nnx.Param(jnp.ones(count, options["param_dtype"]))

    def normed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Returns what the experts read."""
        return self.norm(x)

    def router_inputs(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Returns what the router reads, from what the experts read; 0 where that was lost."""
        assert self.norm.scale is not None
        scale = self.norm.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.where(scale == 0, 0, x / jnp.where(scale == 0, 1, scale)).astype(x.dtype)

    def router_logits(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t e"]:
        """Returns the router's logits in float32 or wider."""
        scale = wide(self.router_scale[...])[None, None] * x.shape[-1] ** -0.5
        return super().router_logits(wide(x) * scale, key)

    def routes(
        self, logits: Float[Array, "b t e"]
    ) -> tuple[Float[Array, "b t e"], Bool[Array, "b t e"]]:
        """Returns the weight of each expert at each position, and which experts compute there."""
        weights, chosen = super().routes(logits)
        return weights * self.expert_scale[...].astype(weights.dtype)[None, None], chosen

    def with_experts(self, members: Sequence[int]) -> Moe:
        """Returns the mixture of some of its experts, see `Moe`."""
        new: Any = super().with_experts(members)
        new.expert_scale.set_value(new.expert_scale.get_value()[jnp.asarray(members)])
        return new


class Gemma4Layer(Layer):
    """One layer, which ends with a block that reads embeddings of tokens, and with a factor."""

    def __init__(self, config: Gemma4Config, index: int, make: LayerFactory):
        super().__init__(config, index, make)
        d, p = config.hidden_size, config.hidden_size_per_layer_input
        self.index, self.epsilon = index, config.rms_norm_eps
        self.act = config.hidden_act
        experts: Any = partial(ScaledMoe, *make.moe.args, **make.moe.keywords)
        self.moe: Moe | None = experts(norm=make.norm(d)) if config.num_experts else None
        self.mlp_own_norm = make.norm(d) if config.num_experts else None
        self.moe_post_norm = make.norm(d) if config.num_experts else None
        self.gate = make.linear(d, p, use_bias=False) if p else None
        self.project = make.linear(p, d, use_bias=False) if p else None
        self.project_norm = make.norm(d) if p else None
        self.scalar = Frozen(jnp.ones(1, make.dtype))

    def feed(
        self,
        normed: Float[Array, "b t d"],
        x: Float[Array, "b t d"],
        key: Key[Array, ""] | None,
        real: Bool[Array, "b t"],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the outputs of the MLP and of the experts together; see `Layer.feed`."""
        y, router = super().feed(normed, x, key, real)
        if self.moe is None or self.mlp_own_norm is None or self.moe_post_norm is None:
            return y, router
        seen = unit_rms(x, self.epsilon)
        more, router = self.moe(self.moe.normed(x), key, real, seen)
        return self.mlp_own_norm(y) + self.moe_post_norm(more), router

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        context: Any,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the input of the next layer, and the logits of the router, if there is one."""
        x, router = super().__call__(x, seen, cache, context.angles, key)
        if self.gate is not None and self.project is not None and self.project_norm is not None:
            y = activation(self.act)(self.gate(x)) * context.inputs[:, :, self.index]
            x = x + self.project_norm(self.project(y))
        return x * self.scalar[...].astype(x.dtype)[None, None], router


class Gemma4(Decoder):
    """The text model of Gemma 4."""

    config: Gemma4Config

    def __init__(
        self,
        config: Gemma4Config,
        *,
        head: Head | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, head=head, param_dtype=param_dtype, rngs=rngs)
        make = LayerFactory(config, param_dtype, rngs)
        p, rows = config.hidden_size_per_layer_input, config.vocab_size_per_layer_input
        size = p * config.num_hidden_layers
        self.layer_word = make.embed(rows, size) if p else None
        self.layer_project = make.linear(config.hidden_size, size, use_bias=False) if p else None
        self.layer_norm = make.norm(p) if p else None
        self.layers_apart = not p and not config.num_kv_shared_layers

    def layer(self, config: Any, index: int, make: LayerFactory) -> Layer:
        """Returns a layer by its number."""
        own = config.layer(index)
        return Gemma4Layer(own, index, LayerFactory(own, make.dtype, make.rngs))

    def empty_cache(self, b: int, slots: int) -> Cache:
        """Returns a cache without tokens; layers that reuse keys and values have no slots."""
        config, dtype = self.config, dtype_of(self.word)
        zeros = tuple(
            jnp.zeros((b, slots if config.source(i) is None else 0, groups, features), dtype)
            for i, (features, groups) in enumerate(config.heads)
        )
        return Cache(zeros, zeros, jnp.zeros((b, slots), bool), jnp.int32(0))

    def start(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None,
        position_ids: Int[ArrayLike, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Start:
        """Returns what a call gives to `embed` and to all layers."""
        start = super().start(input_ids, attention_mask, position_ids, cache)
        inputs = None
        if self.layer_word is not None and self.layer_norm is not None and self.layer_project:
            p = self.config.hidden_size_per_layer_input
            x = self.embed(start.ids, start.positions, None)
            shape = (*x.shape[:2], -1, p)
            own = self.layer_word(start.ids).reshape(shape) * jnp.asarray(p**0.5, x.dtype)
            seen = (self.layer_project(x) * x.shape[-1] ** -0.5).reshape(shape)
            inputs = (self.layer_norm(seen) + own) * 2**-0.5
        return start._replace(context=LayerContext(start.context, inputs))
