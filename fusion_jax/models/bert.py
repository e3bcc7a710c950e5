"""Encoders with their heads: BERT, RoBERTa, and their blocks.

ELECTRA, DistilBERT and MPNet are the same blocks, see their files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import (
    EncoderOutput,
    Family,
    Fields,
    Head,
    Model,
    check_positions,
    config_from_fields,
    tied_head,
)
from fusion_jax.models.layers import (
    ArrayLike,
    Dropout,
    LayerNorm,
    attention,
    relative_bias,
    split_key,
    token_mask,
)
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules, Leaf
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The fields of a BERT ``config.json`` that the model uses, with its defaults.

    Some fields are not in the file, but say what a family of encoders has of its own.
    """

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
    sequence_dropout: float | None = None
    """The dropout of the classification head, in DistilBERT; None for ``classifier_dropout``."""
    answer_dropout: float = 0.0
    """The dropout of the question-answering head, which only DistilBERT has."""
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2
    label_ids: tuple[int, ...] | None = None
    """The token ids of label words, for a classification head that is a `LabelWordHead`."""
    label_transform: bool = True
    """Whether a head of label words has the layers of the masked-language-model head."""
    embedding_size: int = 0
    """The size of the embeddings, if a matrix maps them to ``hidden_size``; 0 if none does."""
    shifted_positions: bool = False
    """Whether positions count from ``pad_token_id + 1``, without padding, as in RoBERTa."""
    relative_buckets: int = 0
    """The number of ranges of distances that attention has a bias for; 0 for none."""
    pooled: bool = True
    """Whether there is a pooler, or can be."""
    head_act: str = ""
    """The activation of the first of the two layers of a classification head; "" for one layer."""
    lm_act: str = ""
    """The activation of the masked-language-model head; "" for that of the MLPs."""

    @classmethod
    def from_json(cls, config: Fields, **own: Any) -> BertConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant.

        The values in ``own`` are those of the family, which the file does not have.
        """
        if (config.get("position_embedding_type") or "absolute") != "absolute":
            raise InputError("only absolute position embeddings are implemented")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise InputError("only encoders are implemented, not is_decoder or add_cross_attention")
        if config.get("label_ids"):
            config = {**config, "num_labels": len(config["label_ids"])}
        result = config_from_fields(cls, config, **own)
        if any(not 0 <= i < result.vocab_size for i in result.label_ids or ()):
            raise InputError(f"label_ids are not all below vocab_size {result.vocab_size}")
        for name in (result.hidden_act, result.head_act, result.lm_act):
            if name:
                activation(name)
        if result.hidden_size % result.num_attention_heads:
            raise InputError(
                f"hidden_size {result.hidden_size} is not a multiple of "
                f"num_attention_heads {result.num_attention_heads}"
            )
        return result

    @property
    def head_dropout(self) -> float:
        """The dropout of a head on single positions."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate

    @classmethod
    def roberta(cls, **fields: Any) -> BertConfig:
        """Returns the configuration of a RoBERTa with these fields of a ``config.json``."""
        defaults = {"model_type": "roberta", "pad_token_id": 1, "vocab_size": 50265}
        own = {"shifted_positions": True, "head_act": "tanh", "lm_act": "gelu"}
        return cls.from_json({**defaults, **fields}, **own)


def _roberta(config: Fields) -> BertConfig:
    return BertConfig.roberta(**config)


