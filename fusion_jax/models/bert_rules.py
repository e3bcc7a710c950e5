"""The key rules of encoders: where their layers are in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fusion_jax.models.base import Head, tied_head
from fusion_jax.models.bert_config import BertConfig
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules, Leaf

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
    tokens: Sequence[KeyRule] = (head_rule("head.out", "classifier", LINEAR),),
    answers: Sequence[KeyRule] = (head_rule("head.out", "qa_outputs", LINEAR),),
    ignored: Sequence[str] = (),
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
        tokens: The rules of the token-classification head.
        answers: The rules of the question-answering head.
        ignored: Further tensors that the model does not need.
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
        "token-classification": tokens,
        "question-answering": answers,
        "masked-lm": (*masked_lm, head_rule("head.decoder", decoder, EMBED)),
    }
    return KeyRules(
        rules=(*layers, *own.get(head, ())),
        prefix=prefix,
        write_prefix=head is not None,
        ignored=(*_ignored(head), *ignored),
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


ROBERTA_LM = (
    head_rule("head.dense", "lm_head.dense", LINEAR),
    head_rule("head.norm", "lm_head.layer_norm", NORM),
    head_rule("head.bias", "lm_head.bias", BIAS),
)
"""The rules of RoBERTa's masked-language-model head, without its output weights."""
