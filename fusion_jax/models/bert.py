"""Encoders with their heads: BERT, RoBERTa, and the families that are built from the same parts.

The parts are in `bert_layers` and `bert_heads`, what differs is in `bert_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key, Shaped

from fusion_jax.models.base import (
    EncoderOutput,
    Family,
    Fields,
    Head,
    Model,
    check_positions,
)
from fusion_jax.models.bert_config import BertConfig as BertConfig
from fusion_jax.models.bert_heads import (
    BareLabelWordHead,
    ClassificationHead,
    LabelWordHead,
    MaskedLmHead,
    TokenHead,
)
from fusion_jax.models.bert_layers import Embeddings, Layer, LayerFactory, SelfAttention, Shared
from fusion_jax.models.bert_rules import (
    BIAS,
    ENCODER_RULES,
    ROBERTA_LM,
    TWO_LAYERS,
    encoder_rules,
    head_rule,
)
from fusion_jax.models.disentangled import Convolution, DisentangledAttention
from fusion_jax.models.layers import ArrayLike, relative_bias, split_key, token_mask
from fusion_jax.models.rules import LINEAR, NORM, KeyRules


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
        make = LayerFactory(config, param_dtype, rngs)
        self.config = config
        self.embeddings = Embeddings(config, make)
        self.schedule = config.blocks.schedule or tuple(range(config.num_hidden_layers))
        relative = config.blocks.relative
        layer = partial(Layer, attention=DisentangledAttention if relative else SelfAttention)
        self.layers = nnx.List([layer(config, i, make) for i in range(max(self.schedule) + 1)])
        self.norm = make.norm(config.hidden_size) if config.blocks.norm_first else None
        buckets = config.relative_buckets
        rows, size = buckets, config.num_attention_heads
        if relative is not None:
            rows, size = 2 * relative.span, config.hidden_size
        normed = relative is not None and relative.normed
        self.relative = make.embed(rows, size) if rows else None
        self.relative_norm = make.norm(size) if normed else None
        conv = config.blocks.convolution
        self.convolution = None if conv is None else Convolution(config, make)
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
        if position_ids is None:
            if self.embeddings.position is not None:
                check_positions(self, input_ids.shape[1])
            position_ids = self.embeddings.positions(input_ids)
        position_ids = jnp.asarray(position_ids)
        real = token_mask(input_ids, attention_mask)
        shared = self._shared(real, position_ids)
        *keys, embed_key, head_key = split_key(key, len(self.schedule) + 2)
        x = self.embeddings(input_ids, token_type_ids, position_ids, embed_key)
        if self.config.blocks.relative is not None:
            x = x * real.astype(x.dtype)[..., None]
        states = [x]
        for index, layer_key in zip(self.schedule, keys, strict=True):
            x = self.layers[index](x, shared, layer_key)
            if self.convolution is not None and len(states) == 1:
                x = self.convolution(states[0], x, real, layer_key)
            states.append(x)
        if self.norm is not None:
            x = states[-1] = self.norm(x)
        pooled = None if self.pooler is None else jnp.tanh(self.pooler(x[:, 0]))
        logits = None
        if isinstance(self.head, TokenHead):
            logits = self.head(x, head_key)
        elif isinstance(self.head, ClassificationHead):
            logits = self.head(x if pooled is None else pooled[:, None], real, head_key)
        elif self.head is not None:
            logits = self.head(x, self.embeddings.word)
        return EncoderOutput(x, tuple(states) if output_hidden_states else None, pooled, logits)

    def _shared(self, real: Bool[Array, "b t"], positions: Int[Array, "b t"]) -> Shared:
        """Returns what all layers get."""
        config, length = self.config, real.shape[1]
        distances = jnp.arange(length)[:, None] - jnp.arange(length)[None]
        visible: dict[int | None, Array] = {None: real[:, None, None, :]}
        for size in set(config.blocks.windows) - {None}:
            visible[size] = visible[None] & (jnp.abs(distances) <= size)[None, None]
        features = config.hidden_size // config.num_attention_heads
        features = config.blocks.head_dim or features
        angles = {rope: rope.angles(positions, features) for rope in set(config.blocks.ropes)}
        bias, table = None, None
        if config.blocks.relative is not None:
            visible[None] = visible[None] & real[:, None, :, None]
            if self.relative is not None:
                table = self.relative(jnp.arange(2 * config.blocks.relative.span))
                table = table if self.relative_norm is None else self.relative_norm(table)
        elif self.relative is not None:
            options = {"far": MAX_DISTANCE, "buckets": config.relative_buckets}
            bias = relative_bias(self.relative, jnp.arange(length), length, **options)
        return Shared(visible, bias, angles, table)


MAX_DISTANCE = 128
"""The distance from which on all distances have the same bias, in attention with such biases."""


_HEADS: Mapping[Head, str] = {
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}


def encoder_family(
    name: str,
    config: Callable[[Fields], BertConfig],
    rules: Callable[[BertConfig, Head | None], KeyRules],
    *,
    width_field: str = "intermediate_size",
    pooler: bool = True,
    heads: Collection[Head] = tuple(_HEADS),
) -> Family:
    """Returns the family of encoders whose classes in `transformers` begin with ``name``.

    Args:
        name: See above.
        config: Reads the fields of a ``config.json``.
        rules: Returns the key rules.
        width_field: The field with the width of the MLPs.
        pooler: Whether checkpoints may have a pooler.
        heads: The heads that the family has in `transformers`.
    """
    return Family(
        config=config,
        model=Bert,
        rules=rules,
        architectures={None: f"{name}Model", **{head: name + _HEADS[head] for head in heads}},
        width_field=width_field,
        optional=("pooler",) if pooler else (),
    )


def _roberta(config: Fields) -> BertConfig:
    return BertConfig.roberta(**config)


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


FAMILIES = {
    "bert": encoder_family("Bert", BertConfig.from_json, _bert_rules),
    "roberta": encoder_family("Roberta", _roberta, _roberta_rules),
    "xlm-roberta": encoder_family("XLMRoberta", _roberta, _roberta_rules),
    "camembert": encoder_family("Camembert", _roberta, _roberta_rules),
}