class _LayerFactory:
    """Makes the layers of a model, all with its initializer, dtype, epsilon and random keys."""

    def __init__(self, config: BertConfig, param_dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.linear = partial(nnx.Linear, kernel_init=init, **common)
        self.embed = partial(nnx.Embed, embedding_init=init, **common)
        self.norm = partial(LayerNorm, epsilon=config.layer_norm_eps, **common)
        self.mlp = partial(Mlp, act=config.hidden_act, kernel_init=init, **common)
        self.param_dtype = param_dtype


class Embeddings(nnx.Module):
    """The sum of word, position and token-type embeddings, normalized."""

    def __init__(self, config: BertConfig, make: _LayerFactory):
        self.config = config
        size = config.embedding_size or config.hidden_size
        self.word = make.embed(config.vocab_size, size)
        self.position = make.embed(config.max_position_embeddings, size)
        types = config.type_vocab_size
        self.token_type = make.embed(types, size) if types else None
        self.norm = make.norm(size)
        narrow = size != config.hidden_size
        self.project = make.linear(size, config.hidden_size) if narrow else None
        self.dropout = Dropout(config.hidden_dropout_prob)

    def positions(self, input_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """Returns position ids: 0, 1, ...; in RoBERTa from pad_token_id + 1, without padding."""
        if self.config.shifted_positions:
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
        """Returns the input of the first layer."""
        if position_ids is None:
            position_ids = self.positions(input_ids)
        x = self.word(input_ids) + self.position(position_ids)
        if self.token_type is not None:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(types)
        x = self.dropout(self.norm(x), key)
        return x if self.project is None else self.project(x)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with its output projection."""

    def __init__(self, config: BertConfig, make: _LayerFactory):
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = make.linear(d, d)
        self.key = make.linear(d, d)
        self.value = make.linear(d, d)
        self.out = make.linear(d, d)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Shaped[Array, "b 1 1 t"],
        bias: Float[Array, "1 h t t"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        b, t, d = x.shape
        q, k, v = (
            linear(x).reshape(b, t, self.heads, d // self.heads)
            for linear in (self.query, self.key, self.value)
        )
        y = attention(q, k, v, visible, self.dropout, key, bias=bias)
        return self.out(y.reshape(b, t, d))


class Layer(nnx.Module):
    """One encoder layer: attention and MLP, each inside a residual connection before a norm."""

    def __init__(self, config: BertConfig, make: _LayerFactory):
        self.attention = SelfAttention(config, make)
        self.attention_norm = make.norm(config.hidden_size)
        self.mlp = make.mlp(config.hidden_size, config.intermediate_size)
        self.mlp_norm = make.norm(config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Shaped[Array, "b 1 1 t"],
        bias: Float[Array, "1 h t t"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the hidden states after the layer."""
        keys = split_key(key, 3)
        x = self.attention_norm(
            x + self.dropout(self.attention(x, visible, bias, keys[0]), keys[1])
        )
        return self.mlp_norm(x + self.dropout(self.mlp(x), keys[2]))


class ClassificationHead(nnx.Module):
    """Logits at the first position: one linear layer after BERT's pooler, otherwise two."""

    def __init__(self, config: BertConfig, make: _LayerFactory):
        d = config.hidden_size
        self.act = config.head_act
        self.dense = make.linear(d, d) if self.act else None
        self.out = make.linear(d, config.num_labels)
        rate = config.sequence_dropout
        self.dropout = Dropout(config.head_dropout if rate is None else rate)

    def __call__(
        self, pooled: Float[Array, "b d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b classes"]:
        """Returns the logits of pooled states (BERT) or of first hidden states."""
        keys = split_key(key, 2)
        x = self.dropout(pooled, keys[0])
        if self.dense is not None:
            x = self.dropout(activation(self.act)(self.dense(x)), keys[1])
        return self.out(x)


class TokenHead(nnx.Module):
    """Logits at each position: of classes, or of the start and the end of an answer."""

    def __init__(self, config: BertConfig, make: _LayerFactory, *, answers: bool):
        self.out = make.linear(config.hidden_size, 2 if answers else config.num_labels)
        self.dropout = Dropout(config.answer_dropout if answers else config.head_dropout)

    def __call__(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t classes"]:
        """Returns the logits of hidden states."""
        return self.out(self.dropout(x, key))


class MaskedLmHead(nnx.Module):
    """Logits over the vocabulary; the word embeddings are the output weights where tied."""

    def __init__(self, config: BertConfig, make: _LayerFactory):
        size = config.embedding_size or config.hidden_size
        self.act = config.lm_act or config.hidden_act
        self.dense = make.linear(config.hidden_size, size)
        self.norm = make.norm(size)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, make.param_dtype))
        tied = config.tie_word_embeddings
        self.decoder = None if tied else make.embed(config.vocab_size, size)

    def words(self, word: AnyEmbed) -> AnyEmbed:
        """Returns the output weights: the word embeddings, unless the head has its own."""
        return word if self.decoder is None else self.decoder

    def transformed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n e"]:
        """Returns the vectors that are multiplied with the word embeddings."""
        return self.norm(activation(self.act)(self.dense(x)))

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b t vocab"]:
        """Returns the logits of hidden states."""
        return self.words(word).attend(self.transformed(x)) + self.bias[...][None, None]


class LabelWordHead(MaskedLmHead):
    """Logits of classes: those of label words in the masked-language-model head, at position 0.

    References:
        The code of Jiang et al. (ACL 2023). In their text the head has no layers and no bias; see
        `BareLabelWordHead`.
    """

    def __init__(self, config: BertConfig, make: _LayerFactory):
        super().__init__(config, make)
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """Returns the logits of hidden states."""
        ids = jnp.array(self.ids, jnp.int32)
        return self.transformed(x[:, 0]) @ self.words(word)(ids).mT + self.bias[...][ids][None]


class BareLabelWordHead(nnx.Module):
    """Logits of classes: the first hidden state times the embeddings of label words.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning.
    """

    def __init__(self, config: BertConfig, make: _LayerFactory):
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """Returns the logits of hidden states."""
        return x[:, 0] @ word(jnp.array(self.ids, jnp.int32)).mT


class Bert(Model):
    """An encoder such as BERT and RoBERTa.

    Args:
        pooler: Whether there is a pooler, in a model without a head; heads that need one have one.

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
        make = _LayerFactory(config, param_dtype, rngs)
        self.config = config
        self.embeddings = Embeddings(config, make)
        self.layers = nnx.List([Layer(config, make) for _ in range(config.num_hidden_layers)])
        buckets = config.relative_buckets
        self.relative = make.embed(buckets, config.num_attention_heads) if buckets else None
        words = head == "classification" and config.label_ids is not None
        if head is not None or not config.pooled:
            pooler = head == "classification" and config.pooled and not (words or config.head_act)
        self.pooler = make.linear(config.hidden_size, config.hidden_size) if pooler else None
        by_words = LabelWordHead if config.label_transform else BareLabelWordHead
        heads: dict[Head, Any] = {
            "classification": by_words if words else ClassificationHead,
            "token-classification": partial(TokenHead, answers=False),
            "question-answering": partial(TokenHead, answers=True),
            "masked-lm": MaskedLmHead,
        }
        self.head = None if head is None else heads[head](config, make)

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
            attention_mask: (b, t), 0 or False at padding; None without padding.
            token_type_ids: (b, t) segment ids; None for 0 everywhere.
            position_ids: (b, t); None for the positions in the text.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            Hidden states, pooled output and logits, in the dtype of the parameters.

        Raises:
            InputError: There are more tokens than positions.
        """
        input_ids = jnp.asarray(input_ids)
        token_type_ids = None if token_type_ids is None else jnp.asarray(token_type_ids)
        position_ids = None if position_ids is None else jnp.asarray(position_ids)
        if position_ids is None:
            check_positions(self, input_ids.shape[1])
        visible = token_mask(input_ids, attention_mask)[:, None, None, :]
        bias = None
        if self.relative is not None:
            length, buckets = input_ids.shape[1], self.config.relative_buckets
            options = {"far": MAX_DISTANCE, "buckets": buckets}
            bias = relative_bias(self.relative, jnp.arange(length), length, **options)
        *keys, embed_key, head_key = split_key(key, len(self.layers) + 2)
        x = self.embeddings(input_ids, token_type_ids, position_ids, embed_key)
        states = [x]
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x = layer(x, visible, bias, layer_key)
            states.append(x)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        logits = None
        if isinstance(self.head, ClassificationHead):
            logits = self.head(x[:, 0] if pooled is None else pooled, head_key)
        elif isinstance(self.head, TokenHead):
            logits = self.head(x, head_key)
        elif self.head is not None:
            logits = self.head(x, self.embeddings.word)
        return EncoderOutput(x, tuple(states) if output_hidden_states else None, pooled, logits)


MAX_DISTANCE = 128
"""The distance from which on all distances have the same bias, in attention with such biases."""
EMBEDDING_RULES = (
    KeyRule("embeddings.word", "embeddings.word_embeddings", EMBED),
    KeyRule("embeddings.position", "embeddings.position_embeddings", EMBED),
    KeyRule("embeddings.token_type", "embeddings.token_type_embeddings", EMBED),
    KeyRule("embeddings.norm", "embeddings.LayerNorm", NORM),
)
ENCODER_RULES = (
    *EMBEDDING_RULES,
    KeyRule("layers.{l}.attention.query", "encoder.layer.{l}.attention.self.query", LINEAR),
    KeyRule("layers.{l}.attention.key", "encoder.layer.{l}.attention.self.key", LINEAR),
    KeyRule("layers.{l}.attention.value", "encoder.layer.{l}.attention.self.value", LINEAR),
    KeyRule("layers.{l}.attention.out", "encoder.layer.{l}.attention.output.dense", LINEAR),
    KeyRule("layers.{l}.attention_norm", "encoder.layer.{l}.attention.output.LayerNorm", NORM),
    KeyRule("layers.{l}.mlp.up", "encoder.layer.{l}.intermediate.dense", LINEAR),
    KeyRule("layers.{l}.mlp.down", "encoder.layer.{l}.output.dense", LINEAR),
    KeyRule("layers.{l}.mlp_norm", "encoder.layer.{l}.output.LayerNorm", NORM),
    KeyRule("pooler", "pooler.dense", LINEAR),
)
BIAS = {"": Leaf(("",))}
head_rule = partial(KeyRule, in_base=False)
TWO_LAYERS = (
    head_rule("head.dense", "classifier.dense", LINEAR),
    head_rule("head.out", "classifier.out_proj", LINEAR),
)
# Tensors that a model may not need: buffers, a pooler that the head does not use, the heads of
# pre-training, and heads that were not asked for.
_IGNORED = (
    r"(.+\.)?embeddings\.(position_ids|token_type_ids)",
    r"(.+\.)?pooler\.dense\.(weight|bias)",
    r"(cls|lm_head|generator_.+|discriminator_.+|vocab_.+|pre_classifier)\..+",
)


def encoder_rules(
    config: BertConfig,
    head: Head | None,
    *,
    prefix: str,
    layers: Sequence[KeyRule],
    classification: Sequence[KeyRule],
    masked_lm: Sequence[KeyRule],
    decoder: str,
    decoder_bias: bool = False,
) -> KeyRules:
    """Returns the key rules of an encoder.

    Args:
        config: The configuration.
        head: The head.
        prefix: What precedes the names of the base model in a checkpoint with a head.
        layers: The rules of the base model.
        classification: The rules of the classification head.
        masked_lm: The rules of the masked-language-model head, without its output weights.
        decoder: The name of the layer with the output weights.
        decoder_bias: Whether this layer has a copy of the bias.
    """
    if head == "classification" and config.label_ids is not None:
        head = "masked-lm"
    twins, copies = {}, {}
    if head == "masked-lm":
        twins = tied_head(config, f"{decoder}.weight", "embeddings.word.embedding")
        if decoder_bias:
            twins[f"{decoder}.bias"] = "head.bias"
        if decoder_bias and not config.tie_word_embeddings:
            copies = {"head.bias": (f"{decoder}.bias",)}
    own: dict[Head | None, Sequence[KeyRule]] = {
        "classification": classification,
        "token-classification": (head_rule("head.out", "classifier", LINEAR),),
        "question-answering": (head_rule("head.out", "qa_outputs", LINEAR),),
        "masked-lm": (*masked_lm, head_rule("head.decoder", decoder, EMBED)),
    }
    return KeyRules(
        rules=(*layers, *own.get(head, ())),
        prefix=prefix,
        write_prefix=head is not None,
        ignored=_ignored(head),
        twins=twins,
        decisive=(f"{decoder}.bias",) if decoder_bias else (),
        copies=copies,
    )


def _ignored(head: Head | None) -> Sequence[str]:
    if head != "masked-lm":
        return _IGNORED
    copies = r"(cls\.predictions|lm_head)\.(decoder\.weight|decoder\.bias|bias)"
    others = r"cls\.seq_relationship\.(weight|bias)|discriminator_.+|generator_lm_head\.weight"
    return (*_IGNORED[:2], copies, others, r"vocab_projector\.weight|pre_classifier\..+")


def _bert_rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="bert.",
        layers=ENCODER_RULES,
        classification=(head_rule("head.out", "classifier", LINEAR),),
        masked_lm=(
            head_rule("head.dense", "cls.predictions.transform.dense", LINEAR),
            head_rule("head.norm", "cls.predictions.transform.LayerNorm", NORM),
            head_rule("head.bias", "cls.predictions.bias", BIAS),
        ),
        decoder="cls.predictions.decoder",
        decoder_bias=True,
    )


ROBERTA_LM = (
    head_rule("head.dense", "lm_head.dense", LINEAR),
    head_rule("head.norm", "lm_head.layer_norm", NORM),
    head_rule("head.bias", "lm_head.bias", BIAS),
)


def _roberta_rules(config: BertConfig, head: Head | None) -> KeyRules:
    return encoder_rules(
        config,
        head,
        prefix="roberta.",
        layers=ENCODER_RULES,
        classification=TWO_LAYERS,
        masked_lm=ROBERTA_LM,
        decoder="lm_head.decoder",
        decoder_bias=True,
    )


def encoder_family(
    name: str,
    config: Callable[[Fields], BertConfig],
    rules: Callable[[BertConfig, Head | None], KeyRules],
    *,
    width_field: str = "intermediate_size",
    pooler: bool = True,
) -> Family:
    """Returns the family of encoders whose classes in `transformers` begin with ``name``."""
    return Family(
        config=config,
        model=Bert,
        rules=rules,
        architectures={
            None: f"{name}Model",
            "classification": f"{name}ForSequenceClassification",
            "token-classification": f"{name}ForTokenClassification",
            "question-answering": f"{name}ForQuestionAnswering",
            "masked-lm": f"{name}ForMaskedLM",
        },
        width_field=width_field,
        optional=("pooler",) if pooler else (),
    )


FAMILIES = {
    "bert": encoder_family("Bert", BertConfig.from_json, _bert_rules),
    "roberta": encoder_family("Roberta", _roberta, _roberta_rules),
    "xlm-roberta": encoder_family("XLMRoberta", _roberta, _roberta_rules),
    "camembert": encoder_family("Camembert", _roberta, _roberta_rules),
}
