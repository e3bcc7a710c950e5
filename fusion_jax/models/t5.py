"""T5, its versions 1.1, mT5 and UMT5, and Switch: the models that generate text, and the rules.

The heads that give classes or answers are in `t5_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Family, Generative, Head, Model, tied_head
from fusion_jax.models.cache import Cache, CacheUpdate, window
from fusion_jax.models.layers import ArrayLike
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.models.t5_config import T5Config as T5Config
from fusion_jax.models.t5_heads import HEAD_RULES, T5WithHead
from fusion_jax.models.t5_stacks import EncoderDecoder, EncoderKeysValues


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


class T5(EncoderDecoder, Generative):
    """A T5 or Switch encoder-decoder.

    Unlike in T5, there is no dropout inside the MLPs.

    Args:
        config: The configuration, a `T5Config` or what has the same properties.
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
        config: Any,
        *,
        head: Head | None = None,
        lm_head: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, decodes=True, **common)
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
        ids = jnp.asarray(decoder_input_ids)
        options = (decoder_attention_mask, key, output_hidden_states)
        out = self.read(input_ids, attention_mask, ids, *options)
        return out._replace(logits=self.logits(out.last_hidden_state)) if self.has_logits else out

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of the decoder's hidden states."""
        if self.config.scaled:
            x = x * self.config.d_model**-0.5
        return self.word.attend(x) if self.lm_head is None else self.lm_head(x)

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Encodes source texts and reads the start token; see `Generative.begin`."""
        encoded, source = self.encode(input_ids, attention_mask, False, None)
        b, config = input_ids.shape[0], self.config
        layers, dtype = config.num_decoder_layers, encoded.last_hidden_state.dtype
        own = Cache.empty(b, room, layers, config.num_heads, config.d_kv, dtype)
        cache = T5Cache(own, self.keys_values(encoded), source)
        return self.step(jnp.full(b, config.decoder_start_token_id, jnp.int32), cache)

    def step(
        self, tokens: Int[Array, " b"], cache: T5Cache
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Reads one more token of each text; see `Generative.step`."""
        seen = window(jnp.ones((tokens.shape[0], 1), bool), cache.own)
        own = CacheUpdate(cache.own)
        out = self.decode(tokens[:, None], seen, own, cache.keys_values, cache.source)
        return self.logits(out.last_hidden_state[:, 0]), cache._replace(own=out.cache)


_ATTENTION = {
    "full": "SelfAttention",
    "local": "LocalSelfAttention",
    "transient-global": "TransientGlobalSelfAttention",
}


def _stack_rules(
    stack: str, last: int, own: str, mlp: str, names: Mapping[str, str]
) -> list[KeyRule]:
    """Returns the rules of the encoder or decoder.

    Args:
        stack: Which of the two.
        last: The number of the MLP in each block.
        own: The name of the attention to positions of the same stack.
        mlp: The name of the MLP.
        names: The names of the layers of MLPs.
    """
    ours, theirs = f"{stack}.layers.{{l}}", f"{stack}.block.{{l}}.layer"
    rules = [
        KeyRule(f"{stack}.norm", f"{stack}.final_layer_norm", NORM),
        KeyRule(
            f"{stack}.relative",
            f"{stack}.block.0.layer.0.{own}.relative_attention_bias",
            EMBED,
        ),
        KeyRule(
            f"{stack}.block_relative",
            f"{stack}.block.0.layer.0.{own}.global_relative_attention_bias",
            EMBED,
        ),
        KeyRule(f"{ours}.relative", f"{theirs}.0.{own}.relative_attention_bias", EMBED),
        KeyRule(f"{ours}.attention.norm", f"{theirs}.0.{own}.global_input_layer_norm", NORM),
        KeyRule(f"{ours}.mlp_norm", f"{theirs}.{last}.layer_norm", NORM),
        KeyRule(f"{ours}.mlp.router", f"{theirs}.{last}.mlp.router.classifier", LINEAR),
    ]
    parts = [("attention", f"0.{own}"), ("cross", "1.EncDecAttention")]
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
_PREFIX = "transformer."
"""The prefix of the base model's names in checkpoints with some of the heads."""
_EMBEDDINGS = "embed_tokens.weight"
# Copies of the embeddings, a head that was not asked for, and a bias that T5 does not use.
_IGNORED = (
    r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight",
    r"lm_head\.weight",
    r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
_DECODER = r"(transformer\.)?decoder\..+"


def _untied(config: T5Config, names: Sequence[str]) -> T5Config:
    plain = [name.removeprefix(_PREFIX) for name in names]
    own = tuple(stack for stack in ("encoder", "decoder") if f"{stack}.{_EMBEDDINGS}" in plain)
    tied = config.tie_word_embeddings and "lm_head.weight" not in plain
    return replace(config, tie_word_embeddings=tied, own_embeddings=own)


def _rules(config: T5Config, head: Head | None) -> KeyRules:
    mlp = "mlp" if config.model_type == "switch_transformers" else "DenseReluDense"
    rules = [KeyRule("word", "shared", EMBED), KeyRule("lm_head", "lm_head", LINEAR, in_base=False)]
    rules += HEAD_RULES.get(head, ())
    names, own = _GATED if config.gated else _PLAIN, _ATTENTION[config.encoder_attention_type]
    rules += _stack_rules("encoder", 1, own, mlp, names)
    rules += _stack_rules("decoder", 2, _ATTENTION["full"], mlp, names)
    generates = head == "seq2seq-lm"
    twins = tied_head(config, "lm_head.weight", "word.embedding") if generates else {}
    ignored, stacks = _IGNORED, ("encoder", "decoder")
    if head == "token-classification":
        ignored, stacks = (*_IGNORED, _DECODER), ("encoder",)
    for stack in stacks:
        name = f"{stack}.{_EMBEDDINGS}"
        rules.append(KeyRule(f"{stack}_word", name.removesuffix(".weight"), EMBED))
        if stack not in config.own_embeddings:
            twins |= dict.fromkeys((name, _PREFIX + name), "word.embedding")
    prefixed = head in ("classification", "token-classification")
    return KeyRules(rules, _PREFIX, write_prefix=prefixed, ignored=ignored, twins=twins)


def _model(
    config: T5Config, *, head: Head | None = None, lm_head: bool = True, **options: Any
) -> EncoderDecoder:
    if head is not None and head in HEAD_RULES:
        return T5WithHead(config, head=head, **options)
    return T5(config, head=head, lm_head=lm_head, **options)


def t5_family(
    name: str, heads: Mapping[Head | None, str], model: Callable[..., Model] = _model
) -> Family:
    """Returns the family of a version of T5.

    Args:
        name: What the names of its classes in `transformers` begin with.
        heads: The ends of the names of the classes with heads that give classes or answers.
        model: Makes a model, see `Family`.
    """
    names: dict[Head | None, str] = {
        None: "Model",
        "seq2seq-lm": "ForConditionalGeneration",
        **heads,
    }
    return Family(
        config=T5Config.from_json,
        model=model,
        rules=_rules,
        architectures={head: name + end for head, end in names.items()},
        width_field="d_ff",
        optional=("lm_head",),
        untied=_untied,
    )


_HEADS: Mapping[Head | None, str] = {
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
FAMILIES = {
    "mt5": t5_family("MT5", _HEADS),
    "switch_transformers": t5_family("SwitchTransformers", {}),
    "t5": t5_family("T5", _HEADS),
    "umt5": t5_family("UMT5", _HEADS),
}
