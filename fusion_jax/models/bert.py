"""BERT and RoBERTa encoders, with classification and masked-language-model heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import EncoderOutput, Family, Head, Model, read_fields
from fusion_jax.models.layers import ArrayLike, LayerNorm, attention
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRules, Leaf, Rule
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The fields of a BERT or RoBERTa ``config.json`` that matter here, with its defaults."""

    model_type: str
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int = 2
    label_ids: tuple[int, ...] | None = None
    """Token ids of label words: the classification head is then `LabelWordHead`."""
    label_transform: bool = True
    """Whether that head has the layers of the masked-language-model head."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> BertConfig:
        """Reads a ``config.json``.

        Args:
            config: Its fields.

        Returns:
            The configuration.

        Raises:
            InputError: It asks for a variant that is not implemented.
        """
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise InputError("only absolute position embeddings are implemented")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise InputError("only encoders are implemented, not is_decoder or add_cross_attention")
        if not config.get("tie_word_embeddings", True):
            raise InputError("only tied word embeddings are implemented")
        roberta = config["model_type"] == "roberta"
        defaults: dict[str, Any] = {"pad_token_id": 1, "vocab_size": 50265} if roberta else {}
        if "id2label" in config:
            defaults["num_labels"] = len(config["id2label"])
        if config.get("label_ids"):
            config = {**config, "num_labels": len(config["label_ids"])}
        result = read_fields(cls, {**defaults, **config})
        if any(not 0 <= i < result.vocab_size for i in result.label_ids or ()):
            raise InputError(f"label_ids are not all below vocab_size {result.vocab_size}")
        activation(result.hidden_act)
        if result.hidden_size % result.num_attention_heads:
            raise InputError(
                f"hidden_size {result.hidden_size} is no multiple of "
                f"num_attention_heads {result.num_attention_heads}"
            )
        return result

    @property
    def is_roberta(self) -> bool:
        """Whether positions and heads are RoBERTa's."""
        return self.model_type == "roberta"


class _Parts:
    """Makes the layers of a model: its initialiser, dtype, epsilon and keys in one place."""

    def __init__(self, config: BertConfig, param_dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.embed = partial(nnx.Embed, embedding_init=init, **common)
        self.norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, **common)
        self.mlp = partial(Mlp, act=config.hidden_act, kernel_init=init, **common)
        self.param_dtype = param_dtype


