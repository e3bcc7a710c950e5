"""T5, its version 1.1, and Switch Transformers: encoder and decoder with a language-model head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Family, Generative, Head, read_fields
from fusion_jax.models.layers import ArrayLike, Cache, Memory, RmsNorm, Window, attention, window
from fusion_jax.models.moe import Moe
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRules, Rule
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of a T5 or Switch ``config.json`` that matter here, with T5's defaults.

    Made by `from_json`, which works out a few of them: ``act`` and ``gated`` say what the MLPs are,
    ``scaled`` whether logits are of hidden states divided by the square root of their number.
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
    def from_json(cls, config: Mapping[str, Any]) -> T5Config:
        """Reads a ``config.json``.

        Args:
            config: Its fields.

        Returns:
            The configuration.

        Raises:
            InputError: It asks for a variant that is not implemented.
        """
        tied = bool(config.get("tie_word_embeddings", True))
        given: dict[str, Any] = {"num_decoder_layers": config.get("num_decoder_layers")}
        given["num_decoder_layers"] = given["num_decoder_layers"] or config.get("num_layers", 6)
        if config["model_type"] == "switch_transformers":
            config = {**_SWITCH, **config}
            given |= {"act": config.get("dense_act_fn", "relu"), "scaled": tied}
            given["num_decoder_layers"] = config["num_decoder_layers"] or config["num_layers"]
        else:
            gated, _, act = str(config.get("feed_forward_proj", "relu")).rpartition("-")
            if gated not in ("", "gated"):
                raise InputError(f"feed_forward_proj {gated}-{act} is not implemented")
            # "gated-gelu" has always meant the tanh form.
            given["act"] = "gelu_new" if gated and act == "gelu" else act
            given["gated"] = bool(gated)
            given["scaled"] = config.get("scale_decoder_outputs", tied)
        activation(given["act"])
        return read_fields(cls, config, **given)

    def sparse(self, decoder: bool) -> list[bool]:
        """Which layers of a stack have experts."""
        layers = self.num_decoder_layers if decoder else self.num_layers
        if not self.num_experts:
            return [False] * layers
        count = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        # Without any, transformers divides by one all the same.
        step = layers // count if count > 0 else layers
        return [step > 0 and (step == 1 or i % step == 1) for i in range(layers)]


_SWITCH = {"d_model": 768, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
           "num_experts": 8}  # fmt: skip


class Attention(nnx.Module):
    """Attention without scaling, to the own positions or to those of the encoder."""

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
        self.dropout = nnx.Dropout(config.dropout_rate)

    def keys_values(
        self, x: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b s h f"], Float[Array, "b s h f"]]:
        """The keys and values of positions."""
        key, value = (a(x).reshape(*x.shape[:2], self.heads, -1) for a in (self.key, self.value))
        return key, value

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keys_values: tuple[Float[Array, "b s h f"], Float[Array, "b s h f"]],
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "1 h t s"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        query = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        y = attention(query, *keys_values, visible, self.dropout, key, scale=1.0, bias=bias)
        return self.out(y.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """One layer: attention, in a decoder attention to the encoder, and an MLP or experts."""

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
        if sparse:
            self.mlp: Mlp | Moe = Moe(
                mlp,
                d,
                config.num_experts,
                top_k=1,
                normalised=False,
                capacity=config.expert_capacity,
                jitter=config.router_jitter_noise,
                router_bias=config.router_bias,
                kernel_init=nnx.initializers.normal(config.initializer_factor * d**-0.5),
                **common,
            )
        else:
            self.mlp = mlp(rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 #t s"],
        bias: Float[Array, "1 h t s"],
        memory: Memory,
        source: tuple[Any, Bool[Array, "b 1 1 u"]] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"] | None]:
        """The input of the next layer, and the logits of the router, if there is one."""
        keys = (None,) * 6 if key is None else tuple(jax.random.split(key, 6))

        def added(x: Array, y: Array, key: Any) -> Array:
            return x + self.dropout(y, rngs=key, deterministic=key is None)

        y = self.attention_norm(x)
        own = memory.extended(*self.attention.keys_values(y))
        x = added(x, self.attention(y, own, visible, bias, keys[0]), keys[1])
        if source is not None:
            y = self.cross(self.cross_norm(x), *source, None, keys[2])
            x = added(x, y, keys[3])
        y, router = self.mlp_norm(x), None
        if isinstance(self.mlp, Moe):
            y, router = self.mlp(y, keys[4])
        else:
            y = self.mlp(y)
        return added(x, y, keys[5]), router


class Stack(nnx.Module):
    """The layers of an encoder or decoder, the relative positions they share, and a norm."""

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
        self.dropout = nnx.Dropout(config.dropout_rate)

    def bias(self, slots: Int[Array, " t"], count: int) -> Float[Array, "1 h t s"]:
        """What relative positions add to the scores of each head.

        Args:
            slots: The positions that look.
            count: How many positions s there are to look at.

        Returns:
            The bias, by the distance in slots; padding between tokens counts.
        """
        far = self.config.relative_attention_max_distance
        distance = slots[:, None] - jnp.arange(count)[None]
        table = jnp.asarray(_buckets(self.config, self.decoder))
        near = jnp.clip(distance, 0 if self.decoder else -far, far)
        return self.relative(table[near + (0 if self.decoder else far)]).transpose(2, 0, 1)[None]

    def __call__(
        self,
        x: Float[Array, "b t d"],
        seen: Window,
        memory: Memory,
        sources: list[Any],
        key: Key[Array, ""] | None,
        output_hidden_states: bool,
    ) -> DecoderOutput:
        """Runs the layers on embeddings.

        Args:
            x: The embeddings.
            seen: What they see.
            memory: The cache.
            sources: For each layer the encoder's keys and values and where they are visible, or
                None.
            key: Random key of dropout, or None.
            output_hidden_states: Whether to return all hidden states.

        Returns:
            Hidden states, router logits and the new cache.
        """
        n = len(self.layers)
        keys = (None,) * (n + 2) if key is None else tuple(jax.random.split(key, n + 2))
        bias = self.bias(seen.slots, seen.real.shape[1])
        x = self.dropout(x, rngs=keys[n], deterministic=key is None)
        states, routers = [x], []
        for layer, source, layer_key in zip(self.layers, sources, keys[:n], strict=True):
            x, router = layer(x, seen.visible, bias, memory, source, layer_key)
            states.append(x)
            routers += [] if router is None else [router]
        x = self.dropout(self.norm(x), rngs=keys[n + 1], deterministic=key is None)
        states[-1] = x
        return DecoderOutput(
            x,
            tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers),
            cache=memory.written(seen),
        )


def _buckets(config: T5Config, decoder: bool) -> np.ndarray:
    """The bucket of each distance, from 0 (decoder) or minus the largest one to the largest one.

    Half of the buckets are for single distances, half for ranges that grow; an encoder has each
    twice, for both directions. Rounded in float32, as T5 was trained.
    """
    far, count = config.relative_attention_max_distance, config.relative_attention_num_buckets
    count = count if decoder else count // 2
    exact = count // 2
    distance = np.arange(far + 1, dtype=np.float32)
    with np.errstate(divide="ignore"):
        logs = np.log(distance / np.float32(exact)) / np.float32(np.log(far / exact))
    large = exact + np.maximum(logs * np.float32(count - exact), 0).astype(np.int32)
    back = np.where(distance < exact, distance, np.minimum(large, count - 1)).astype(np.int32)
    if decoder:
        return back
    return np.concatenate([count + back[:0:-1], back])


class T5Cache(NamedTuple):
    """What generating needs: the decoder's cache, and each layer's view of the encoder.

    Args:
        own: The decoder's cache.
        keys_values: The encoder's keys and values for each layer of the decoder.
        source: (b, 1, 1, u), where the encoder's positions are not padding.
    """

    own: Cache
    keys_values: tuple[tuple[Float[Array, "b u h f"], Float[Array, "b u h f"]], ...]
    source: Bool[Array, "b 1 1 u"]


class T5(Generative):
    """A T5 or Switch encoder-decoder.

    Dropout is where T5 has it except inside the MLPs.

    Args:
        config: Its configuration.
        head: ``"seq2seq-lm"`` for logits, or None.
        lm_head: Whether there is an output layer, if the configuration does not tie it to the
            token embeddings.
        param_dtype: The dtype of the parameters, in which the model also computes.
        rngs: Random keys of the initial parameters.

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
            attention_mask: (b, u), 0 or False at padding; None if there is none.
            decoder_input_ids: (b, t) token ids of the targets, shifted right as `shift_right` does.
            decoder_attention_mask: (b, t), likewise.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout and of the routers' jitter; None for neither.

        Returns:
            The decoder's hidden states and logits, in the dtype of the parameters, and the
            encoder's output.

        Raises:
            InputError: There are no ``decoder_input_ids``.
        """
        if decoder_input_ids is None:
            raise InputError("give decoder_input_ids, such as model.shift_right(target_ids)")
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        encoded, source = self._encode(input_ids, attention_mask, output_hidden_states, keys[0])
        ids = jnp.asarray(decoder_input_ids)
        real = jnp.ones(ids.shape, bool)
        if decoder_attention_mask is not None:
            real = jnp.asarray(decoder_attention_mask).astype(bool)
        sources = [(pair, source) for pair in self._keys_values(encoded)]
        out = self.decoder(
            self.word(ids), window(real, None), Memory(None), sources, keys[1], output_hidden_states
        )
        logits = self.logits(out.last_hidden_state) if self.has_logits else None
        return out._replace(logits=logits, encoder=encoded)

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """The logits of the decoder's hidden states."""
        if self.config.scaled:
            x = x * self.config.d_model**-0.5
        return self.word.attend(x) if self.lm_head is None else self.lm_head(x)

    def shift_right(self, ids: Int[ArrayLike, "b t"]) -> Int[Array, "b t"]:
        """The decoder's input for target texts: one place later, with the start token first."""
        start = self.config.decoder_start_token_id
        shifted = jnp.pad(jnp.asarray(ids)[:, :-1], ((0, 0), (1, 0)), constant_values=start)
        return jnp.where(shifted < 0, self.config.pad_token_id, shifted)

    def _encode(
        self, input_ids: Any, attention_mask: Any, output_hidden_states: bool, key: Any
    ) -> tuple[DecoderOutput, Bool[Array, "b 1 1 u"]]:
        ids = jnp.asarray(input_ids)
        real = jnp.ones(ids.shape, bool)
        if attention_mask is not None:
            real = jnp.asarray(attention_mask).astype(bool)
        source = real[:, None, None]
        seen = window(real, None)._replace(visible=source)
        nothing = [None] * len(self.encoder.layers)
        x = self.word(ids)
        return self.encoder(x, seen, Memory(None), nothing, key, output_hidden_states), source

    def _keys_values(self, encoded: DecoderOutput) -> tuple[Any, ...]:
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
        x = self.word(tokens[:, None])
        out = self.decoder(x, seen, Memory(cache.own), sources, None, False)
        return self.logits(out.last_hidden_state[:, 0]), cache._replace(own=out.cache)


