"""T5, its version 1.1, and Switch Transformers: encoder and decoder with a language-model head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import (
    DecoderOutput,
    Family,
    Fields,
    Generative,
    Head,
    config_from_fields,
    tied_head,
)
from fusion_jax.models.layers import (
    ArrayLike,
    Cache,
    CacheUpdate,
    Dropout,
    KeysValues,
    RmsNorm,
    Window,
    attention,
    relative_bias,
    split_key,
    token_mask,
    window,
)
from fusion_jax.models.moe import Moe
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.submlps import activation

EncoderKeysValues = tuple[Float[Array, "b u h f"], Float[Array, "b u h f"]]
EncoderView = tuple[EncoderKeysValues, Bool[Array, "b 1 1 u"]]
"""The keys and values of the encoder for one layer, and where source texts are not padding."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of a T5 or Switch ``config.json`` that the model uses, with T5's defaults.

    `from_json` derives some fields: ``act`` and ``gated`` describe the MLPs; ``scaled`` says
    whether hidden states are divided by ``sqrt(d_model)`` before the logits are computed.
    """

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 0
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    act: str = "relu"
    gated: bool = False
    scaled: bool = True
    tie_word_embeddings: bool = True
    own_embeddings: tuple[str, ...] = ()
    """Which of ``"encoder"`` and ``"decoder"`` have token embeddings of their own."""
    pad_token_id: int = 0
    decoder_start_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    num_experts: int = 0
    expert_capacity: int = 64
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    router_bias: bool = False
    router_jitter_noise: float = 0.01

    @classmethod
    def from_json(cls, config: Fields) -> T5Config:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        tied = bool(config.get("tie_word_embeddings", True))
        given: dict[str, Any] = {"num_decoder_layers": config.get("num_decoder_layers")}
        given["num_decoder_layers"] = given["num_decoder_layers"] or config.get("num_layers", 6)
        if config["model_type"] == "switch_transformers":
            config = {**_SWITCH, **config}
            given |= {"act": config.get("dense_act_fn", "relu"), "scaled": tied}
            given["num_decoder_layers"] = config["num_decoder_layers"] or config["num_layers"]
        else:
            multilingual = config["model_type"] == "mt5"
            config = {**(_MT5 if multilingual else {}), **config}
            if multilingual:  # as transformers: tied, whatever the configuration says
                config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
                given["num_decoder_layers"] = (
                    config.get("num_decoder_layers") or config["num_layers"]
                )
            gated, _, act = str(config.get("feed_forward_proj", "relu")).rpartition("-")
            if gated not in ("", "gated"):
                raise InputError(f"feed_forward_proj {gated}-{act} is not implemented")
            # "gated-gelu" means the tanh form.
            given["act"] = "gelu_new" if gated and act == "gelu" else act
            given["gated"] = bool(gated)
            given["scaled"] = config.get("scale_decoder_outputs", tied)
        if config.get("router_dtype", "float32") != "float32":
            raise InputError("a router_dtype other than float32 is not implemented")
        activation(given["act"])
        return config_from_fields(cls, config, **given)

    def sparse(self, decoder: bool) -> list[bool]:
        """Returns which layers of the encoder or decoder have experts."""
        layers = self.num_decoder_layers if decoder else self.num_layers
        if not self.num_experts:
            return [False] * layers
        count = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        # transformers does this even if no layer has experts.
        step = layers // count if count > 0 else layers
        return [step > 0 and (step == 1 or i % step == 1) for i in range(layers)]


_MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
        "feed_forward_proj": "gated-gelu"}  # fmt: skip
_SWITCH = {"d_model": 768, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
           "num_experts": 8}  # fmt: skip


class Attention(nnx.Module):
    """Attention without scaling, to positions of the same stack or of the encoder."""

    def __init__(self, config: T5Config, param_dtype: Any, rngs: nnx.Rngs):
        d, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads

        def linear(a: int, b: int, std: float) -> nnx.Linear:
            init = nnx.initializers.normal(config.initializer_factor * std)
            return nnx.Linear(
                a, b, use_bias=False, kernel_init=init, param_dtype=param_dtype, rngs=rngs
            )

        self.query = linear(d, inner, (d * config.d_kv) ** -0.5)
        self.key = linear(d, inner, d**-0.5)
        self.value = linear(d, inner, d**-0.5)
        self.out = linear(inner, d, inner**-0.5)
        self.dropout = Dropout(config.dropout_rate)

    def keys_values(self, x: Float[Array, "b s d"]) -> KeysValues:
        """Returns the keys and values of positions."""
        key, value = (a(x).reshape(*x.shape[:2], self.heads, -1) for a in (self.key, self.value))
        return key, value

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keys_values: KeysValues,
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "1 h t s"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        y = attention(query, *keys_values, visible, self.dropout, key, scale=1.0, bias=bias)
        return self.out(y.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """One layer: attention, attention to the encoder in a decoder, and an MLP or experts."""

    def __init__(
        self, config: T5Config, decoder: bool, sparse: bool, param_dtype: Any, rngs: nnx.Rngs
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        d = config.d_model
        norm = partial(RmsNorm, d, epsilon=config.layer_norm_epsilon, **common)
        mlp = partial(
            GatedMlp if config.gated else Mlp,
            d,
            config.d_ff,
            act=config.act,
            use_bias=False,
            param_dtype=param_dtype,
        )
        self.attention_norm = norm()
        self.attention = Attention(config, **common)
        if decoder:
            self.cross_norm = norm()
            self.cross = Attention(config, **common)
        self.mlp_norm = norm()
        # MLPs are in float32, as their sums would overflow in float16.
        self.precise = param_dtype == jnp.float16 and not sparse
        if sparse:
            self.mlp: Mlp | Moe = Moe(
                mlp,
                d,
                config.num_experts,
                top_k=1,
                normalized=False,
                capacity=config.expert_capacity,
                jitter=config.router_jitter_noise,
                router_bias=config.router_bias,
                kernel_init=nnx.initializers.normal(config.initializer_factor * d**-0.5),
                **common,
            )
        else:
            self.mlp = mlp(rngs=rngs, **({"param_dtype": jnp.float32} if self.precise else {}))
        self.dropout = Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "1 h t s"],
        cache: CacheUpdate,
        source: EncoderView | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """Returns the input of the next layer, and the logits of the router, if there is one."""
        keys = split_key(key, 6)
        y = self.attention_norm(x)
        own = cache.extended(*self.attention.keys_values(y))
        y = self.attention(y, own, visible, bias, keys[0])
        x = x + self.dropout(y, keys[1]).astype(x.dtype)
        if source is not None:
            y = self.cross(self.cross_norm(x), *source, None, keys[2])
            x = x + self.dropout(y, keys[3]).astype(x.dtype)
        y, router = self.mlp_norm(x), None
        if isinstance(self.mlp, Moe):
            y, router = self.mlp(y, keys[4])
        else:
            y = self.mlp(wide(y) if self.precise else y)
        return x + self.dropout(y, keys[5]).astype(x.dtype), router


class Stack(nnx.Module):
    """The layers of an encoder or decoder, their shared relative positions, and a final norm."""

    def __init__(self, config: T5Config, decoder: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.config, self.decoder = config, decoder
        common = {"param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_factor * config.d_model**-0.5)
        self.relative = nnx.Embed(
            config.relative_attention_num_buckets, config.num_heads, embedding_init=init, **common
        )
        self.layers = nnx.List(
            [Layer(config, decoder, sparse, **common) for sparse in config.sparse(decoder)]
        )
        self.norm = RmsNorm(config.d_model, epsilon=config.layer_norm_epsilon, **common)
        self.dropout = Dropout(config.dropout_rate)

    def bias(self, slots: Int[Array, " t"], count: int) -> Float[Array, "1 h t s"]:
        """Returns the bias of the scores of each head, which depends on relative positions.

        Args:
            slots: (t,) the slots of the tokens that attend.
            count: The number s of slots that they attend to.

        Returns:
            The bias. Distances are counted in slots, including padding.
        """
        config = self.config
        far, buckets = config.relative_attention_max_distance, config.relative_attention_num_buckets
        options = {"far": far, "buckets": buckets, "causal": self.decoder}
        return relative_bias(self.relative, slots, count, **options)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        cache: CacheUpdate,
        sources: Sequence[EncoderView | None],
        key: Key[Array, ""] | None,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Runs the layers on embeddings.

        The ``sources`` are what each layer attends to in the encoder; None for the encoder's own.
        """
        *keys, embed_key, norm_key = split_key(key, len(self.layers) + 2)
        bias = self.bias(seen.slots, seen.real.shape[1])
        x = self.dropout(x, embed_key)
        if x.dtype == jnp.float16:  # in which the sums over layers would overflow
            x = wide(x)
        states, routers = [x], []
        for layer, source, layer_key in zip(self.layers, sources, keys, strict=True):
            x, router = layer(x, seen.visible, bias, cache, source, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        x = self.dropout(self.norm(x), norm_key)
        states[-1] = x
        return DecoderOutput(
            x,
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=cache.result(seen),
        )


class T5Cache(NamedTuple):
    """The cache of generating text: that of the decoder, and the keys and values of the encoder.

    Args:
        own: The decoder's cache.
        keys_values: The encoder's keys and values for each layer of the decoder.
        source: (b, 1, 1, u), where the source texts are not padding.
    """

    own: Cache
    keys_values: tuple[EncoderKeysValues, ...]
    source: Bool[Array, "b 1 1 u"]


class T5(Generative):
    """A T5 or Switch encoder-decoder.

    Unlike in T5, there is no dropout inside the MLPs.

    Args:
        lm_head: Whether there is an output layer, if the configuration does not tie it to the
            token embeddings.

    References:
        T5 (arXiv 1910.10683); Switch Transformers (arXiv 2101.03961).

    Example:
        >>> config = T5Config.from_json({"model_type": "t5", "vocab_size": 50, "d_model": 8,
        ...     "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2})
        >>> model = T5(config, head="seq2seq-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]]), decoder_input_ids=jnp.array([[0, 5]])).logits.shape
        (1, 2, 50)
    """

    reads_prompts = False

    def __init__(
        self,
        config: T5Config,
        *,
        head: Head | None = None,
        lm_head: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        common = {"param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_factor)
        self.word = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, **common)
        self.encoder = Stack(config, False, **common)
        self.decoder = Stack(config, True, **common)
        own = config.own_embeddings
        embed = partial(nnx.Embed, config.vocab_size, config.d_model, embedding_init=init, **common)
        self.encoder_word = embed() if "encoder" in own else None
        self.decoder_word = embed() if "decoder" in own else None
        self.has_logits = head is not None
        untied = head is not None and lm_head and not config.tie_word_embeddings
        self.lm_head = (
            nnx.Linear(config.d_model, config.vocab_size, use_bias=False, **common)
            if untied
            else None
        )

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b u"],
        attention_mask: Shaped[ArrayLike, "b u"] | None = None,
        decoder_input_ids: Int[ArrayLike, "b t"] | None = None,
        decoder_attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> DecoderOutput:
        """Encodes source texts and decodes target texts.

        Args:
            input_ids: (b, u) token ids of the sources.
            attention_mask: (b, u), 0 or False at padding; None without padding.
            decoder_input_ids: (b, t) token ids of the targets, shifted by `shift_right`.
            decoder_attention_mask: (b, t), 0 or False at padding; None without padding.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout and of the routers' jitter; None to turn both off.

        Returns:
            The decoder's hidden states and logits, in the dtype of the parameters, and the
            encoder's output.

        Raises:
            InputError: ``decoder_input_ids`` is missing.
        """
        if decoder_input_ids is None:
            raise InputError("give decoder_input_ids, such as model.shift_right(target_ids)")
        keys = split_key(key, 2)
        encoded, source = self._encode(input_ids, attention_mask, output_hidden_states, keys[0])
        ids = jnp.asarray(decoder_input_ids)
        seen = window(token_mask(ids, decoder_attention_mask), None)
        sources = [(pair, source) for pair in self._keys_values(encoded)]
        x, cache = self._decoder_word(ids), CacheUpdate(None)
        out = self.decoder(x, seen, cache, sources, keys[1], output_hidden_states)
        logits = self.logits(out.last_hidden_state) if self.has_logits else None
        return out._replace(logits=logits, encoder=encoded)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of the decoder's hidden states."""
        if self.config.scaled:
            x = x * self.config.d_model**-0.5
        return self.word.attend(x) if self.lm_head is None else self.lm_head(x)

    def _decoder_word(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return (self.decoder_word or self.word)(ids)

    def shift_right(self, ids: Int[ArrayLike, "b t"]) -> Int[Array, "b t"]:
        """Returns the decoder's input for target texts: the start token, then all but the last."""
        start = self.config.decoder_start_token_id
        shifted = jnp.pad(jnp.asarray(ids)[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        return jnp.where(shifted < 0, self.config.pad_token_id, shifted)

    def _encode(
        self,
        input_ids: Int[ArrayLike, "b u"],
        attention_mask: Shaped[ArrayLike, "b u"] | None,
        output_hidden_states: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[DecoderOutput, Bool[Array, "b 1 1 u"]]:
        ids = jnp.asarray(input_ids)
        real = token_mask(ids, attention_mask)
        source = real[:, None, None]
        seen = window(real, None)._replace(visible=source)
        nothing = [None] * len(self.encoder.layers)
        x = (self.encoder_word or self.word)(ids)
        return self.encoder(x, seen, CacheUpdate(None), nothing, key, output_hidden_states), source

    def _keys_values(self, encoded: DecoderOutput) -> tuple[EncoderKeysValues, ...]:
        states = encoded.last_hidden_state
        return tuple(layer.cross.keys_values(states) for layer in self.decoder.layers)

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Encodes source texts and reads the start token; see `Generative.begin`."""
        encoded, source = self._encode(input_ids, attention_mask, False, None)
        b, config = input_ids.shape[0], self.config
        layers, dtype = config.num_decoder_layers, encoded.last_hidden_state.dtype
        own = Cache.empty(b, room, layers, config.num_heads, config.d_kv, dtype)
        cache = T5Cache(own, self._keys_values(encoded), source)
        return self.step(jnp.full(b, config.decoder_start_token_id, jnp.int32), cache)

    def step(
        self, tokens: Int[Array, " b"], cache: T5Cache
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Reads one more token of each text; see `Generative.step`."""
        seen = window(jnp.ones((tokens.shape[0], 1), bool), cache.own)
        sources = [(pair, cache.source) for pair in cache.keys_values]
        x = self._decoder_word(tokens[:, None])
        out = self.decoder(x, seen, CacheUpdate(cache.own), sources, None, False)
        return self.logits(out.last_hidden_state[:, 0]), cache._replace(own=out.cache)


def _stack_rules(stack: str, last: int, mlp: str, names: Mapping[str, str]) -> list[KeyRule]:
    """Returns the rules of the encoder or decoder; MLPs are number ``last`` in each block."""
    ours, theirs = f"{stack}.layers.{{l}}", f"{stack}.block.{{l}}.layer"
    rules = [
        KeyRule(f"{stack}.norm", f"{stack}.final_layer_norm", NORM),
        KeyRule(
            f"{stack}.relative",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
            EMBED,
        ),
        KeyRule(f"{ours}.mlp_norm", f"{theirs}.{last}.layer_norm", NORM),
        KeyRule(f"{ours}.mlp.router", f"{theirs}.{last}.mlp.router.classifier", LINEAR),
    ]
    parts = [("attention", "0.SelfAttention"), ("cross", "1.EncDecAttention")]
    for part, other in parts[:last]:
        rules.append(KeyRule(f"{ours}.{part}_norm", f"{theirs}.{other[0]}.layer_norm", NORM))
        for name in ("query", "key", "value", "out"):
            letter = "o" if name == "out" else name[0]
            rules.append(KeyRule(f"{ours}.{part}.{name}", f"{theirs}.{other}.{letter}", LINEAR))
    for name, other in names.items():
        rules.append(KeyRule(f"{ours}.mlp.{name}", f"{theirs}.{last}.{mlp}.{other}", LINEAR))
        expert = f"{theirs}.{last}.mlp.experts.expert_{{e}}.{other}"
        rules.append(KeyRule(f"{ours}.mlp.experts.{name}", expert, LINEAR))
    return rules


_PLAIN = {"up": "wi", "down": "wo"}
_GATED = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
_EMBEDDINGS = "embed_tokens.weight"
# Copies of the embeddings, a head that was not asked for, and a bias that T5 does not use.
_IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"lm_head\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


def _untied(config: T5Config, names: Sequence[str]) -> T5Config:
    own = tuple(stack for stack in ("encoder", "decoder") if f"{stack}.{_EMBEDDINGS}" in names)
    tied = config.tie_word_embeddings and "lm_head.weight" not in names
    return replace(config, tie_word_embeddings=tied, own_embeddings=own)


def _rules(config: T5Config, head: Head | None) -> KeyRules:
    mlp = "mlp" if config.model_type == "switch_transformers" else "DenseReluDense"
    rules = [KeyRule("word", "shared", EMBED), KeyRule("lm_head", "lm_head", LINEAR)]
    for stack, last in (("encoder", 1), ("decoder", 2)):
        rules += _stack_rules(stack, last, mlp, _GATED if config.gated else _PLAIN)
    twins = tied_head(config, "lm_head.weight", "word.embedding") if head is not None else {}
    for stack in ("encoder", "decoder"):
        name = f"{stack}.{_EMBEDDINGS}"
        rules.append(KeyRule(f"{stack}_word", name.removesuffix(".weight"), EMBED))
        twins |= {} if stack in config.own_embeddings else {name: "word.embedding"}
    return KeyRules(rules, "", write_prefix=False, ignored=_IGNORED, twins=twins)


def _family(name: str) -> Family:
    return Family(
        config=T5Config.from_json,
        model=T5,
        rules=_rules,
        architectures={None: f"{name}Model", "seq2seq-lm": f"{name}ForConditionalGeneration"},
        width_field="d_ff",
        optional=("lm_head",),
        untied=_untied,
    )


FAMILIES = {
    "mt5": _family("MT5"),
    "switch_transformers": _family("SwitchTransformers"),
    "t5": _family("T5"),
}