class Embeddings(nnx.Module):
    """The sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: BertConfig, parts: _Parts):
        self.config = config
        self.word = parts.embed(config.vocab_size, config.hidden_size)
        self.position = parts.embed(config.max_position_embeddings, config.hidden_size)
        self.token_type = parts.embed(config.type_vocab_size, config.hidden_size)
        self.norm = parts.norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def positions(self, input_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Position ids: 0, 1, ... for BERT; RoBERTa counts from padding_idx + 1, past padding."""
        if self.config.is_roberta:
            real = (input_ids != self.config.pad_token_id).astype(input_ids.dtype)
            return jnp.cumsum(real, axis=1, dtype=input_ids.dtype) * real + self.config.pad_token_id
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None], input_ids.shape)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        token_type_ids: Int[Array, "b t"] | None,
        position_ids: Int[Array, "b t"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """The input of the first layer."""
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            position_ids = self.positions(input_ids)
        x = self.word(input_ids) + self.position(position_ids) + self.token_type(token_type_ids)
        return self.dropout(self.norm(x), rngs=key, deterministic=key is None)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, config: BertConfig, parts: _Parts):
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = parts.linear(d, d)
        self.key = parts.linear(d, d)
        self.value = parts.linear(d, d)
        self.out = parts.linear(d, d)
        self.dropout = nnx.Dropout(config.attention_probs_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Shaped[Array, "b 1 1 t"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        b, t, d = x.shape
        q, k, v = (
            linear(x).reshape(b, t, self.heads, d // self.heads)
            for linear in (self.query, self.key, self.value)
        )
        return self.out(attention(q, k, v, visible, self.dropout, key).reshape(b, t, d))


class Layer(nnx.Module):
    """One encoder layer: attention and MLP, each with a residual and a norm after it."""

    def __init__(self, config: BertConfig, parts: _Parts):
        self.attention = SelfAttention(config, parts)
        self.attention_norm = parts.norm()
        self.mlp = parts.mlp(config.hidden_size, config.intermediate_size)
        self.mlp_norm = parts.norm()
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Shaped[Array, "b 1 1 t"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """The hidden states after the layer."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        y = self.attention(x, visible, keys[0])
        y = self.dropout(y, rngs=keys[1], deterministic=key is None)
        x = self.attention_norm(x + y)
        y = self.dropout(self.mlp(x), rngs=keys[2], deterministic=key is None)
        return self.mlp_norm(x + y)


class ClassificationHead(nnx.Module):
    """Logits of the first position: a linear layer on BERT's pooler, two layers in RoBERTa."""

    def __init__(self, config: BertConfig, parts: _Parts):
        d = config.hidden_size
        self.dense = parts.linear(d, d) if config.is_roberta else None
        self.out = parts.linear(d, config.num_labels)
        rate = config.classifier_dropout
        self.dropout = nnx.Dropout(config.hidden_dropout_prob if rate is None else rate)

    def __call__(
        self, pooled: Float[Array, "b d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b classes"]:
        """The logits of pooled states (BERT) or of first hidden states (RoBERTa)."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        x = self.dropout(pooled, rngs=keys[0], deterministic=key is None)
        if self.dense is not None:
            x = jnp.tanh(self.dense(x))
            x = self.dropout(x, rngs=keys[1], deterministic=key is None)
        return self.out(x)


class MaskedLmHead(nnx.Module):
    """Logits over the vocabulary, with the word embeddings as output weights."""

    def __init__(self, config: BertConfig, parts: _Parts):
        self.act = "gelu" if config.is_roberta else config.hidden_act
        self.dense = parts.linear(config.hidden_size, config.hidden_size)
        self.norm = parts.norm()
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, parts.param_dtype))

    def transformed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Hidden states as they are multiplied with the word embeddings."""
        return self.norm(activation(self.act)(self.dense(x)))

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b t vocab"]:
        """The logits of hidden states."""
        return word.attend(self.transformed(x)) + self.bias[...][None, None]


class LabelWordHead(MaskedLmHead):
    """Logits of classes: those of their label words in the masked-LM head, at the first position.

    References:
        The code of Jiang et al. (ACL 2023); their text multiplies without the head's layers and
        bias.
    """

    def __init__(self, config: BertConfig, parts: _Parts):
        super().__init__(config, parts)
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """The logits of hidden states."""
        ids = jnp.array(self.ids, jnp.int32)
        return self.transformed(x[:, 0]) @ word(ids).mT + self.bias[...][ids][None]


class BareLabelWordHead(nnx.Module):
    """The first hidden state times the embeddings of label words; without a masked-LM head.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning.
    """

    def __init__(self, config: BertConfig, parts: _Parts):
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """The logits of hidden states."""
        return x[:, 0] @ word(jnp.array(self.ids, jnp.int32)).mT


class Bert(Model):
    """A BERT or RoBERTa encoder.

    Args:
        config: Its configuration.
        head: Which head is on top, or None.
        pooler: Whether there is a pooler (BERT's classification head always has one).
        param_dtype: The dtype of the parameters, in which the model also computes.
        rngs: Random keys of the initial parameters.

    Example:
        >>> config = BertConfig(model_type="bert", vocab_size=50, hidden_size=8,
        ...                     num_attention_heads=2, intermediate_size=32)
        >>> model = Bert(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]])).last_hidden_state.shape
        (1, 3, 8)
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        head: Head | None = None,
        pooler: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        parts = _Parts(config, param_dtype, rngs)
        self.config = config
        self.embeddings = Embeddings(config, parts)
        self.layers = nnx.List([Layer(config, parts) for _ in range(config.num_hidden_layers)])
        words = head == "classification" and config.label_ids is not None
        if words or head == "masked-lm":
            pooler = False
        elif head == "classification":
            pooler = not config.is_roberta
        self.pooler = parts.linear(config.hidden_size, config.hidden_size) if pooler else None
        by_words = LabelWordHead if config.label_transform else BareLabelWordHead
        heads: dict[Head, Any] = {
            "classification": by_words if words else ClassificationHead,
            "masked-lm": MaskedLmHead,
        }
        self.head = None if head is None else heads[head](config, parts)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        token_type_ids: Int[ArrayLike, "b t"] | None = None,
        position_ids: Int[ArrayLike, "b t"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> EncoderOutput:
        """Encodes a batch of token sequences.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 0 or False at padding; None if there is none.
            token_type_ids: (b, t) segment ids; None for all 0.
            position_ids: (b, t); None for the architecture's own.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            Hidden states, pooled output and logits, in the dtype of the parameters.
        """
        input_ids = jnp.asarray(input_ids)
        token_type_ids = None if token_type_ids is None else jnp.asarray(token_type_ids)
        position_ids = None if position_ids is None else jnp.asarray(position_ids)
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)
        visible = jnp.asarray(attention_mask).astype(bool)[:, None, None, :]
        n = len(self.layers)
        keys = (None,) * (n + 2) if key is None else tuple(jax.random.split(key, n + 2))
        x = self.embeddings(input_ids, token_type_ids, position_ids, keys[n])
        states = [x]
        for layer, layer_key in zip(self.layers, keys[:n], strict=True):
            x = layer(x, visible, layer_key)
            states.append(x)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        logits = None
        if isinstance(self.head, ClassificationHead):
            logits = self.head(x[:, 0] if pooled is None else pooled, keys[n + 1])
        elif self.head is not None:
            logits = self.head(x, self.embeddings.word)
        return EncoderOutput(x, tuple(states) if output_hidden_states else None, pooled, logits)


ENCODER_RULES = (
    Rule("embeddings.word", "embeddings.word_embeddings", EMBED),
    Rule("embeddings.position", "embeddings.position_embeddings", EMBED),
    Rule("embeddings.token_type", "embeddings.token_type_embeddings", EMBED),
    Rule("embeddings.norm", "embeddings.LayerNorm", NORM),
    Rule("layers.{l}.attention.query", "encoder.layer.{l}.attention.self.query", LINEAR),
    Rule("layers.{l}.attention.key", "encoder.layer.{l}.attention.self.key", LINEAR),
    Rule("layers.{l}.attention.value", "encoder.layer.{l}.attention.self.value", LINEAR),
    Rule("layers.{l}.attention.out", "encoder.layer.{l}.attention.output.dense", LINEAR),
    Rule("layers.{l}.attention_norm", "encoder.layer.{l}.attention.output.LayerNorm", NORM),
    Rule("layers.{l}.mlp.up", "encoder.layer.{l}.intermediate.dense", LINEAR),
    Rule("layers.{l}.mlp.down", "encoder.layer.{l}.output.dense", LINEAR),
    Rule("layers.{l}.mlp_norm", "encoder.layer.{l}.output.LayerNorm", NORM),
    Rule("pooler", "pooler.dense", LINEAR),
)
_BIAS = {"": Leaf(("",))}
_head_rule = partial(Rule, in_base=False)
_HEADS: dict[str, dict[Head, tuple[Rule, ...]]] = {
    "bert": {
        "classification": (_head_rule("head.out", "classifier", LINEAR),),
        "masked-lm": (
            _head_rule("head.dense", "cls.predictions.transform.dense", LINEAR),
            _head_rule("head.norm", "cls.predictions.transform.LayerNorm", NORM),
            _head_rule("head.bias", "cls.predictions.bias", _BIAS),
        ),
    },
    "roberta": {
        "classification": (
            _head_rule("head.dense", "classifier.dense", LINEAR),
            _head_rule("head.out", "classifier.out_proj", LINEAR),
        ),
        "masked-lm": (
            _head_rule("head.dense", "lm_head.dense", LINEAR),
            _head_rule("head.norm", "lm_head.layer_norm", NORM),
            _head_rule("head.bias", "lm_head.bias", _BIAS),
        ),
    },
}
# What a checkpoint may hold besides: buffers, tied copies, a pooler that the head does not use,
# the next-sentence head of the original BERT, and all of a head that was not asked for.
_IGNORED = (
    r"(.+\.)?embeddings\.(position_ids|token_type_ids)",
    r"(bert\.|roberta\.)?pooler\.dense\.(weight|bias)",
    r"cls\.seq_relationship\.(weight|bias)",
    r"cls\.predictions\.decoder\.(weight|bias)",
    r"lm_head\.decoder\.(weight|bias)",
)
_IGNORED_HEADS: dict[Head, tuple[str, ...]] = {
    "classification": (r"classifier\..+",),
    "masked-lm": (r"cls\..+", r"lm_head\..+"),
}


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    model_type = config.model_type
    others = [p for name, patterns in _IGNORED_HEADS.items() if name != head for p in patterns]
    if head == "classification" and config.label_ids is not None:
        head, others = "masked-lm", [*others, *_IGNORED_HEADS[head]]
    return KeyRules(
        rules=ENCODER_RULES if head is None else (*ENCODER_RULES, *_HEADS[model_type][head]),
        prefix=f"{model_type}.",
        write_prefix=head is not None,
        ignored=(*_IGNORED, *others),
    )


def _family(name: str) -> Family:
    return Family(
        config=BertConfig.from_json,
        model=Bert,
        rules=_rules,
        architectures={
            None: f"{name}Model",
            "classification": f"{name}ForSequenceClassification",
            "masked-lm": f"{name}ForMaskedLM",
        },
        width_field="intermediate_size",
        optional=("pooler",),
    )


FAMILIES = {"bert": _family("Bert"), "roberta": _family("Roberta")}
