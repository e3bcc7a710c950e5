"""ViT: the vision transformer of Dosovitskiy et al. (arXiv 2010.11929)."""

from __future__ import annotations

from dataclasses import replace

from fusion_jax.models.base import Family, Fields, Head, config_from_fields
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.models.vision import BASE, CLASSIFIER, VisionConfig, VisionTransformer


def _config(fields: Fields) -> VisionConfig:
    own = {"use_mask_token": False, "pooling": "dense", "blocks": EncoderBlocks()}
    config = config_from_fields(VisionConfig, fields, **own).check()
    blocks = EncoderBlocks(
        norm_first=True,
        attention_bias=config.qkv_bias,
        attention_out_bias=True,
        head_dim=config.head_dim,
    )
    return replace(config, blocks=blocks)


_LAYER, _THEIRS = "layers.{l}", "encoder.layer.{l}"
_BASE = (
    *BASE,
    KeyRule(f"{_LAYER}.attention_norm", f"{_THEIRS}.layernorm_before", NORM),
    KeyRule(f"{_LAYER}.mlp.up", f"{_THEIRS}.intermediate.dense", LINEAR),
    KeyRule(f"{_LAYER}.mlp.down", f"{_THEIRS}.output.dense", LINEAR),
    KeyRule(f"{_LAYER}.mlp_norm", f"{_THEIRS}.layernorm_after", NORM),
    KeyRule("pooler", "pooler.dense", LINEAR),
)
# The pooler that a head does not use, and what pre-training by masked patches adds.
_IGNORED = (r"(vit\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)", r"decoder\..+")


def _rules(config: VisionConfig, head: Head | None) -> KeyRules:
    rules = _BASE if head is None else (*_BASE, CLASSIFIER)
    return KeyRules(rules, prefix="vit.", write_prefix=head is not None, ignored=_IGNORED)


FAMILIES = {
    "vit": Family(
        config=_config,
        model=VisionTransformer,
        rules=_rules,
        architectures={None: "ViTModel", "classification": "ViTForImageClassification"},
        width_field="intermediate_size",
        optional=("pooler",),
    )
}