def _stack_rules(stack: str, last: int, mlp: str, names: Mapping[str, str]) -> list[Rule]:
    """The rules of the encoder or decoder, whose MLPs are the parts number ``last``."""
    ours, theirs = f"{stack}.layers.{{l}}", f"{stack}.block.{{l}}.layer"
    rules = [
        Rule(f"{stack}.norm", f"{stack}.final_layer_norm", NORM),
        Rule(
            f"{stack}.relative",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
            EMBED,
        ),
        Rule(f"{ours}.mlp_norm", f"{theirs}.{last}.layer_norm", NORM),
        Rule(f"{ours}.mlp.router", f"{theirs}.{last}.mlp.router.classifier", LINEAR),
    ]
    parts = [("attention", "0.SelfAttention"), ("cross", "1.EncDecAttention")]
    for part, other in parts[:last]:
        rules.append(Rule(f"{ours}.{part}_norm", f"{theirs}.{other[0]}.layer_norm", NORM))
        for name in ("query", "key", "value", "out"):
            letter = "o" if name == "out" else name[0]
            rules.append(Rule(f"{ours}.{part}.{name}", f"{theirs}.{other}.{letter}", LINEAR))
    for name, other in names.items():
        rules.append(Rule(f"{ours}.mlp.{name}", f"{theirs}.{last}.{mlp}.{other}", LINEAR))
        expert = f"{theirs}.{last}.mlp.experts.expert_{{e}}.{other}"
        rules.append(Rule(f"{ours}.mlp.experts.{name}", expert, LINEAR))
    return rules


_PLAIN = {"up": "wi", "down": "wo"}
_GATED = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
# Copies of the embeddings, a head that is not asked for, and a relic of T5's first checkpoints.
_IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"lm_head\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


def _rules(config: T5Config, head: Head | None) -> KeyRules:
    mlp = "DenseReluDense" if config.model_type == "t5" else "mlp"
    rules = [Rule("word", "shared", EMBED), Rule("lm_head", "lm_head", LINEAR)]
    for stack, last in (("encoder", 1), ("decoder", 2)):
        rules += _stack_rules(stack, last, mlp, _GATED if config.gated else _PLAIN)
    return KeyRules(rules, "", write_prefix=False, ignored=_IGNORED)


def _family(name: str) -> Family:
    return Family(
        config=T5Config.from_json,
        model=T5,
        rules=_rules,
        architectures={None: f"{name}Model", "seq2seq-lm": f"{name}ForConditionalGeneration"},
        width_field="d_ff",
        optional=("lm_head",),
    )


FAMILIES = {
    "switch_transformers": _family("SwitchTransformers"),
    "t5": _family("T5"),
}
